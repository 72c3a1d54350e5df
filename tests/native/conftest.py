"""What the tests of every native kernel share: instruction sets, poisoned memory, and the comparison with the truth."""

from __future__ import annotations

import pytest
import torch
from support import threads

from dico_kernels import native
from dico_kernels.dtypes import accumulation_dtype

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# batch, channels, height, width: one pixel, odd everything, wider than a vector by one, several blocks of rows and
# channels, a DiCo-XL row
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 7), (3, 17, 4, 4), (1, 33, 1, 9), (2, 136, 11, 13), (1, 416, 3, 5)]

# torch lists its constructors when a device is first used as a context: before some of them are poisoned below.
with torch.device("cpu"):
    torch.empty(0)


def pytest_generate_tests(metafunc):
    for name, values in (("dtype", DTYPES), ("shape", SHAPES)):
        marks = [m.args[0] for m in metafunc.definition.iter_markers("parametrize")]
        if name in metafunc.fixturenames and not any(name in names for names in marks):
            metafunc.parametrize(name, values, ids=str)


@pytest.fixture(params=native.isas())
def isa(request):
    with native.isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _however_little_to_do():
    """Threads share what is as small as a test's images, too."""
    with native.grain(0):
        yield


@pytest.fixture(autouse=True)
def _poisoned_allocation(monkeypatch):
    """What a kernel forgets to write shows as NaN, and so does scratch that it reads before it wrote."""

    def poisoned(allocate):
        def fill(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(0xFF)

        return fill

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def image():
    """image(shape, dtype): a random image in channels_last memory."""

    def make(shape, dtype, mean=0.0):
        return (torch.randn(shape, dtype=torch.float64) + mean).to(dtype).contiguous(memory_format=torch.channels_last)

    return make


@pytest.fixture
def vector():
    """vector(n, c, dtype): a random conditioning vector."""
    return lambda n, c, dtype: torch.randn(n, c, dtype=torch.float64).to(dtype)


def _evaluate(op, inputs, grads, dtype):
    """The op's outputs and the gradients of its inputs, with everything in one dtype.

    By one thread: PyTorch waits for all of them at each group of a depthwise convolution, seconds in all where others
    use the cores.
    """
    leaves = [None if v is None else v.detach().to(dtype).requires_grad_() for v in inputs]
    with threads(1):
        outs = op(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        present = [v for v in leaves if v is not None]
        grads = torch.autograd.grad(outs, present, [g.to(dtype) for g in grads])
    return [v.detach() for v in (*outs, *grads)]


@pytest.fixture
def check():
    """check(results, op, inputs, grads): outputs and gradients against float64 autograd of the reference.

    Each may have twice the error that the reference has when it runs in the inputs' dtype, plus one rounding; float64
    may be a few roundings off. ``floor`` is an absolute error per element that less than double precision has by
    definition, such as that of its erf; ``summed`` the number of pixels that a weight's gradient sums over,
    by its index: n additions may have n**0.5 roundings, of which eager's make more or fewer by the processor.
    """

    def compare(results, op, inputs, grads, floor=0.0, summed=None):
        dtype = inputs[0].dtype
        truth = _evaluate(op, inputs, grads, torch.float64)
        eager = truth if dtype == torch.float64 else _evaluate(op, inputs, grads, dtype)
        assert len(results) == len(truth)
        for i, (result, exact, rough) in enumerate(zip(results, truth, eager, strict=True)):
            band, least = (1e-13, 0.0) if dtype == torch.float64 else (torch.finfo(dtype).eps / 2, floor)
            band += (summed or {}).get(i, 0) ** 0.5 * torch.finfo(accumulation_dtype(dtype)).eps / 2
            assert result.shape == exact.shape, i
            size, error, allowed = float(exact.norm()), float((result - exact).norm()), float((rough - exact).norm())
            assert error <= 2 * allowed + band * size + least * max(size, exact.numel() ** 0.5), (i, error, allowed)

    return compare


@pytest.fixture
def same_bits():
    """same_bits(f): f's tensors are bitwise equal over repeats and on one, two and three threads."""

    def run(f):
        outs = []
        for count in (1, 2, 3, 2):
            with threads(count):
                outs.append([t.clone() for t in f()])
        for other in outs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True))

    return run
