"""Shared by the kernel tests: devices, poisoned memory, and the comparison with float64 autograd of the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poisoned_allocation(monkeypatch):
    """What a kernel forgets to write shows as NaN."""

    def poison(allocate):
        def poisoned(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and out.device.type != "meta" else out

        return poisoned

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture
def random(device) -> Callable[..., Tensor]:
    """random(shape, dtype): normal values; images (4-d) with channels_last memory."""

    def make(shape: Sequence[int], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
        x = (torch.randn(shape, dtype=torch.float64) + mean).to(dtype).to(device)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    return make


def evaluate(op, inputs, cotangents, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of op and the gradients of every input, computed in dtype on the CPU."""
    leaves = [v.detach().cpu().to(dtype).requires_grad_() for v in inputs]
    outputs = op(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not cotangents:
        return [v.detach() for v in outputs]
    gradients = torch.autograd.grad(outputs, leaves, [d.detach().cpu().to(dtype) for d in cotangents])
    return [v.detach() for v in (*outputs, *gradients)]


@pytest.fixture
def agree() -> Callable[..., None]:
    """agree(actual, op, inputs, cotangents): outputs, then input gradients, within the error budget.

    At most twice the error of the reference run purely in this dtype, plus one rounding. `slack` is an absolute error
    that the kernels are allowed on top, as a share of the first output's norm (A&S erf near a zero of GELU).
    """

    def check(actual, op, inputs, cotangents=(), slack: float = 0.0) -> None:
        dtype = inputs[0].dtype
        truth = evaluate(op, inputs, cotangents, torch.float64)
        eager = evaluate(op, inputs, cotangents, dtype)
        actual = [a.detach().cpu() for a in actual]
        assert len(actual) == len(truth)
        for i, (a, t, e) in enumerate(zip(actual, truth, eager, strict=True)):
            assert a.shape == t.shape, f"result {i}"
            error = (a.double() - t).norm()
            if dtype == torch.float64:
                budget = 1e-13 * max(t.norm(), 1)
            else:
                budget = 2 * (e.double() - t).norm() + torch.finfo(dtype).eps / 2 * t.norm() + slack
            # `not >` would let NaN pass
            assert error <= budget, f"result {i} of {len(truth)}: error {error:.3g}, budget {budget:.3g}"

    return check


@pytest.fixture
def repeats() -> Callable[..., None]:
    """repeats(call): the same bits twice."""

    def check(call) -> None:
        first, second = call(), call()
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    return check


@pytest.fixture
def is_image() -> Callable[[Tensor, torch.dtype], bool]:
    return lambda x, dtype: x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last)
