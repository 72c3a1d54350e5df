"""Recorded calls of kernels: the same numbers on other memory, and what cannot be recorded is not."""

from __future__ import annotations

import random
import warnings

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
    assert len(recording.steps) == 1
    assert len(recording.steps[0]) >= 5
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


HELD = torch.randn(24)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("why", "function"),
    [
        ("it calls aten.add_", lambda x: native.gelu(x, False)[0].add_(1)),
        ("it calls aten.zero_", lambda x: native.gelu(x, False)[0].zero_()),
        ("it calls aten.cat", lambda x: torch.cat([x, native.gelu(x, False)[0]])),
        ("it calls aten.native_dropout", lambda x: torch.native_dropout(native.gelu(x, False)[0], 0.5, True)[0]),
        ("it calls aten.bernoulli", lambda x: torch.bernoulli(native.gelu(x, False)[0].sigmoid())),
        ("it calls aten.max", lambda x: native.gelu(x, False)[0].max(1)[0]),
        ("it calls aten.", lambda x: native.gelu(x, x[0, 0, 0, 0].item() > 9)[0]),
        ("it does not return tensors of its own", lambda x: x),
        ("it does not return tensors of its own", lambda x: native.gelu(x, False)[0][:1]),
        ("it does not return tensors of its own", lambda x: native.gelu(x, False)),
        ("it does not return tensors of its own", lambda x: (native.gelu(x, False)[0],) * 2),
        ("it does not return tensors of its own", lambda x: [native.gelu(x, False)[0]]),
        ("it reads memory that is neither", lambda x: native.channel_affine(x, HELD.expand(2, 24), shift=None)),
        ("it reads memory that is neither", lambda x: x * HELD[:, None, None]),
        ("an operator of PyTorch's reads memory as another dtype", lambda x: x.view(torch.int32) + 1),
        ("nothing was told to write what it returns", lambda x: torch.empty_like(x)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_again_is_refused(why, function):
    y, result = record(function, (image(),), ())
    assert isinstance(result, str)
    assert result.startswith(why)
    assert y is not None


class Mixed:
    """Kernels and operators of PyTorch's by turns; several results, one empty, one of another dtype and strides."""

    def __init__(self, dtype):
        self.weight = torch.randn(24, 24).to(dtype)

    def __call__(self, x, matrix, vector):
        y = native.gelu(x, False)[0]
        rows = y.permute(0, 2, 3, 1).reshape(-1, 24)
        gradient = rows.t() @ matrix
        each = torch.bmm(rows.reshape(2, -1, 24).transpose(1, 2), matrix.reshape(2, -1, 24))
        sums = native.channel_sums(y)
        logits = torch.nn.functional.linear((sums / 36).to(x.dtype), self.weight, vector)
        attention = torch.sigmoid(logits.to(sums.dtype))
        scaled = native.channel_affine(y, attention, overwrite=True)
        both = (vector.clone() @ self.weight).to(torch.float64)
        return scaled, gradient, each.sum(0), attention, x.new_empty(0), both.to(torch.float32)

    @property
    def weights(self):
        return [self.weight]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_operators_between_kernels_write_where_they_are_told(dtype):
    function = Mixed(dtype)

    def given():
        return image(dtype), torch.randn(72, 24).to(dtype), torch.randn(24).to(dtype)

    args = given()
    y, recording = record(function, args, function.weights)
    assert isinstance(recording, Recording), recording
    assert len(recording.steps) > 8
    for _ in range(3):
        found = replayed(recording, *args)
        assert type(found) is tuple
        for one, other in zip(found, y, strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert torch.equal(one, other)
        args = given()
        y = function(*args)


@torch.no_grad()
def test_operators_read_what_is_turned_round_afterwards_as_it_was():
    """In-place views change a tensor's shape, not its memory."""

    def function(m):
        a = m @ m
        b = a @ m
        a.t_()
        return b + a @ m.unsqueeze_(0).squeeze_(0)

    m = torch.randn(5, 5)
    _, recording = record(function, (m,))
    assert isinstance(recording, Recording), recording
    m = torch.randn(5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a result that had to be resized
        assert torch.equal(replayed(recording, m), function(m))


@torch.inference_mode()
def test_what_is_held_while_recording_is_limited():
    function = lambda x: native.gelu(native.gelu(native.gelu(x, False)[0], False)[0], False)[0]  # noqa: E731
    x = image()
    assert isinstance(record(function, (x,), most=3 * x.nbytes)[1], Recording)
    y, refusal = record(function, (x,), most=2 * x.nbytes)
    assert refusal == "it makes too much memory to hold at once"
    assert torch.equal(y, function(x))


@torch.inference_mode()
def test_inputs_are_told_apart_by_where_they_begin():
    """Chunks of one tensor share memory; only two that begin at the same place cannot be told apart."""
    affine = lambda x, s, r: native.channel_affine(x, s, shift=r)  # noqa: E731
    x, both = image(), torch.randn(2, 48)
    _, recording = record(affine, (x, *both.chunk(2, 1)), ())
    both = torch.randn(2, 48)
    x, s, r = image(), both[:, 24:], both[:, :24]  # the other way round
    assert torch.equal(replayed(recording, x, s, r), affine(x, s, r))
    assert record(affine, (x, s, s), ())[1] == "its inputs share their memory"
    inside = lambda x, s, r: native.channel_affine(x, s, shift=r[1:])  # noqa: E731
    assert record(inside, (x, s, r), ())[1] == "its inputs share their memory"


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
            operand, last = rng.random() < 0.3, rng.randint(first, 12)
            memories.append(_recording._Memory(torch.empty(0), size, operand, first, last))
        output = _recording._Memory(torch.empty(0), rng.choice([64, 4096, 5000]), False, rng.randint(0, 12), 12)
        total = _recording._arrange(memories, output)
        for i, a in enumerate(memories):
            assert a.offset % 64 == 0
            outside = a.base == _recording._BETWEEN
            assert outside or (a.last < output.first and not a.operand)
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
