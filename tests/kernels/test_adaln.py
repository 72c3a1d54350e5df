"""adaLN and the gated residual, forward and backward, against float64 autograd of the reference."""

from __future__ import annotations

import pytest
import torch
from support import added_up

from dico_kernels.kernels import adaln
from dico_kernels.reference import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# one pixel; odd everything; more rows than a program takes; wider than a power of two by one
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 7), (3, 3, 9, 11), (1, 33, 1, 9)]


def run_adaln(x, shift, scale, dy, eps=1e-6):
    y, mean, rstd = adaln.adaln_modulate(x, shift, scale, eps)
    dx, *sums = adaln.adaln_modulate_backward(dy, x, scale, mean, rstd)
    return y, dx, *map(added_up, sums)


def run_seam(x, branch, gate, shift, scale, dy, dh, eps=1e-6):
    y, h, mean, rstd = adaln.gated_residual_adaln(x, branch, gate, shift, scale, eps)
    dx, dbranch, *sums = adaln.gated_residual_adaln_backward(dy, dh, y, branch, gate, scale, mean, rstd)
    return y, h, dx, dbranch, *map(added_up, sums)


def cancelled(channels):
    """LayerNorm of one channel: all but roundings cancels, float32's that a GPU's fused multiply-add leaves, which
    1 / sqrt(eps) multiplies.
    """
    return 1e3 * torch.finfo(torch.float32).eps / 2 if channels == 1 else 0.0


def total(gradient):
    """A broadcast vector's gradient from the per-sample one."""
    return gradient.sum(0, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstFloat64:
    def test_adaln(self, shape, dtype, random, agree, is_image):
        n, c = shape[:2]
        x, dy = random(shape, dtype), random(shape, dtype)
        shift, scale = random((n, c), dtype), random((n, c), dtype)
        y, dx, dshift, dscale = run_adaln(x, shift, scale, dy)
        assert is_image(y, dtype)
        assert is_image(dx, dtype)
        assert dshift.dtype == dscale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        agree((y, dx, dshift, dscale), F.adaln_modulate, (x, shift, scale), (dy,), slack=cancelled(c))

    def test_gated_residual(self, shape, dtype, random, agree, is_image):
        x, branch, dy = (random(shape, dtype) for _ in range(3))
        gate = random(shape[:2], dtype)
        y = adaln.gated_residual(x, branch, gate)
        dbranch, dgate = adaln.gated_residual_backward(dy, branch, gate)
        assert is_image(y, dtype)
        assert is_image(dbranch, dtype)
        agree((y, dy, dbranch, added_up(dgate)), F.gated_residual, (x, branch, gate), (dy,))

    def test_seam(self, shape, dtype, random, agree, is_image):
        x, branch, dy, dh = (random(shape, dtype) for _ in range(4))
        gate, shift, scale = (random(shape[:2], dtype) for _ in range(3))
        y, h, dx, dbranch, dgate, dshift, dscale = run_seam(x, branch, gate, shift, scale, dy, dh)
        assert all(is_image(v, dtype) for v in (y, h, dx, dbranch))
        order = (x, branch, gate, shift, scale)
        results = y, h, dx, dbranch, dgate, dshift, dscale
        agree(results, F.gated_residual_adaln, order, (dy, dh), slack=cancelled(shape[1]))


@pytest.mark.parametrize("broadcast", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)], ids=str)
def test_broadcast_conditioning(broadcast, random, agree):
    """One vector for all samples; its gradients still come a sample each, for the caller to add up."""
    shape = (3, 5, 2, 3)
    x, branch, dy, dh = (random(shape, torch.float32) for _ in range(4))
    vectors = [random((1 if one else 3, 5), torch.float32) for one in broadcast]
    y, h, dx, dbranch, *reduced = run_seam(x, branch, *vectors, dy, dh)
    assert all(v.shape == (3, 5) for v in reduced)
    reduced = [total(v) if one else v for v, one in zip(reduced, broadcast, strict=True)]
    agree((y, h, dx, dbranch, *reduced), F.gated_residual_adaln, (x, branch, *vectors), (dy, dh))

    gate, shift, scale = vectors
    y, dx, dshift, dscale = run_adaln(x, shift, scale, dy)
    dshift, dscale = total(dshift) if broadcast[1] else dshift, total(dscale) if broadcast[2] else dscale
    agree((y, dx, dshift, dscale), F.adaln_modulate, (x, shift, scale), (dy,))
    dbranch, dgate = adaln.gated_residual_backward(dy, branch, gate)
    dgate = total(added_up(dgate)) if broadcast[0] else added_up(dgate)
    y = adaln.gated_residual(x, branch, gate)
    agree((y, dy, dbranch, dgate), F.gated_residual, (x, branch, gate), (dy,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [3.0, 30.0, 1000.0])
def test_a_mean_far_above_the_deviation(dtype, mean, random, agree):
    x = random((2, 48, 3, 3), dtype, mean=mean)
    shift, scale, dy = random((2, 48), dtype), random((2, 48), dtype), random((2, 48, 3, 3), dtype)
    agree(run_adaln(x, shift, scale, dy), F.adaln_modulate, (x, shift, scale), (dy,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_eps(eps, dtype, random, agree):
    """At a variance of eps's own size a wrong or a rounded eps shows, in float64 too."""
    x, dy = random((1, 32, 2, 2), dtype) * 1e-3, random((1, 32, 2, 2), dtype)
    shift, scale = random((1, 32), dtype), random((1, 32), dtype)
    results = run_adaln(x, shift, scale, dy, eps)
    agree(results, lambda *v: F.adaln_modulate(*v, eps), (x, shift, scale), (dy,))
    seam = adaln.gated_residual_adaln(x, torch.zeros_like(x), shift, shift, scale, eps)
    assert torch.equal(seam[1], results[0])


def test_half_precision(random, agree):
    shape, dtype = (1, 5, 2, 2), torch.float16
    x, branch, dy, dh = (random(shape, dtype) for _ in range(4))
    gate, shift, scale = (random((1, 5), dtype) for _ in range(3))
    results = run_seam(x, branch, gate, shift, scale, dy, dh)
    agree(results, F.gated_residual_adaln, (x, branch, gate, shift, scale), (dy, dh))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_gradient(shape, dtype, random, is_image):
    """Under autocast, where the gradient is wider than the gate, too; both sums are of what was not rounded."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dy, gate = random(shape, wide), random(shape[:2], dtype)
    dbranch, narrow, sums, gated = adaln.gate_gradient(dy, gate)
    assert is_image(dbranch, dtype)
    assert narrow is dy if dtype == wide else torch.equal(narrow, dy.to(dtype))
    product = dy.double() * gate.double()[:, :, None, None]
    half_an_ulp = torch.finfo(dtype).eps / 2
    assert ((dbranch - product).abs() <= half_an_ulp * product.abs() * (1 + 1e-4)).all()  # rounded twice
    for found, terms in ((sums, dy.double()), (gated, product)):
        error = (added_up(found) - terms.sum((2, 3))).abs()
        assert (error <= 8 * torch.finfo(wide).eps * terms.abs().sum((2, 3))).all()


def test_statistics_are_those_of_the_rounded_sum(random):
    """h depends on y as stored: normalising y again gives the same bits."""
    shape = (2, 24, 2, 3)
    x, branch = random(shape, torch.bfloat16), random(shape, torch.bfloat16)
    gate, shift, scale = (random((2, 24), torch.bfloat16) for _ in range(3))
    y, h, mean, rstd = adaln.gated_residual_adaln(x, branch, gate, shift, scale, 1e-6)
    assert mean.shape == rstd.shape == (2, 2, 3)
    again = adaln.adaln_modulate(y, shift, scale, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip((h, mean, rstd), again, strict=True))
    assert torch.equal(y, adaln.gated_residual(x, branch, gate))


def test_same_bits_every_time_and_in_any_batch(random, repeats):
    shape = (3, 7, 9, 9)
    x, branch, dy, dh = (random(shape, torch.float32) for _ in range(4))
    gate, shift, scale = (random((3, 7), torch.float32) for _ in range(3))
    arguments = (x, branch, gate, shift, scale, dy, dh)
    repeats(lambda: run_seam(*arguments))
    last = run_seam(*(v[2:] for v in arguments))
    assert all(torch.equal(a[2:], b) for a, b in zip(run_seam(*arguments), last, strict=True))
