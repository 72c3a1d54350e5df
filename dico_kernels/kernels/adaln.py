"""adaLN, the gated residual, and both in one pass: rows of C channels, one program a few rows of one sample.

Shapes as everywhere: images (N, C, H, W) with channels_last memory, that is H * W rows of C a sample; shift, scale and
gate (N, C) or (1, C). Statistics by the corrected two-pass formula: deviations from the computed mean, whose own
rounding error (large where |mean| >> deviation) is measured in the second pass and taken out again.
"""

from __future__ import annotations

import triton
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
    rounded,
    row_offset,
    store,
    wide,
)
from dico_kernels.kernels.tiles import band_tile, row_tile


@triton.jit
def _standardise(x, cmask, C, EPS: tl.constexpr):
    """(xhat, mean, rstd) of a tile of rows; xhat is 0 outside cmask."""
    mean = tl.sum(x, axis=1) / C
    d = tl.where(cmask, x - mean[:, None], 0.0)
    left = tl.sum(d, axis=1) / C
    var = tl.sum(d * d, axis=1) / C - left * left
    rstd = 1.0 / tl.sqrt(var + EPS)
    return tl.where(cmask, (d - left[:, None]) * rstd[:, None], 0.0), mean + left, rstd


@triton.jit
def _standardise_grad(g, xhat, rstd, C):
    """LayerNorm's gradient by its input, from g, the gradient by xhat; both 0 in masked columns."""
    mean_g = tl.sum(g, axis=1) / C
    mean_gx = tl.sum(g * xhat, axis=1) / C
    return rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None])


@kernel
def _adaln_fwd_kernel(
    x, shift, scale, y, mean_out, rstd_out,
    C, HW, blocks, shift_stride, scale_stride,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = wide(pid // blocks)
    r = wide(pid % blocks) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLS).to(tl.int64)
    cmask = (c < C)[None, :]
    mask = (r < HW)[:, None] & cmask
    row = n * HW + r
    offset = row_offset(row, C)[:, None] + c[None, :]
    xhat, mean, rstd = _standardise(load(x + offset, mask, ACC), cmask, C, EPS)
    a = 1.0 + load(scale + n * scale_stride + c[None, :], cmask, ACC)
    b = load(shift + n * shift_stride + c[None, :], cmask, ACC)
    store(y + offset, xhat * a + b, mask)
    tl.store(mean_out + row, mean, mask=r < HW)
    tl.store(rstd_out + row, rstd, mask=r < HW)


@kernel
def _adaln_bwd_kernel(
    dy, past, x, shift, scale, mean_in, rstd_in, dx, y, dshift, dscale,
    C, HW, blocks, shift_stride, scale_stride,
    PAST: tl.constexpr, AGAIN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """PAST: add the gradient that reaches x past the normalisation. AGAIN: form y anew, for a weight gradient."""
    pid = tl.program_id(0)
    n = wide(pid // blocks)
    first = wide(pid % blocks) * SPAN
    c = tl.arange(0, COLS).to(tl.int64)
    cmask = (c < C)[None, :]
    a = 1.0 + load(scale + n * scale_stride + c[None, :], cmask, ACC)
    sum_dy = tl.zeros([ROWS, COLS], ACC)
    sum_dyx = tl.zeros([ROWS, COLS], ACC)
    for step in range(0, SPAN, ROWS):
        r = first + step + tl.arange(0, ROWS)
        mask = (r < HW)[:, None] & cmask
        row = n * HW + r
        offset = row_offset(row, C)[:, None] + c[None, :]
        mean = tl.load(mean_in + row, mask=r < HW, other=0.0)
        rstd = tl.load(rstd_in + row, mask=r < HW, other=0.0)
        xhat = tl.where(mask, (load(x + offset, mask, ACC) - mean[:, None]) * rstd[:, None], 0.0)
        g = load(dy + offset, mask, ACC)
        sum_dy += g
        sum_dyx += g * xhat
        d = _standardise_grad(g * a, xhat, rstd, C)
        if PAST:
            d += load(past + offset, mask, ACC)
        store(dx + offset, d, mask)
        if AGAIN:
            b = load(shift + n * shift_stride + c[None, :], cmask, ACC)
            store(y + offset, xhat * a + b, mask)
    part = row_offset(pid, C) + c
    tl.store(dshift + part, tl.sum(sum_dy, axis=0), mask=c < C)
    tl.store(dscale + part, tl.sum(sum_dyx, axis=0), mask=c < C)


@kernel
def _gated_residual_fwd_kernel(
    x, branch, gate, y,
    C, HW, row_blocks, col_blocks, gate_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = wide(pid % col_blocks) * COLS + tl.arange(0, COLS)
    n = wide(pid // col_blocks // row_blocks)
    r = wide(pid // col_blocks % row_blocks) * ROWS + tl.arange(0, ROWS)
    cmask = (c < C)[None, :]
    mask = (r < HW)[:, None] & cmask
    offset = row_offset(n * HW + r, C)[:, None] + c[None, :]
    g = load(gate + n * gate_stride + c[None, :], cmask, ACC)
    store(y + offset, load(x + offset, mask, ACC) + g * load(branch + offset, mask, ACC), mask)


@kernel
def _gate_gradient_kernel(
    dy, gate, dbranch, narrow, sums_out, gated_out,
    C, HW, row_blocks, col_blocks, gate_stride,
    NARROW: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = wide(pid % col_blocks) * COLS + tl.arange(0, COLS)
    band = pid // col_blocks
    n = wide(band // row_blocks)
    first = wide(band % row_blocks) * SPAN
    cmask = (c < C)[None, :]
    g = load(gate + n * gate_stride + c[None, :], cmask, ACC)
    sums = tl.zeros([ROWS, COLS], ACC)
    for step in range(0, SPAN, ROWS):
        r = first + step + tl.arange(0, ROWS)
        mask = (r < HW)[:, None] & cmask
        offset = row_offset(n * HW + r, C)[:, None] + c[None, :]
        d = load(dy + offset, mask, ACC)
        sums += d
        store(dbranch + offset, g * d, mask)
        if NARROW:
            store(narrow + offset, d, mask)
    total = tl.sum(sums, axis=0)
    tl.store(sums_out + row_offset(band, C) + c, total, mask=c < C)
    tl.store(gated_out + row_offset(band, C) + c, total * load(gate + n * gate_stride + c, c < C, ACC), mask=c < C)


@kernel
def _gated_residual_bwd_kernel(
    dy, branch, gate, dbranch, dgate,
    C, HW, row_blocks, col_blocks, gate_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    c = wide(pid % col_blocks) * COLS + tl.arange(0, COLS)
    band = pid // col_blocks
    n = wide(band // row_blocks)
    first = wide(band % row_blocks) * SPAN
    cmask = (c < C)[None, :]
    g = load(gate + n * gate_stride + c[None, :], cmask, ACC)
    sums = tl.zeros([ROWS, COLS], ACC)
    for step in range(0, SPAN, ROWS):
        r = first + step + tl.arange(0, ROWS)
        mask = (r < HW)[:, None] & cmask
        offset = row_offset(n * HW + r, C)[:, None] + c[None, :]
        d = load(dy + offset, mask, ACC)
        sums += d * load(branch + offset, mask, ACC)
        store(dbranch + offset, g * d, mask)
    tl.store(dgate + row_offset(band, C) + c, tl.sum(sums, axis=0), mask=c < C)


@kernel
def _gated_residual_adaln_fwd_kernel(
    x, branch, gate, shift, scale, y, h, mean_out, rstd_out,
    C, HW, blocks, gate_stride, shift_stride, scale_stride,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = wide(pid // blocks)
    r = wide(pid % blocks) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLS).to(tl.int64)
    cmask = (c < C)[None, :]
    mask = (r < HW)[:, None] & cmask
    row = n * HW + r
    offset = row_offset(row, C)[:, None] + c[None, :]
    g = load(gate + n * gate_stride + c[None, :], cmask, ACC)
    v = load(x + offset, mask, ACC) + g * load(branch + offset, mask, ACC)
    # backward and the rest of the model see the stored y, so the statistics have to be those of the rounded one
    v = rounded(v, y.dtype.element_ty)
    store(y + offset, v, mask)
    xhat, mean, rstd = _standardise(v, cmask, C, EPS)
    a = 1.0 + load(scale + n * scale_stride + c[None, :], cmask, ACC)
    b = load(shift + n * shift_stride + c[None, :], cmask, ACC)
    store(h + offset, xhat * a + b, mask)
    tl.store(mean_out + row, mean, mask=r < HW)
    tl.store(rstd_out + row, rstd, mask=r < HW)


@kernel
def _gated_residual_adaln_bwd_kernel(
    dy, dh, y, branch, gate, scale, mean_in, rstd_in, dx, dbranch, dgate, dshift, dscale,
    C, HW, blocks, gate_stride, scale_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPAN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = wide(pid // blocks)
    first = wide(pid % blocks) * SPAN
    c = tl.arange(0, COLS).to(tl.int64)
    cmask = (c < C)[None, :]
    a = 1.0 + load(scale + n * scale_stride + c[None, :], cmask, ACC)
    gate_row = load(gate + n * gate_stride + c[None, :], cmask, ACC)
    sum_dh = tl.zeros([ROWS, COLS], ACC)
    sum_dhx = tl.zeros([ROWS, COLS], ACC)
    sum_gate = tl.zeros([ROWS, COLS], ACC)
    for step in range(0, SPAN, ROWS):
        r = first + step + tl.arange(0, ROWS)
        mask = (r < HW)[:, None] & cmask
        row = n * HW + r
        offset = row_offset(row, C)[:, None] + c[None, :]
        mean = tl.load(mean_in + row, mask=r < HW, other=0.0)
        rstd = tl.load(rstd_in + row, mask=r < HW, other=0.0)
        xhat = tl.where(mask, (load(y + offset, mask, ACC) - mean[:, None]) * rstd[:, None], 0.0)
        g = load(dh + offset, mask, ACC)
        sum_dh += g
        sum_dhx += g * xhat
        d = load(dy + offset, mask, ACC) + _standardise_grad(g * a, xhat, rstd, C)
        store(dx + offset, d, mask)
        store(dbranch + offset, gate_row * d, mask)
        sum_gate += d * load(branch + offset, mask, ACC)
    part = row_offset(pid, C) + c
    tl.store(dshift + part, tl.sum(sum_dh, axis=0), mask=c < C)
    tl.store(dscale + part, tl.sum(sum_dhx, axis=0), mask=c < C)
    tl.store(dgate + part, tl.sum(sum_gate, axis=0), mask=c < C)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y = LN(x) * (1 + scale) + shift. Returns y of shift's type, and mean and rstd, (N, H, W), accumulation type."""
    n, c, h, w = x.shape
    tile = row_tile(c, h * w, tensors=2)
    blocks = cdiv(h * w, tile.rows)
    y = empty_image(n, c, h, w, like=shift)
    mean, rstd = empty_acc(n, h, w, like=x), empty_acc(n, h, w, like=x)
    launch(
        _adaln_fwd_kernel, n * blocks,
        x, shift, scale, y, mean, rstd, c, h * w, blocks, batch_stride(shift), batch_stride(scale),
        EPS=eps, ROWS=tile.rows, COLS=tile.cols, ACC=acc_triton(x.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return y, mean, rstd


def adaln_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of adaln_modulate: dx like x; dshift and dscale, (N, parts, C) in the accumulation type."""
    dx, _, dshift, dscale = _adaln_backward(dy, None, x, None, scale, mean, rstd)
    return dx, dshift, dscale


def adaln_modulate_backward_residual(
    dh: Tensor, dy: Tensor | None, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a residual around adaLN: dx, with dy (if any) added; adaLN's output, in dh's memory; dshift and dscale."""
    dx, y, dshift, dscale = _adaln_backward(dh, dy, x, shift, scale, mean, rstd)
    assert y is not None
    return dx, y, dshift, dscale


def _adaln_backward(
    dh: Tensor, dy: Tensor | None, x: Tensor, shift: Tensor | None, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    n, c, h, w = x.shape
    tile = row_tile(c, h * w, tensors=4 if shift is None else 6)
    blocks = cdiv(h * w, tile.span)
    dx = empty_image(n, c, h, w, like=x)
    y = None if shift is None else dh
    parts = empty_acc(n, blocks, c, like=x), empty_acc(n, blocks, c, like=x)
    shift_stride = 0 if shift is None else batch_stride(shift)
    launch(
        _adaln_bwd_kernel, n * blocks,
        dh, dy, x, shift, scale, mean, rstd, dx, y, *parts,
        c, h * w, blocks, shift_stride, batch_stride(scale),
        PAST=dy is not None, AGAIN=y is not None,
        ROWS=tile.rows, COLS=tile.cols, SPAN=tile.span, ACC=acc_triton(x.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return dx, y, *parts


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, overwrite: bool = False) -> Tensor:
    """x + gate * branch, like x; with overwrite it may take the branch's memory."""
    n, c, h, w = x.shape
    tile = band_tile(c, h * w)
    row_blocks, col_blocks = cdiv(h * w, tile.rows), cdiv(c, tile.cols)
    y = branch if overwrite and branch.dtype == x.dtype else empty_image(n, c, h, w, like=x)
    launch(
        _gated_residual_fwd_kernel, n * row_blocks * col_blocks,
        x, branch, gate, y, c, h * w, row_blocks, col_blocks, batch_stride(gate),
        ROWS=tile.rows, COLS=tile.cols, ACC=acc_triton(x.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return y


def gate_gradient(dy: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gate * dy, dy, both of gate's type, and the sums over pixels of dy and of gate * dy, (N, parts, C))."""
    n, c, h, w = dy.shape
    tile = band_tile(c, h * w)
    row_blocks, col_blocks = cdiv(h * w, tile.span), cdiv(c, tile.cols)
    dbranch = empty_image(n, c, h, w, like=gate)
    narrow = None if dy.dtype == gate.dtype else empty_image(n, c, h, w, like=gate)
    parts = empty_acc(n, row_blocks, c, like=dy), empty_acc(n, row_blocks, c, like=dy)
    launch(
        _gate_gradient_kernel, n * row_blocks * col_blocks,
        dy, gate, dbranch, narrow, *parts, c, h * w, row_blocks, col_blocks, batch_stride(gate),
        NARROW=narrow is not None,
        ROWS=tile.rows, COLS=tile.cols, SPAN=tile.span, ACC=acc_triton(dy.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return dbranch, dy if narrow is None else narrow, *parts


def gated_residual_backward(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """dbranch = gate * dy like branch; dgate = sum over pixels of dy * branch, (N, parts, C)."""
    n, c, h, w = branch.shape
    tile = band_tile(c, h * w)
    row_blocks, col_blocks = cdiv(h * w, tile.span), cdiv(c, tile.cols)
    dbranch = empty_image(n, c, h, w, like=branch)
    part = empty_acc(n, row_blocks, c, like=branch)
    launch(
        _gated_residual_bwd_kernel, n * row_blocks * col_blocks,
        dy, branch, gate, dbranch, part, c, h * w, row_blocks, col_blocks, batch_stride(gate),
        ROWS=tile.rows, COLS=tile.cols, SPAN=tile.span, ACC=acc_triton(branch.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return dbranch, part


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y = x + gate * branch, rounded to its type, then h = adaLN(y). Returns y, h, and y's mean and rstd (N, H, W)."""
    n, c, h, w = x.shape
    tile = row_tile(c, h * w, tensors=2)
    blocks = cdiv(h * w, tile.rows)
    y, out = empty_image(n, c, h, w, like=x), empty_image(n, c, h, w, like=x)
    mean, rstd = empty_acc(n, h, w, like=x), empty_acc(n, h, w, like=x)
    launch(
        _gated_residual_adaln_fwd_kernel, n * blocks,
        x, branch, gate, shift, scale, y, out, mean, rstd,
        c, h * w, blocks, batch_stride(gate), batch_stride(shift), batch_stride(scale),
        EPS=eps, ROWS=tile.rows, COLS=tile.cols, ACC=acc_triton(x.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return y, out, mean, rstd


def gated_residual_adaln_backward(
    dy: Tensor, dh: Tensor, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gated_residual_adaln in one pass: dx, dbranch, and dgate, dshift, dscale, (N, parts, C)."""
    n, c, h, w = y.shape
    tile = row_tile(c, h * w, tensors=6)
    blocks = cdiv(h * w, tile.span)
    dx, dbranch = empty_image(n, c, h, w, like=y), empty_image(n, c, h, w, like=y)
    parts = empty_acc(n, blocks, c, like=y), empty_acc(n, blocks, c, like=y), empty_acc(n, blocks, c, like=y)
    launch(
        _gated_residual_adaln_bwd_kernel, n * blocks,
        dy, dh, y, branch, gate, scale, mean, rstd, dx, dbranch, *parts,
        c, h * w, blocks, batch_stride(gate), batch_stride(scale),
        ROWS=tile.rows, COLS=tile.cols, SPAN=tile.span, ACC=acc_triton(y.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return dx, dbranch, *parts
