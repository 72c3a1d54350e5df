"""Calls of every launcher, on images without data: what ``aot`` compiles the kernels of.

Imports Triton; nobody needs it who does not compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.kernels import adaln, block, channel, depthwise, gemm, grn, pixel_shuffle, pointwise, sums, vectors

Calls = Iterator[partial[Any]]


def _makers(dtype: torch.dtype, n: int, size: int) -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """What makes a tensor of some shape, and n channels_last images of so many channels."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def image(channels: int) -> torch.Tensor:
        return tensor(n, channels, size, size).contiguous(memory_format=torch.channels_last)

    return tensor, image


def every_launcher(dtype: torch.dtype, n: int, c: int, size: int) -> Calls:
    """A call of each launcher at width c on n images of size x size."""
    acc = accumulation_dtype(dtype)
    tensor, _ = _makers(dtype, n, size)

    def image(channels: int, side: int) -> torch.Tensor:
        return tensor(n, channels, side, side)

    x, v, vector = image(c, size), tensor(n, c), tensor(n, c, dtype=acc)
    stat = tensor(n, size, size, dtype=acc)
    yield partial(adaln.adaln_modulate, x, v, v, 1e-6)
    yield partial(adaln.adaln_modulate_backward, x, x, v, stat, stat)
    yield partial(adaln.adaln_modulate_backward_residual, x, x, x, v, v, stat, stat)
    yield partial(adaln.gate_gradient, x, v)
    yield partial(adaln.gated_residual, x, x, v)
    yield partial(adaln.gated_residual_backward, x, x, v)
    yield partial(adaln.gated_residual_adaln, x, x, v, v, v, 1e-6)
    yield partial(adaln.gated_residual_adaln_backward, x, x, x, x, v, v, stat, stat)
    yield partial(channel.channel_sums, x)
    yield partial(channel.channel_dots, x, x)
    yield partial(channel.channel_affine, x, vector)
    yield partial(channel.channel_affine, x, vector, vector, x, vector)
    # few images, for which these are
    for few in (1, min(n, 64)):
        yield partial(vectors.channel_attention, tensor(few, c, dtype=acc), size * size, tensor(c, c), tensor(c))
        heads = [tensor(6 * c, c)] * 9, [tensor(6 * c)] * 9
        yield partial(vectors.conditioning, tensor(few, c), *heads)
    parts = tensor(n, 16, c, dtype=acc)
    yield partial(vectors.channel_attention_backward, parts, vector, vector, size * size, tensor(c, c))
    yield partial(grn.grn_scale, parts, tensor(c), 1e-6)
    yield partial(grn.grn_rescale, vector, tensor(c), 1e-6)
    yield partial(grn.grn_scale_backward, parts, vector, tensor(c), 1e-6)
    # what the backward of a feed-forward half, of a convolution half, and of FCDM's block add up
    for count in (5, 8, 9):
        yield partial(sums.add_up, [parts] * count, dtype)
    yield partial(pointwise.gelu, x, False)
    yield partial(pointwise.gelu, x, True)
    yield partial(pointwise.gelu_backward, x, x, keep=True)
    yield partial(pointwise.gelu_backward, x, x, vector, vector)
    # the models use 3 and 7; the tiles of the others depend on the width no more than theirs do
    for k in (1, 3, 5, 7, 9) if c == 416 else (3, 7):
        taps, bias = tensor(c, 1, k, k), tensor(c)
        for gelu in (False, True):
            yield partial(depthwise.depthwise, x, taps, bias, gelu)
            yield partial(depthwise.depthwise_backward, x, x, taps, bias, gelu)
    up, skip, out = image(4 * c, size), image(c, 2 * size), image(c, 2 * size)
    weight, bias = tensor(c, 2 * c, 1, 1), tensor(c)
    yield partial(pixel_shuffle.pixel_shuffle_skip, up, skip, weight, bias)
    yield partial(pixel_shuffle.pixel_shuffle_skip_backward, out, up, skip, weight)


def products(dtype: torch.dtype, n: int, c: int, size: int) -> Calls:
    """The 1x1 convolutions of DiCo's and FCDM's blocks at width c."""
    acc = accumulation_dtype(dtype)
    tensor, image = _makers(dtype, n, size)
    x, vector, weight, bias = image(c), tensor(n, c), tensor(c, c, 1, 1), tensor(c)
    pixels = tensor(n, size, size, dtype=acc)
    product = partial(gemm.pointwise, x, weight)
    branch = partial(product, bias, gate=vector, residual=x)
    partials = gemm.Partials(tensor(-(-c // 128), 2, n * size * size, dtype=acc), 128)
    adaln = {"modulation": gemm.Modulation(vector, tensor(n, c, dtype=acc), tensor(n, c, dtype=acc))}
    rows = gemm.Statistics(pixels, pixels)
    yield partial(product, **adaln, statistics=partials)
    s = tensor(n, c, dtype=acc)
    yield partial(branch, scale=s, partials=True)
    yield partial(branch, scale=s)
    if dtype != torch.bfloat16 or size * size % 64 != 0:
        return
    yield branch
    yield partial(product, **adaln, statistics=partials, gelu=True, keep=True)
    yield partial(product, **adaln, statistics=rows, gelu=True, channel="squares")
    if size * size % 128 != 0:
        return
    yield partial(gemm.row_statistics, x, 1e-6)
    yield partial(gemm.modulation_terms, weight, bias, vector, vector)
    yield partial(product, **adaln, statistics=rows)
    yield partial(product, **adaln, statistics=partials, gelu=True)
    yield partial(branch, partials=True)
    # with adaLN by itself
    for keep in (False, True):
        yield partial(pointwise.pointwise, x, weight, bias, gelu=True, keep=keep)
        yield partial(pointwise.pointwise, x, weight, bias, gelu=True, keep=keep, squares=True)
    yield partial(pointwise.pointwise, x, weight, bias, gate=vector, residual=x)
    yield partial(pointwise.pointwise, x, weight, bias, s=s, gate=vector, residual=x)
    yield partial(pointwise.pointwise, x, weight, bias, s=s, plus=bias, gate=vector, residual=x)


def branches(dtype: torch.dtype, n: int, c: int, size: int) -> Calls:
    """Whole branches of DiCo's block at width c, as products="fused" has them, and the products of "mixed"."""

    tensor, image = _makers(dtype, n, size)
    x, v, bias, taps = image(c), tensor(n, c), tensor(c), tensor(c, 1, 3, 3)
    square, wide, narrow = tensor(c, c, 1, 1), tensor(2 * c, c, 1, 1), tensor(c, 2 * c, 1, 1)
    convolutions = (square, bias, taps, bias, square, bias, square, bias)
    yield partial(block.conv_half_forward, x, v, v, v, *convolutions)
    for keep in (False, True):
        yield partial(block.ffn_half_forward, x, v, v, v, wide, tensor(2 * c), narrow, bias, keep=keep)
        yield partial(pointwise.pointwise, x, wide, tensor(2 * c), gelu=True, keep=keep)
    s = tensor(n, c, dtype=accumulation_dtype(dtype))
    yield partial(pointwise.pointwise, x, square, bias, s=s, gate=v, residual=x)
    yield partial(pointwise.pointwise, image(2 * c), narrow, bias, gate=v, residual=x)


def fcdm_branch(dtype: torch.dtype, n: int, c: int, size: int) -> Calls:
    """Likewise of FCDM's block."""

    tensor, image = _makers(dtype, n, size)
    k = 3 * c
    x, v, bias, hidden = image(c), tensor(n, c), tensor(c), tensor(k)
    wide, narrow, affine = tensor(k, c, 1, 1), tensor(c, k, 1, 1), tensor(1, k, 1, 1)
    weights = (tensor(c, 1, 7, 7), bias, wide, hidden, affine, affine, narrow, bias)
    for keep in (False, True):
        yield partial(block.fcdm_block_forward, x, v, v, v, *weights, keep=keep)
        yield partial(pointwise.pointwise, x, wide, hidden, gelu=True, keep=keep, squares=True)
    s = tensor(n, k, dtype=accumulation_dtype(dtype))
    yield partial(pointwise.pointwise, image(k), narrow, bias, s=s, plus=hidden, gate=v, residual=x)
