"""The 1x1 convolution of cat[PixelShuffle(2)(up), skip] and its gradients, against float64 autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import added_up

from dico_kernels.kernels import pixel_shuffle as kernels
from dico_kernels.reference import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# batch, C, S, K, H, W: one pixel; more than one tile of nothing; more channels than a step of the sums
SHAPES = [(1, 1, 1, 1, 1, 1), (2, 5, 3, 7, 3, 2), (1, 17, 37, 33, 1, 5)]


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def arguments(shape, dtype, random):
    n, c, s, k, h, w = shape
    up, skip = random((n, 4 * c, h, w), dtype), random((n, s, 2 * h, 2 * w), dtype)
    weight, bias = random((k, c + s, 1, 1), dtype).contiguous(), random((k,), dtype)
    return (up, skip, weight, bias), random((n, k, 2 * h, 2 * w), dtype)


def run(up, skip, weight, bias, dy):
    y = kernels.pixel_shuffle_skip(up, skip, weight, bias)
    dup, dskip, dweight, dbias = kernels.pixel_shuffle_skip_backward(dy, up, skip, weight)
    return y, dup, dskip, added_up(dweight).reshape(weight.shape), added_up(dbias).sum(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, random, agree, is_image):
    inputs, dy = arguments(shape, dtype, random)
    y, dup, dskip, dweight, dbias = run(*inputs, dy)
    assert all(is_image(v, dtype) for v in (y, dup, dskip))
    assert dweight.dtype == dbias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    agree((y, dup, dskip, dweight, dbias), F.pixel_shuffle_skip, inputs, (dy,))


def test_without_bias(random, agree):
    (up, skip, weight, _), _ = arguments((1, 3, 2, 5, 2, 3), torch.float32, random)
    y = kernels.pixel_shuffle_skip(up, skip, weight, None)
    agree((y,), lambda *v: F.pixel_shuffle_skip(*v, None), (up, skip, weight))


def test_half_precision(random, agree):
    inputs, dy = arguments((1, 3, 2, 5, 1, 2), torch.float16, random)
    agree(run(*inputs, dy), F.pixel_shuffle_skip, inputs, (dy,))


def test_seams_between_tiles(random, agree, monkeypatch):
    """Tiles of 16 and chunks of 32 rows: several programs along every dimension, across images and rows of pixels."""
    rule = kernels.gemm_tile
    monkeypatch.setattr(kernels, "gemm_tile", lambda *args: dataclasses.replace(rule(*args), m=16, n=16, k=16))
    monkeypatch.setattr(kernels, "weight_grad_chunk", lambda m: 32)
    inputs, dy = arguments((2, 18, 17, 19, 2, 5), torch.float32, random)
    agree(run(*inputs, dy), F.pixel_shuffle_skip, inputs, (dy,))


def test_same_bits_every_time(random, repeats):
    inputs, dy = arguments((2, 5, 3, 7, 3, 2), torch.float32, random)
    repeats(lambda: run(*inputs, dy))
