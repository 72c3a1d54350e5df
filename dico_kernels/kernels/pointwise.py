"""1x1 convolutions with what surrounds them, and GELU by itself, with the sums that GRN and a bias want of it.

Images (N, C, H, W) with channels_last memory. Sums as in channel.py: (N, parts, C) in the accumulation
type.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from dico_kernels._gemm import Product
from dico_kernels._linear import from_rows, linear, rows
from dico_kernels.kernels import gemm
from dico_kernels.kernels.adaln import adaln_modulate, gated_residual
from dico_kernels.kernels.common import (
    acc_triton,
    cdiv,
    empty_acc,
    empty_image,
    gelu_grad,
    kernel,
    launch,
    load,
    rounded,
    row_offset,
    store,
    wide,
)
from dico_kernels.kernels.common import (
    gelu as gelu_of,
)
from dico_kernels.kernels.tiles import band_tile


@kernel
def _gelu_fwd_kernel(
    x, y, sums_out,
    C, HW, row_blocks, col_blocks,
    SQUARES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, ACC: tl.constexpr,
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
        # of the rounded values: those are what the norm belongs to
        v = rounded(gelu_of(load(x + offset, mask, ACC)), y.dtype.element_ty)
        store(y + offset, v, mask)
        if SQUARES:
            sums += v * v
    if SQUARES:
        tl.store(sums_out + row_offset(band, C) + c, tl.sum(sums, axis=0), mask=c < C)


@kernel
def _gelu_bwd_kernel(
    dy, x, s, r_scale, dx, y, sums_out,
    C, HW, row_blocks, col_blocks,
    AFFINE: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = wide(pid % col_blocks) * COLS + tl.arange(0, COLS)
    band = pid // col_blocks
    n = wide(band // row_blocks)
    first = wide(band % row_blocks) * SPAN
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
    """GELU in its exact form; with squares also the sums over pixels of its square: (N, parts, C)."""
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
    return y, part


def gelu_backward(
    dy: Tensor, x: Tensor, s: Tensor | None = None, r: Tensor | None = None, keep: bool = False, overwrite: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, gelu(x) if keep, dx's sums over pixels, (N, parts, C)).

    With s and r, (N, C), of s * dy + r * gelu(x) instead of dy. With overwrite dx may take dy's memory.
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
    return dx, y, part


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    frozen: bool = True,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    statistics: bool = True,
    s: Tensor | None = None,
    plus: Tensor | None = None,
    gelu: bool = False,
    keep: bool = False,
    squares: bool = False,
    then: tuple[Tensor, Tensor | None] | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Product:
    """1x1 convolution of an image with what stands before and behind it: arguments and results as native.pointwise.

    GELU and the gated residual happen in the product's epilogue, where they cost no pass over memory. adaLN is a kernel
    of its own, since its prologue takes more of the tensor cores' time than the pass that it saves; and a product
    that has nothing else around it is the library's.
    """
    del frozen, statistics
    if then is not None:
        first = pointwise(x, weight, bias, shift=shift, scale=scale, eps=eps, s=s, plus=plus, gelu=gelu, keep=keep)
        return first._replace(y=pointwise(first.y, *then, gate=gate, residual=residual).y)
    mean, rstd = None, None
    if shift is not None and scale is not None:
        x, mean, rstd = adaln_modulate(x, shift, scale, eps)
    if plus is not None:  # W (s x + plus) + b = W s x + (W plus + b)
        through = gemm.project(plus[None], weight)[0]
        bias = through if bias is None else through + bias
    # A float32 residual beside 16-bit weights is of another type than the product.
    inside = residual is not None and residual.dtype == x.dtype
    if not (gelu or inside) and s is None:
        y, before, sums = from_rows(linear(rows(x), weight.flatten(1), bias), x), None, None
    else:
        y, before, _, _, sums = gemm.pointwise(
            x,
            weight,
            bias,
            scale=s,
            gelu=gelu,
            keep=keep,
            gate=gate if inside else None,
            residual=residual if inside else None,
            channel="squares" if squares else "none",
        )
    if gate is not None and residual is not None and not inside:
        y = gated_residual(residual, y, gate, overwrite=True)
    return Product(y, before, mean, rstd, sums)
