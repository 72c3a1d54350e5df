"""What stands between 1x1 convolutions, on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from support import rel_rms
from torch.nn import functional as F

from dico_kernels import native
from dico_kernels.dtypes import accumulation_dtype


def budget(dtype):
    """One rounding in the image's dtype; float32's GELU errs by at most 1.5e-7 of an erf."""
    return {torch.float64: 1e-12, torch.float32: 5e-7}.get(dtype, 1.5 * torch.finfo(dtype).eps / 2)


def per_channel(v):
    return v.double()[:, :, None, None]


@pytest.mark.parametrize("squares", [False, True])
def test_gelu(isa, shape, dtype, image, squares):
    x = image(shape, dtype)
    y, sums = native.gelu(x, squares)
    assert y.dtype == dtype
    assert rel_rms(y, F.gelu(x.double())) <= budget(dtype)
    assert (sums is not None) == squares
    if squares:
        assert sums.dtype == accumulation_dtype(dtype)
        assert rel_rms(sums, y.double().square().sum((2, 3))) <= (1e-13 if dtype == torch.float64 else 3e-7)


def test_gelu_and_slope_of_every_bfloat16(isa):
    """Rounded like the exact values but for a hundredth, where these lie within 2^-12 of halfway; 1e-8 past -6."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[(x.abs() < 100) & (x.abs() > 1e-30)]
    exact = x.double().requires_grad_()
    F.gelu(exact).sum().backward()
    pixels = x.reshape(1, 1, -1, 1)
    y, slope = native.gelu(pixels, False)[0], native.gelu_backward(torch.ones_like(pixels), pixels)[0]
    for ours, truth, far in ((y, F.gelu(exact.detach()), 1e-8), (slope, exact.grad, 5e-8)):
        error = (ours.flatten().double() - truth).abs()
        assert (error <= (0.5 + 1 / 8) * 2**-7 * truth.abs() + far).all()
        assert float((ours.flatten() != truth.bfloat16())[x > -5].double().mean()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_at_the_ends(isa, dtype):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), -1e30, 1e30, 0.0], dtype=dtype).reshape(1, 1, -1, 1)
    y = native.gelu(x, False)[0].flatten()
    torch.testing.assert_close(
        y, torch.tensor([float("inf"), 0, float("nan"), 0, 1e30, 0], dtype=dtype), equal_nan=True
    )
    slope = native.gelu_backward(torch.ones_like(x), x)[0].flatten()
    wanted = torch.tensor([1, 0, float("nan"), 0, 1, 0.5], dtype=dtype)
    torch.testing.assert_close(slope, wanted, equal_nan=True, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("affine", "keep", "overwrite"),
    [(False, False, False), (True, False, True), (False, True, True), (True, True, False)],
)
def test_gelu_backward(isa, shape, dtype, image, vector, keep, affine, overwrite):
    x, dy = image(shape, dtype), image(shape, dtype)
    acc = accumulation_dtype(dtype)
    s, r = (vector(*shape[:2], acc) for _ in range(2)) if affine else (None, None)
    leaf = x.double().requires_grad_()
    out = F.gelu(leaf)
    given = dy.double() if not affine else dy.double() * per_channel(s) + out.detach() * per_channel(r)
    out.backward(given)
    dx, y, sums = native.gelu_backward(dy, x, s, r, keep, overwrite)
    assert (dx.data_ptr() == dy.data_ptr()) == overwrite
    assert rel_rms(dx, leaf.grad) <= 2 * budget(dtype)
    exact = leaf.grad.sum((2, 3))
    scale = leaf.grad.abs().sum((2, 3)).norm()
    assert (sums - exact).norm() <= (1e-12 if dtype == torch.float64 else 1e-6) * scale
    assert (y is not None) == keep
    if keep:
        assert rel_rms(y, out.detach()) <= budget(dtype)


def test_the_same_bits_on_any_number_of_threads(isa, image, same_bits):
    x, dy = image((2, 136, 11, 13), torch.float32), image((2, 136, 11, 13), torch.float32)
    same_bits(lambda: [*native.gelu(x, True), *native.gelu_backward(dy, x, keep=True)])


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_stream_beside_narrow_branches(isa, shape, image, vector, narrow):
    """adaLN, the gated residual and their backward passes: only what is stored narrow is rounded to it."""
    n, c = shape[:2]
    x, dy = image(shape, torch.float32), image(shape, torch.float32)
    branch, dh = image(shape, narrow), image(shape, narrow)
    shift, scale, gate = (vector(n, c, narrow) for _ in range(3))
    rounding, exact = torch.finfo(narrow).eps / 2, 3e-7 if c > 1 else 1e-3

    y = native.gated_residual(x, branch, gate)
    assert y.dtype == torch.float32
    assert rel_rms(y, x.double() + per_channel(gate) * branch.double()) <= exact
    dbranch, low, sums, gated = native.gate_gradient(dy, gate)
    assert dbranch.dtype == low.dtype == narrow
    assert rel_rms(dbranch, per_channel(gate) * dy.double()) <= rounding
    assert torch.equal(low, dy.to(narrow))
    assert (sums - dy.double().sum((2, 3))).norm() <= 1e-6 * dy.abs().sum((2, 3)).norm()
    assert torch.equal(gated, sums * gate.float())

    leaf = x.double().requires_grad_()
    rows = leaf.permute(0, 2, 3, 1)
    h = F.layer_norm(rows, (c,), eps=1e-6).permute(0, 3, 1, 2) * (1 + per_channel(scale)) + per_channel(shift)
    out, mean, rstd = native.adaln_modulate(x, shift, scale)
    assert out.dtype == narrow
    assert rel_rms(out, h.detach()) <= 1.1 * rounding + (0 if c > 1 else 1e-2)
    h.backward(dh.double())
    dx, again, _, _ = native.adaln_modulate_backward_residual(dh.clone(), dy, x, shift, scale, mean, rstd)
    assert dx.dtype == torch.float32
    assert torch.equal(again, out) or rel_rms(again, out) <= rounding
    if c > 1:
        assert rel_rms(dx, leaf.grad + dy.double()) <= 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: native.gelu_backward(x, x, torch.ones(2, 3)), "s and r belong together"),
        (lambda x: native.gelu_backward(x, x, torch.ones(2, 4), torch.ones(2, 3)), r"s has shape \(2, 4\)"),
        (lambda x: native.gated_residual(x.double(), x, torch.ones(2, 3)), "expected the same, or float32"),
        (lambda x: native.gate_gradient(x, torch.ones(3, 3)), r"gate has shape \(3, 3\)"),
    ],
)
def test_what_would_break_memory_is_refused(call, message):
    x = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=message):
        call(x)
