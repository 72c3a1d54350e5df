"""Depthwise convolution, with and without GELU, forward and backward, against float64 autograd of the reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import added_up

from dico_kernels.kernels import depthwise as kernels
from dico_kernels.reference import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# one pixel, so every tap but one is padding; narrower than 7 taps; more channels than a tile, one row
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 4), (1, 33, 1, 9)]


def reference(gelu):
    def op(x, weight, bias=None):
        z = F.depthwise(x, weight, bias)
        return F.gelu(z) if gelu else z

    return op


def run(x, weight, bias, dy, gelu):
    """Output, dx, dweight, and dbias where there is a bias, as autograd would order them."""
    y = kernels.depthwise(x, weight, bias, gelu)
    dx, *sums = kernels.depthwise_backward(dy, x, weight, bias, gelu)
    dweight, dbias = map(added_up, sums)
    dweight, dbias = dweight.reshape(weight.shape), dbias[0]
    return (y, dx, dweight) if bias is None else (y, dx, dweight, dbias)


def compare(shape, k, dtype, gelu, random, agree, with_bias=True):
    x, dy = random(shape, dtype), random(shape, dtype)
    weight = random((shape[1], 1, k, k), dtype).contiguous()
    inputs = (x, weight, random((shape[1],), dtype)) if with_bias else (x, weight)
    results = run(x, weight, inputs[2] if with_bias else None, dy, gelu)
    # A&S 7.1.26 is good to 7.5e-8 of z absolutely. Over many pixels that is below eager's own error, but at one
    # GELU(z) may be nearly zero, where it is many roundings.
    single = gelu and dtype == torch.float32 and shape[2] * shape[3] == 1
    slack = 3e-7 * float((x.abs() * weight.abs().amax()).sum()) if single else 0.0
    agree(results, reference(gelu), inputs, (dy,), slack=slack)
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, k, gelu, dtype, random, agree, is_image):
    y, dx, dweight, dbias = compare(shape, k, dtype, gelu, random, agree)
    assert is_image(y, dtype)
    assert is_image(dx, dtype)
    assert dweight.dtype == dbias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("k", [1, 5, 9])
def test_other_sizes(k, random, agree):
    compare((1, 3, 4, 5), k, torch.float32, False, random, agree)


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
def test_without_bias(gelu, random, agree):
    compare((2, 3, 4, 3), 3, torch.float32, gelu, random, agree, with_bias=False)
    x, dy = random((2, 3, 4, 3), torch.float32), random((2, 3, 4, 3), torch.float32)
    weight = random((3, 1, 3, 3), torch.float32).contiguous()
    with_zero = kernels.depthwise_backward(dy, x, weight, torch.zeros_like(weight[:, 0, 0, 0]), gelu)
    assert all(map(torch.equal, kernels.depthwise_backward(dy, x, weight, None, gelu), with_zero))


def test_half_precision(random, agree):
    compare((1, 3, 2, 3), 3, torch.float16, True, random, agree)


@pytest.mark.parametrize("k", [3, 5])
def test_seams_between_tiles(k, random, agree, monkeypatch):
    """Blocks of 2 rows, 4 columns and 2 channels: every halo crosses into another program."""
    for name in ("depthwise_tile", "depthwise_backward_tile"):
        rule = getattr(kernels, name)

        def small(*args, rule=rule):
            return dataclasses.replace(rule(*args), height=2, width=4, channels=2)

        monkeypatch.setattr(kernels, name, small)
    compare((1, 3, 5, 6), k, torch.float32, True, random, agree)


@pytest.mark.parametrize("k", [3, 7])
def test_height_does_not_change_the_bits(k, random, monkeypatch):
    """It follows the batch, and a sample's result must not."""
    rule = kernels.depthwise_tile
    x = random((2, 3, 9, 5), torch.float32)
    weight, bias = random((3, 1, k, k), torch.float32).contiguous(), random((3,), torch.float32)
    results = []
    for height in (2, 4, 32):
        monkeypatch.setattr(
            kernels, "depthwise_tile", lambda *args, height=height: dataclasses.replace(rule(*args), height=height)
        )
        results.append(kernels.depthwise(x, weight, bias, True))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[2])


@pytest.mark.parametrize("k", [3, 5])
def test_same_bits_every_time(k, random, repeats):
    x, dy = random((2, 3, 4, 5), torch.float32), random((2, 3, 4, 5), torch.float32)
    weight, bias = random((3, 1, k, k), torch.float32).contiguous(), random((3,), torch.float32)
    repeats(lambda: run(x, weight, bias, dy, True))
