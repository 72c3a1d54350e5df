"""What may happen between an op's forward and backward passes: saved tensors sent away, autocast around one of them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from ops_cases import BRANCHES, CASES, outputs_and_gradients, tuple_of
from support import rel_rms

import dico_kernels as dk

SHAPES = {"few pixels": (2, 6, 3, 4), "per-sample products": (2, 6, 8, 9)}


def passes(case, arguments, forward=contextlib.nullcontext, backward=contextlib.nullcontext):
    """Every gradient, each pass within a context of its own."""
    leaves = [a.detach().requires_grad_() for a in arguments]
    with forward():
        outs = tuple_of(case.op(*leaves))
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    with backward():
        torch.autograd.backward(outs, gradients)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_saved_tensors_come_back_in_another_layout(case, backend, device, shape):
    """In the default one, as torch.autograd.graph.save_on_cpu(pin_memory=True) brings them."""

    def default_layout(t):
        return torch.empty(t.size(), dtype=t.dtype, device=t.device).copy_(t)

    arguments = [a.to(device) for a in case.arguments(shape)]
    expected = outputs_and_gradients(case.op, arguments)[-len(arguments) :]
    away = lambda: torch.autograd.graph.saved_tensors_hooks(default_layout, lambda t: t)  # noqa: E731
    for found, wanted in zip(passes(case, arguments, forward=away), expected, strict=True):
        assert rel_rms(found, wanted) < 1e-12


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backward_within_autocast(case, backend, device, shape):
    """Eager's backward of a convolution computes in its tensors' dtype there, and so does ours."""
    arguments = [a.float().to(device) for a in case.arguments(shape)]
    lowered = lambda: torch.autocast(device, torch.bfloat16)  # noqa: E731
    expected = passes(case, arguments)
    for found, wanted in zip(passes(case, arguments, backward=lowered), expected, strict=True):
        assert found.dtype == torch.float32
        assert rel_rms(found, wanted) < 1e-6


@pytest.mark.parametrize("name", BRANCHES[1:])
def test_biases_that_backward_does_not_read_may_change(name):
    case = CASES[name]
    arguments = [a.detach().requires_grad_() for a in case.arguments((1, 6, 3, 4))]
    bias = arguments[{"ffn_half": 5, "fcdm_block": 7}[name]]
    expected = outputs_and_gradients(case.op, arguments)[1:]
    out = case.op(*arguments)
    with torch.no_grad():
        bias.add_(1)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out))
    for leaf, wanted in zip(arguments, expected, strict=True):
        assert rel_rms(leaf.grad, wanted) < 1e-12
    out = case.op(*arguments, recompute=True)
    with torch.no_grad():
        bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", BRANCHES[1:])
def test_what_was_measured_holds_whatever_is_recomputed(name, monkeypatch):
    """Without gradients there is nothing to recompute: dk.tune's choice for such a call is found with and without."""
    from dico_kernels.ops import _tuning

    case, cases = CASES[name], []
    monkeypatch.setattr(_tuning, "chosen", lambda case, images: cases.append(case))
    monkeypatch.setitem(_tuning._STATE.table, "some", {})
    with dk.backend("auto"), torch.no_grad():
        for recompute in (False, True):
            monkeypatch.setattr(_tuning._STATE, "found", {})
            case.op(*case.arguments((1, 6, 3, 4)), recompute=recompute)
    assert len(cases) == 2
    assert cases[0] == cases[1]
