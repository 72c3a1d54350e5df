"""Recorded calls of kernels: the same numbers on other memory, and what cannot be recorded is not."""

from __future__ import annotations

import random

import pytest
import torch

from dico_kernels import _recording, native
from dico_kernels._recording import Recording, record


@pytest.fixture(autouse=True)
def _poisoned_allocation():
    """Not while recording: filling fresh memory is an operation on it. Replays are given poisoned memory below."""


def replayed(recording, *inputs):
    """A replay in memory that begins as NaN."""

    def poisoned(allocate):
        def fill(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(0xFF)

        return fill

    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_strided"):
            patch.setattr(torch, name, poisoned(getattr(torch, name)))
        return recording.replay(*inputs)


def image(dtype=torch.float32, n=2, c=24, size=6):
    return torch.randn(n, c, size, size).to(dtype).contiguous(memory_format=torch.channels_last)


class Chain:
    """Products, a depthwise convolution and a scale: memory that is read twice, scratch, and vectors."""

    def __init__(self, dtype=torch.float32, c=24):
        self.first, self.second = torch.randn(3 * c, c).to(dtype), torch.randn(c, 3 * c).to(dtype)
        self.taps, self.bias = torch.randn(3 * c, 1, 3, 3).to(dtype), torch.randn(3 * c).to(dtype)

    @property
    def weights(self):
        return [self.first, self.second, self.taps, self.bias]

    def __call__(self, x, gate):
        a = native.pointwise(x, self.first, self.bias, gelu=True).y
        b, sums = native.depthwise_sums(a, self.taps, self.bias, True)
        b = native.channel_affine(b, sums, z=a, r=sums)
        return native.pointwise(b, self.second, None, gate=gate[:, 5 : 5 + x.shape[1]], residual=x).y


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_replays_on_other_inputs(isa, dtype):
    chain = Chain(dtype)
    x, gate = image(dtype), torch.randn(2, 60).to(dtype)
    y, recording = record(chain, (x, gate), chain.weights)
    assert isinstance(recording, Recording), recording
    assert len(recording.steps) >= 5
    assert torch.equal(y, chain(x, gate))
    for _ in range(3):
        x, gate = image(dtype), torch.randn(2, 60).to(dtype)
        again = replayed(recording, x, gate)
        assert (again.shape, again.stride(), again.dtype) == (y.shape, y.stride(), y.dtype)
        assert torch.equal(again, chain(x, gate))


@torch.inference_mode()
def test_weights_are_read_where_they_lie():
    chain, x, gate = Chain(), image(), torch.randn(2, 60)
    _, recording = record(chain, (x, gate), chain.weights)
    chain.first.mul_(2)
    chain.taps.add_(1)
    assert torch.equal(replayed(recording, x, gate), chain(x, gate))


@torch.inference_mode()
def test_replays_on_the_instruction_set_it_was_recorded_on(isa):
    """Weights that were packed for one are garbage to another."""
    chain, x, gate = Chain(), image(), torch.randn(2, 60)
    y, recording = record(chain, (x, gate), chain.weights)
    for other in native.isas():
        with native.isa(other):
            assert torch.equal(replayed(recording, x, gate), y)


@torch.inference_mode()
def test_memory_is_used_again():
    chain, x, gate = Chain(), image(), torch.randn(2, 60)
    _, recording = record(chain, (x, gate), chain.weights)
    with _recording._Recorder() as watching:
        chain(x, gate)
    sizes = [m.size for m in watching.made.values()]
    assert 0 < recording.between < sum(sizes) - x.nbytes  # which is the output's


GELU = torch.nn.functional.gelu
HELD = torch.randn(24)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("why", "function"),
    [
        ("it calls aten.mul", lambda x: native.gelu(x * 2, False)[0]),
        ("it calls aten.gelu", lambda x: GELU(native.gelu(x, False)[0])),
        ("it calls aten.add_", lambda x: native.gelu(x, False)[0].add_(1)),
        ("it calls aten.", lambda x: native.gelu(x, x[0, 0, 0, 0].item() > 9)[0]),
        ("it calls aten.clone", lambda x: native.gelu(x.clone(), False)[0]),
        ("it does not return one tensor of its own", lambda x: x),
        ("it does not return one tensor of its own", lambda x: native.gelu(x, False)[0][:1]),
        ("it does not return one tensor of its own", lambda x: native.gelu(x, False)),
        ("it reads memory that is neither", lambda x: native.channel_affine(x, HELD.expand(2, 24), shift=None)),
        ("no kernel was given what it returns", lambda x: torch.empty_like(x)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_only_kernels_is_refused(why, function):
    y, result = record(function, (image(),), ())
    assert isinstance(result, str)
    assert result.startswith(why)
    assert y is not None


@torch.inference_mode()
def test_inputs_that_share_memory_are_refused():
    x = image()
    weight = torch.randn(24, 24)
    assert "share" in record(lambda a, b: native.gelu(a, False)[0], (x, x[:1]), ())[1]
    assert "share" in record(lambda a: native.gelu(a, False)[0], (x,), (x,))[1]
    assert isinstance(record(lambda a: native.pointwise(a, weight).y, (x,), (weight,))[1], Recording)
    assert "neither" in record(lambda a: native.pointwise(a, weight).y, (x,), ())[1]


def test_nothing_is_recorded_after_an_error():
    with pytest.raises(ValueError, match="channels_last"):
        record(lambda x: native.gelu(x, False)[0], (torch.randn(2, 24, 6, 6),), ())
    assert not _recording.is_recording()


def test_memory_in_use_at_a_time_does_not_overlap():
    rng = random.Random(0)
    for _ in range(200):
        memories = []
        for _ in range(rng.randint(1, 12)):
            first = rng.randint(0, 10)
            size = rng.choice([1, 63, 64, 65, 1000, 4096])
            memories.append(_recording._Memory(torch.empty(0), size, first, rng.randint(first, 12)))
        output = _recording._Memory(torch.empty(0), rng.choice([64, 4096, 5000]), rng.randint(0, 12), 12)
        total = _recording._arrange(memories, output)
        for i, a in enumerate(memories):
            assert a.offset % 64 == 0
            outside = a.base == _recording._BETWEEN
            assert outside or a.last < output.first
            assert a.offset + a.size <= (total if outside else output.size)
            for b in memories[:i]:
                together = a.base == b.base and a.first <= b.last and b.first <= a.last
                assert not together or a.end <= b.offset or b.end <= a.offset


def test_bad_steps_are_refused():
    recording = native.extension().Recording(2)
    values = (1, 4, 8, 1, *[0] * 6, 0, 0, 0)  # of channel_affine
    for error, args in {
        "12 values: expected 13": ("channel_affine", 0, 1, values[:-1], [-1] * 12),
        "not a pointer": ("channel_affine", 0, 1, values, [0] * 13),
        "no such base": ("channel_affine", 0, 1, values, [-1] * 4 + [2] + [-1] * 8),
    }.items():
        with pytest.raises(ValueError, match=error):
            recording.add(*args)
    with pytest.raises(IndexError):
        recording.add("no such kernel", 0, 1, values, [-1] * 13)
    assert len(recording) == 0
    with pytest.raises(ValueError, match="1 bases: expected 2"):
        recording.run([0])
