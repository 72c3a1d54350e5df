"""What stands between two 1x1 convolutions: GELU, with the sums that GRN and the first convolution's bias want of it.

Images (N, C, H, W) with channels_last memory. Sums in two stages without atomics: fixed bands of rows, then the bands.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dico_kernels.kernels.common import (
    acc_triton,
    cdiv,
    empty_acc,
    empty_image,
    gelu_grad,
    launch,
    load,
    rounded,
    row_offset,
    store,
)
from dico_kernels.kernels.common import (
    gelu as gelu_of,
)
from dico_kernels.kernels.tiles import band_tile


@triton.jit
def _gelu_fwd_kernel(
    x, y, sums_out,
    C, HW, row_blocks, col_blocks,
    SQUARES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % col_blocks) * COLS + tl.arange(0, COLS)
    band = pid // col_blocks
    n = band // row_blocks
    first = (band % row_blocks) * SPAN
    sums = tl.zeros([ROWS, COLS], ACC)
    for step in range(0, SPAN, ROWS):
        r = first + step + tl.arange(0, ROWS)
        mask = (r < HW)[:, None] & (c < C)[None, :]
        offset = row_offset(n * HW + r, C)[:, None] + c[None, :]
        # of the rounded values: those are what the norm belongs to
        v = rounded(gelu_of(load(x + offset, mask, ACC)), y.dtype.element_ty)
        store(y + offset, v, mask)
        if SQUARES:
            sums += v * v
    if SQUARES:
        tl.store(sums_out + row_offset(band, C) + c, tl.sum(sums, axis=0), mask=c < C)


@triton.jit
def _gelu_bwd_kernel(
    dy, x, s, r_scale, dx, y, sums_out,
    C, HW, row_blocks, col_blocks,
    AFFINE: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    c = (pid % col_blocks) * COLS + tl.arange(0, COLS)
    band = pid // col_blocks
    n = band // row_blocks
    first = (band % row_blocks) * SPAN
    cmask = (c < C)[None, :]
    sums = tl.zeros([ROWS, COLS], ACC)
    for step in range(0, SPAN, ROWS):
        r = first + step + tl.arange(0, ROWS)
        mask = (r < HW)[:, None] & cmask
        offset = row_offset(n * HW + r, C)[:, None] + c[None, :]
        v = load(x + offset, mask, ACC)
        d = load(dy + offset, mask, ACC)
        if AFFINE or KEEP:
            out = gelu_of(v)
        if KEEP:
            store(y + offset, out, mask)
        if AFFINE:
            by = load(s + row_offset(n, C) + c[None, :], cmask, ACC)
            through = load(r_scale + row_offset(n, C) + c[None, :], cmask, ACC)
            d = d * by + out * through
        d *= gelu_grad(v)
        sums += tl.where(mask, d, 0.0)
        store(dx + offset, d, mask)
    tl.store(sums_out + row_offset(band, C) + c, tl.sum(sums, axis=0), mask=c < C)


def gelu(x: Tensor, squares: bool) -> tuple[Tensor, Tensor | None]:
    """GELU in its exact form; with squares also the sums over pixels of its square, (N, C), accumulation type."""
    n, c, h, w = x.shape
    tile = band_tile(c, h * w)
    row_blocks, col_blocks = cdiv(h * w, tile.span), cdiv(c, tile.cols)
    y = empty_image(n, c, h, w, like=x)
    part = empty_acc(n, row_blocks, c, like=x) if squares else None
    launch(
        _gelu_fwd_kernel, n * row_blocks * col_blocks,
        x, y, part, c, h * w, row_blocks, col_blocks,
        SQUARES=squares, ROWS=tile.rows, COLS=tile.cols, SPAN=tile.span, ACC=acc_triton(x.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return y, None if part is None else part.sum(1)


def gelu_backward(
    dy: Tensor, x: Tensor, s: Tensor | None = None, r: Tensor | None = None, keep: bool = False, overwrite: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, gelu(x) if keep, dx's sums over pixels); with s and r, (N, C), of s * dy + r * gelu(x) instead of dy.

    With overwrite dx may take dy's memory.
    """
    n, c, h, w = x.shape
    tile = band_tile(c, h * w)
    row_blocks, col_blocks = cdiv(h * w, tile.span), cdiv(c, tile.cols)
    dx = dy if overwrite else empty_image(n, c, h, w, like=x)
    y = empty_image(n, c, h, w, like=x) if keep else None
    part = empty_acc(n, row_blocks, c, like=x)
    launch(
        _gelu_bwd_kernel, n * row_blocks * col_blocks,
        dy, x, s, r, dx, y, part, c, h * w, row_blocks, col_blocks,
        AFFINE=s is not None, KEEP=keep,
        ROWS=tile.rows, COLS=tile.cols, SPAN=tile.span, ACC=acc_triton(x.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return dx, y, part.sum(1)
