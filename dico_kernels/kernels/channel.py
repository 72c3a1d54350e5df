"""Sums over pixels and per-channel affine maps, shared by channel attention and GRN.

Images (N, C, H, W) with channels_last memory. Sums in two stages without atomics: fixed bands of rows here, then the
bands where they are wanted.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from dico_kernels.kernels.common import (
    acc_triton,
    batch_stride,
    cdiv,
    empty_acc,
    empty_image,
    kernel,
    launch,
    load,
    row_offset,
    store,
    wide,
)
from dico_kernels.kernels.tiles import band_tile


@kernel
def _channel_sums_fwd_kernel(
    a, b, out,
    C, HW, row_blocks, col_blocks,
    DOT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = wide(pid % col_blocks) * COLS + tl.arange(0, COLS)
    band = pid // col_blocks
    n = wide(band // row_blocks)
    first = wide(band % row_blocks) * SPAN
    sums = tl.zeros([ROWS, COLS], ACC)
    for step in range(0, SPAN, ROWS):
        r = first + step + tl.arange(0, ROWS)
        mask = (r < HW)[:, None] & (c < C)[None, :]
        offset = row_offset(n * HW + r, C)[:, None] + c[None, :]
        v = load(a + offset, mask, ACC)
        if DOT:
            v *= load(b + offset, mask, ACC)
        sums += v
    tl.store(out + row_offset(band, C) + c, tl.sum(sums, axis=0), mask=c < C)


@kernel
def _channel_affine_fwd_kernel(
    x, s, shift, z, r_scale, y,
    C, HW, row_blocks, col_blocks, s_stride, shift_stride, r_stride,
    SHIFT: tl.constexpr, SECOND: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = wide(pid % col_blocks) * COLS + tl.arange(0, COLS)
    n = wide(pid // col_blocks // row_blocks)
    r = wide(pid // col_blocks % row_blocks) * ROWS + tl.arange(0, ROWS)
    cmask = (c < C)[None, :]
    mask = (r < HW)[:, None] & cmask
    offset = row_offset(n * HW + r, C)[:, None] + c[None, :]
    v = load(x + offset, mask, ACC) * load(s + n * s_stride + c[None, :], cmask, ACC)
    if SECOND:
        v += load(z + offset, mask, ACC) * load(r_scale + n * r_stride + c[None, :], cmask, ACC)
    if SHIFT:
        v += load(shift + n * shift_stride + c[None, :], cmask, ACC)
    store(y + offset, v, mask)


def _sums(a: Tensor, b: Tensor | None) -> Tensor:
    n, c, h, w = a.shape
    tile = band_tile(c, h * w)
    row_blocks, col_blocks = cdiv(h * w, tile.span), cdiv(c, tile.cols)
    part = empty_acc(n, row_blocks, c, like=a)
    launch(
        _channel_sums_fwd_kernel, n * row_blocks * col_blocks,
        a, b, part, c, h * w, row_blocks, col_blocks,
        DOT=b is not None, ROWS=tile.rows, COLS=tile.cols, SPAN=tile.span, ACC=acc_triton(a.dtype),
        num_warps=tile.warps,
    )  # fmt: skip
    return part


def channel_sums(x: Tensor) -> Tensor:
    """Sum over pixels, in parts: (N, parts, C) in the accumulation type."""
    return _sums(x, None)


def channel_dots(a: Tensor, b: Tensor) -> Tensor:
    """Sum over pixels of a * b, in parts: (N, parts, C) in the accumulation type."""
    return _sums(a, b)


def channel_affine(
    x: Tensor,
    s: Tensor,
    shift: Tensor | None = None,
    z: Tensor | None = None,
    r: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """x * s + z * r + shift like x; s, r and shift (N, C) or (1, C), z like x.

    With overwrite the result may take x's memory.
    """
    n, c, h, w = x.shape
    tile = band_tile(c, h * w)
    row_blocks, col_blocks = cdiv(h * w, tile.rows), cdiv(c, tile.cols)
    y = x if overwrite else empty_image(n, c, h, w, like=x)
    strides = [0 if v is None else batch_stride(v) for v in (s, shift, r)]
    launch(
        _channel_affine_fwd_kernel, n * row_blocks * col_blocks,
        x, s, shift, z, r, y, c, h * w, row_blocks, col_blocks, *strides,
        SHIFT=shift is not None, SECOND=z is not None,
        ROWS=tile.rows, COLS=tile.cols, ACC=acc_triton(x.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return y
