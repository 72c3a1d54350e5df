"""Branches with gradients, recorded an op at a time: the same bits as without, and nothing recorded that may change."""

from __future__ import annotations

import threading

import pytest
import torch
from support import threads
from torch import nn

import dico_kernels as dk
from dico_kernels import native
from dico_kernels._recording import Recording
from dico_kernels.ops import _recorded
from dico_kernels.reference.weights import fill_

if not (native.available() and native.multiplies(torch.empty(0))):
    pytest.skip("recordings need a CPU whose products are ours (AVX-512)", allow_module_level=True)

SHAPES = {
    "products of samples": (2, 24, 8, 8),
    "formed anew": (3, 24, 5, 7),
    "many images": (9, 16, 8, 8),
}


@pytest.fixture(autouse=True)
def _nothing_recorded():
    for table in _recorded._RECORDINGS.values():
        table.clear()


def recorded():
    """How many recordings each op has; of what was refused, why."""
    return {
        name: sum(isinstance(r, Recording) for r in table.values()) or next(iter(table.values()), 0)
        for name, table in _recorded._RECORDINGS.items()
    }


def made(family, dtype, c, **options):
    module = (dk.reference.DiCoBlock if family == "DiCo" else dk.reference.FCDMBlock)(c)
    return dk.fuse(fill_(module).to(dtype), **options)


def given(shape, dtype, seed, autocast=False):
    generator = torch.Generator().manual_seed(seed)
    stream = torch.float32 if autocast else dtype
    x, dy = (torch.randn(shape, generator=generator).to(stream) for _ in range(2))
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    return x.requires_grad_(), torch.randn(shape[:2], generator=generator).to(stream).requires_grad_(), dy


def step(module, x, c, dy, autocast=None):
    """The output and every gradient; what was empty held NaN."""
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = module(x, c)
    return [y.detach(), *torch.autograd.grad(y, [x, c, *module.parameters()], dy)]


def plain(*args, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_recorded, "_ENABLED", False)
        return step(*args, **options)


def same(found, expected):
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("error")  # such as of a result that had to be resized
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", ["DiCo", "FCDM"])
def test_same_bits(family, dtype, shape, monkeypatch):
    shape = SHAPES[shape]
    module = made(family, dtype, shape[1])
    for seed in range(2):
        step(module, *given(shape, dtype, seed))
    if native.multiplies(torch.empty(0, dtype=dtype)):  # or the library does, some of whose products cannot be told
        branches = ("conv_half", "ffn_half") if family == "DiCo" else ("fcdm_block",)
        found = recorded()
        for name in branches:
            assert found[name] == found[f"{name}_backward"] == 1, found
    for seed in range(2, 5):
        args = given(shape, dtype, seed)
        expected = plain(module, *args)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("empty", "empty_strided"):
                patch.setattr(torch, name, poisoned(getattr(torch, name)))
            found = step(module, *args)
        assert same(found, expected)


def poisoned(allocate):
    def fill(*args, **kwargs):
        t = allocate(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(0xFF)

    return fill


@pytest.mark.parametrize("family", ["DiCo", "FCDM"])
def test_autocast_and_recomputation(family):
    shape = SHAPES["products of samples"]
    module = made(family, torch.float32, shape[1], recompute=True)
    for seed in range(5):
        args = given(shape, torch.bfloat16, seed, autocast=True)
        assert same(step(module, *args, autocast=torch.bfloat16), plain(module, *args, autocast=torch.bfloat16))
    if native.multiplies(torch.empty(0, dtype=torch.bfloat16)):
        assert any(v == 1 for v in recorded().values())


def skip_arguments(dtype):
    shapes = ((2, 24, 4, 3), (2, 5, 8, 6), (7, 11, 1, 1), (7,))
    return [torch.randn(s).to(dtype).contiguous(memory_format=memory(s)).requires_grad_() for s in shapes]


def pointwise_arguments(dtype):
    shapes = ((2, 9, 8, 6), (14, 9, 1, 1), (14,), (14, 1, 3, 3), (14,))
    return [torch.randn(s).to(dtype).contiguous(memory_format=memory(s)).requires_grad_() for s in shapes]


def memory(shape):
    return torch.channels_last if len(shape) == 4 else torch.contiguous_format


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "arguments"), [("pixel_shuffle_skip", skip_arguments), ("pointwise_depthwise_gelu", pointwise_arguments)]
)
def test_backward_passes_of_single_ops(name, arguments, dtype):
    def gradients(args, dy):
        y = getattr(dk.ops, name)(*args)
        return torch.autograd.grad(y, args, dy.to(dtype).expand_as(y).contiguous(memory_format=torch.channels_last))

    for _ in range(4):
        args, dy = arguments(dtype), torch.randn(1, 1, 8, 6)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_recorded, "_ENABLED", False)
            expected = gradients(args, dy)
        assert same(gradients(args, dy), expected)
    if native.multiplies(torch.empty(0, dtype=dtype)):
        assert recorded()[f"{name}_backward"] == 1, recorded()


def test_weights_are_read_at_each_call():
    """However they were written: they are inputs like any other."""
    shape = SHAPES["products of samples"]
    module = made("DiCo", torch.float32, shape[1])
    args = given(shape, torch.float32, 0)
    before = [step(module, *args) for _ in range(4)][-1]
    for p in module.parameters():
        p.data.mul_(1.5)
    after = step(module, *args)
    assert not torch.equal(after[0], before[0])
    assert same(after, plain(module, *args))


def test_what_a_recording_depends_on_is_part_of_its_kind():
    shape, dtype = SHAPES["products of samples"], torch.float32
    module = made("DiCo", dtype, shape[1])

    def agrees(module=module, dtype=dtype):
        args = given(shape, dtype, 7)
        return all(same(step(module, *args), plain(module, *args)) for _ in range(4))

    assert agrees()
    # In float64 too: the library multiplies, so calls are recorded for every instruction set, and some have no FMA.
    wide = made("DiCo", torch.float64, shape[1])
    for other in native.isas():
        with native.isa(other):
            assert agrees()
            assert agrees(wide, torch.float64)
    with threads(1):
        assert agrees()
    with dk.backend("auto", products="library"):  # whose products are not recorded
        before_library = recorded()
        assert agrees()
        assert recorded() == before_library
    for products in ("library", "fused"):
        with dk.backend("auto", products=products):
            assert agrees()
    with dk.backend("reference"):
        assert agrees()
    taller = given((2, 24, 16, 4), dtype, 1)
    assert same(step(module, *taller), plain(module, *taller))


def test_gradients_in_another_memory_layout():
    shape, dtype = SHAPES["products of samples"], torch.float32
    module = made("DiCo", dtype, shape[1])
    for seed in range(4):
        x, c, dy = given(shape, dtype, seed)
        assert same(step(module, x, c, dy.contiguous()), plain(module, x, c, dy.contiguous()))
        broadcast = dy[:, :1, :1, :1].expand(shape)
        assert same(step(module, x, c, broadcast), plain(module, x, c, broadcast))


def test_who_looks_on_sees_the_kernels():
    shape = SHAPES["products of samples"]
    module = made("DiCo", torch.float32, shape[1])
    x, c, dy = given(shape, torch.float32, 0)
    for _ in range(4):
        step(module, x, c, dy)
    entries = {row.choice.entry for row in dk.explain(module, x, c)}
    assert {"pointwise", "depthwise_sums"} <= entries
    with torch.profiler.profile() as profiler:
        step(module, x, c, dy)
    names = {event.key for event in profiler.key_averages()}
    assert {"dico_kernels: recorded conv_half_backward", "dico_kernels: recorded ffn_half"} <= names


def test_large_calls_are_left_alone(monkeypatch):
    monkeypatch.setattr(_recorded, "_BETWEEN", 1000)
    shape = SHAPES["products of samples"]
    module, args = made("DiCo", torch.float32, shape[1]), given(shape, torch.float32, 0)
    for _ in range(4):
        assert same(step(module, *args), plain(module, *args))
    assert all("memory to hold" in str(v) for name, v in recorded().items() if "_half" in name)


def test_inference_is_recorded_whole_and_not_an_op_at_a_time():
    shape = SHAPES["products of samples"]
    module, (x, c, _) = made("DiCo", torch.float32, shape[1]), given(shape, torch.float32, 0)
    with torch.no_grad():
        for _ in range(4):
            module(x, c)
    assert set(recorded().values()) == {0}


def test_threads_do_not_share_memory():
    shape, dtype = SHAPES["products of samples"], torch.float32
    modules = [made("DiCo", dtype, shape[1]) for _ in range(3)]
    inputs = [given(shape, dtype, seed) for seed in range(3)]
    expected = [plain(m, *a) for m, a in zip(modules, inputs, strict=True)]
    wrong = []

    def work(i):
        for _ in range(20):
            if not same(step(modules[i], *inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_training_is_the_same_with_and_without():
    """Ten steps of a small network, whose optimiser writes the weights in place."""
    losses = []
    for enabled in (True, False):
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_recorded, "_ENABLED", enabled)
            blocks = nn.ModuleList(made("DiCo", torch.float32, 16) for _ in range(2))
            optimiser = torch.optim.AdamW(blocks.parameters(), 1e-2)
            x, c, target = given((2, 16, 8, 8), torch.float32, 0)
            for _ in range(10):
                y = x
                for b in blocks:
                    y = b(y, c)
                loss = (y - target).square().mean()
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()
                losses.append(float(loss))
    assert losses[:10] == losses[10:]
    assert losses[9] < losses[0]
