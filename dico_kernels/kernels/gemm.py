"""1x1 convolutions with what surrounds them: one matrix product, a prologue on its input, an epilogue on its result.

Rows are the M = N * H * W pixels of a channels_last image, H * W of them a sample; a weight is (N, K) as PyTorch
stores a 1x1 convolution from K to N channels. With A' the input after the prologue, the kernel computes

    y = epilogue(A' @ W^T)

Prologues:
    "none"   A' = x
    "scale"  A' = x * s, s a vector a sample (channel attention's gate; GRN's 1 + gamma * response)
    "norm"   LayerNorm without affine, then * (1 + scale) + shift, without a pass of its own. With mu and rstd the
             statistics of a row, c the mean rounded to x's type and s = 1 + scale, also rounded,

                 y[m] = rstd[m] * (sum_k W[k] * ((x[m,k] - c[m]) * s[k]) - (mu[m] - c[m]) * u) + v

             with u = W @ s and v = W @ shift + bias a sample (`modulation_terms`). Exact algebra; subtracting c first
             is what keeps the 16-bit A' accurate when the mean is far above the deviation.
Epilogue, each step optional, in this order:
    + bias, GELU, residual + gate * (...), then y is rounded and stored, and of the stored y: mean and centred sum of
    squares of each row over the tile's columns (`Partials`, which the next "norm" adds up), and sums or sums of
    squares over each sample's pixels by channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dico_kernels.kernels.channel import channel_dots, channel_sums
from dico_kernels.kernels.common import (
    acc_triton,
    as_operand,
    batch_stride,
    capability,
    cdiv,
    dot,
    empty_acc,
    empty_image,
    gelu,
    kernel,
    launch,
    load,
    load_operand,
    matmul_precision,
    multiplies_by_wgmma,
    operand,
    rounded,
    row_offset,
    store,
    wide,
    widened,
)
from dico_kernels.kernels.tiles import PointwiseTile, pointwise_tile, row_tile


@triton.jit
def _moments(x, mask, count):
    """Mean of each row of a tile and the sum of squared deviations from it; corrected two-pass, see adaln.py."""
    mean = tl.sum(tl.where(mask, x, 0.0), axis=1) / count
    d = tl.where(mask, x - mean[:, None], 0.0)
    left = tl.sum(d, axis=1) / count
    return mean + left, tl.sum(d * d, axis=1) - left * left * count


@kernel
def _row_statistics_fwd_kernel(
    x, mean_out, rstd_out, M, C,
    EPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLS).to(tl.int64)
    mask = (m < M)[:, None] & (c < C)[None, :]
    mean, squares = _moments(load(x + row_offset(m, C)[:, None] + c[None, :], mask, ACC), mask, C)
    tl.store(mean_out + m, mean, mask=m < M)
    tl.store(rstd_out + m, 1.0 / tl.sqrt(squares / C + EPS), mask=m < M)


@triton.jit
def _combined(parts, m, ok, M, C, PART: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr):
    """(mean, rstd) of rows from the moments of their runs of PART channels (the last run may be shorter).

    Never sum(x^2) - mean^2: at a mean of 30 deviations that costs float32 three digits, at 1000 all of them.
    """
    mean = tl.zeros(m.shape, ACC)
    for at in range(0, C, PART):
        mean += load(parts + row_offset(wide(at) // PART * 2, M) + m, ok, ACC) * tl.minimum(PART, C - at)
    mean = mean / C
    left = tl.zeros(m.shape, ACC)
    squares = tl.zeros(m.shape, ACC)
    for at in range(0, C, PART):
        part = parts + row_offset(wide(at) // PART * 2, M) + m
        d = load(part, ok, ACC) - mean
        count = tl.minimum(PART, C - at)
        left += d * count
        squares += load(part + wide(M), ok, ACC) + d * d * count
    left = left / C
    return mean + left, 1.0 / tl.sqrt(squares / C - left * left + EPS)


@triton.jit
def _of_sample(v, stride, n, c, cmask, samples, SAMPLES: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr):
    """Channels c of the vector of each row's sample, [1 or BM, channels].

    SAMPLES 1: the tile's rows are all of sample n; 2: its upper half is of n, its lower half of n + 1; 0: n has the
    sample of every row.
    """
    if SAMPLES == 1:
        # one-dimensional, or every thread would load what it needs itself
        x = load(v + n * stride + c, cmask, ACC)[None, :]
    elif SAMPLES == 2:
        both = tl.minimum(n + tl.arange(0, 2), samples - 1)
        x = load(v + (both * stride)[:, None] + c[None, :], cmask[None, :], ACC)
        x = tl.broadcast_to(x[:, None, :], (2, BM // 2, c.shape[0]))
        x = tl.reshape(x, (BM, c.shape[0]))
    else:
        x = load(v + (n * stride)[:, None] + c[None, :], (n < samples)[:, None] & cmask[None, :], ACC)
    return x


@kernel
def _gemm_fwd_kernel(
    y, x, weight, bias, s, u, mean_in, rstd_in, mean_out, rstd_out, residual, gate, pre, row_parts, channel_parts,
    M, N, K, HW, samples, row_blocks, col_blocks, s_stride, bias_stride, gate_stride,
    PROLOGUE: tl.constexpr, PART: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, PRE: tl.constexpr,
    GATE: tl.constexpr, STATS: tl.constexpr, CHANNEL: tl.constexpr, SAMPLES: tl.constexpr,
    EPS: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, DRAIN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x and weight are descriptors if TMA. PART > 0: mean_in holds Partials of that width, else the mean itself."""
    # Neighbouring programs share GROUP blocks of rows, so that what runs at one time reads few rows and few weights.
    GROUP: tl.constexpr = 8
    pid = tl.program_id(0)
    group = pid // (GROUP * col_blocks) * GROUP
    height = tl.minimum(row_blocks - group, GROUP)
    row_block = group + pid % (GROUP * col_blocks) % height
    col_block = pid % (GROUP * col_blocks) // height
    first = wide(row_block) * BM
    m = first + tl.arange(0, BM)
    c = wide(col_block) * BN + tl.arange(0, BN)
    mmask, cmask = m < M, c < N

    if SAMPLES == 0:
        n = m // HW
    else:
        n = first // HW

    if PROLOGUE == "norm":
        if PART > 0:
            mean, rstd = _combined(mean_in, m, mmask, M, K, PART, EPS, ACC)
            store(mean_out + m, mean, mmask & (col_block == 0))
            store(rstd_out + m, rstd, mmask & (col_block == 0))
        else:
            mean = tl.load(mean_in + m, mask=mmask, other=0.0)
            rstd = tl.load(rstd_in + m, mask=mmask, other=0.0)
        if TMA:
            centre = as_operand(mean, x.dtype)
        else:
            centre = as_operand(mean, x.dtype.element_ty)

    i = tl.arange(0, BK).to(tl.int64)
    if not TMA:
        source = x + row_offset(m, K)[:, None] + i[None, :]
        taps = weight + row_offset(c, K)[None, :] + i[:, None]
    acc = tl.zeros([BM, BN], ACC)
    # An empty loop ruled out, ptxas keeps several wgmma in flight; else it waits for each (Hopper).
    tl.assume(K > 0)
    for at in range(0, K, BK):
        left = i < K - at
        if TMA:
            a = x.load([row_block * BM, at])
            b = operand(weight.load([col_block * BN, at])).T
        else:
            a = tl.load(source + wide(at), mask=mmask[:, None] & left[None, :], other=0.0)
            b = load_operand(taps + wide(at), left[:, None] & cmask[None, :])
        if PROLOGUE == "none":
            a = operand(a)
        else:
            v = widened(a, ACC)
            if PROLOGUE == "norm":
                # Rounded here too: both steps are then one instruction for two 16-bit elements, where seven would
                # keep the tensor cores waiting. Eager rounds more often: at K = 416 the whole errs less than it.
                v = rounded(v - centre.to(ACC)[:, None], a.dtype)
            # zero beyond K, so A' is zero there too
            v *= _of_sample(s, s_stride, n, wide(at) + i, left, samples, SAMPLES, BM, ACC)
            a = as_operand(v, a.dtype)
        acc = dot(a, b, acc, PRECISION)
        if DRAIN:
            # Hopper's tensor cores read A' from registers after the instruction has been issued, and ptxas before 13.3
            # gives those registers to the next step while they do (Triton's issue 9433; aot looks for it). So each
            # step waits for its product; the other program of the multiprocessor fills the gap.
            tl.inline_asm_elementwise(
                "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;", "=r,r", [at], dtype=tl.int32, is_pure=False, pack=1
            )

    # A half of the columns at a time: with all of them the residual's tile would not fit into registers beside acc.
    halves = tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)).split()
    for half in tl.static_range(2):
        acc = halves[half]
        c = wide(col_block) * BN + half * (BN // 2) + tl.arange(0, BN // 2)
        cmask = c < N
        if PROLOGUE == "norm":
            # u and v come from one product, so they have one stride
            acc -= (mean - centre.to(ACC))[:, None] * _of_sample(u, bias_stride, n, c, cmask, samples, SAMPLES, BM, ACC)
            acc *= rstd[:, None]
        if BIAS:
            acc += _of_sample(bias, bias_stride, n, c, cmask, samples, SAMPLES, BM, ACC)
        mask = mmask[:, None] & cmask[None, :]
        offset = row_offset(m, N)[:, None] + c[None, :]
        if PRE:
            store(pre + offset, acc, mask)
        if GELU:
            acc = gelu(acc)
        if GATE:
            g = _of_sample(gate, gate_stride, n, c, cmask, samples, SAMPLES, BM, ACC)
            acc = load(residual + offset, mask, ACC) + g * acc
        store(y + offset, acc, mask)
        if STATS or CHANNEL != "none":
            # of what is stored: the next kernel and backward see nothing else
            acc = rounded(acc, y.dtype.element_ty)
        if STATS:
            count = tl.minimum(N - wide(col_block) * BN - half * (BN // 2), BN // 2)
            mean_y, squares_y = _moments(acc, cmask[None, :], tl.maximum(count, 1))
            if half == 0:
                first_count, first_mean, first_squares = count, mean_y, squares_y
            else:
                # Chan's formula for the union of two runs, the second of which may be empty
                share = tl.maximum(count, 0).to(ACC) / (first_count + tl.maximum(count, 0))
                d = mean_y - first_mean
                part = row_parts + row_offset(wide(col_block) * 2, M) + m
                tl.store(part, first_mean + d * share, mask=mmask)
                squares_y += first_squares + d * d * first_count * share
                tl.store(part + wide(M), squares_y, mask=mmask)
        if CHANNEL != "none":
            if CHANNEL == "squares":
                acc *= acc
            acc = tl.where(mmask[:, None], acc, 0.0)
            slot = channel_parts + row_offset(wide(row_block) * SAMPLES, N) + c
            if SAMPLES == 2:
                by_sample = tl.sum(tl.reshape(acc, (2, BM // 2, BN // 2)), axis=1)
                tl.store(slot[None, :] + row_offset(tl.arange(0, 2), N)[:, None], by_sample, mask=cmask[None, :])
            else:
                tl.store(slot, tl.sum(acc, axis=0), mask=cmask)


class Partials(NamedTuple):
    """Mean and sum of squared deviations of each row, by runs of `width` channels: (runs, 2, M)."""

    moments: Tensor
    width: int


class Statistics(NamedTuple):
    """LayerNorm's mean and 1 / deviation of each pixel, (N, H, W) in the accumulation type."""

    mean: Tensor
    rstd: Tensor


class Modulation(NamedTuple):
    """adaLN in front of a product: s = 1 + scale (B, K) in the input's type; u, v (B, N) in the accumulation type."""

    s: Tensor
    u: Tensor
    v: Tensor


class Product(NamedTuple):
    """What `pointwise` returns; None for what was not asked for.

    y (N, C, H, W); before_gelu like y; statistics as used by the prologue; partials of y's rows; channel sums (N, C).
    """

    y: Tensor
    before_gelu: Tensor | None
    statistics: Statistics | None
    partials: Partials | None
    sums: Tensor | None


def row_statistics(x: Tensor, eps: float) -> Statistics:
    """LayerNorm's statistics of every pixel of an image."""
    n, c, h, w = x.shape
    m = n * h * w
    tile = row_tile(c, m, tensors=2)
    mean, rstd = empty_acc(n, h, w, like=x), empty_acc(n, h, w, like=x)
    launch(
        _row_statistics_fwd_kernel, cdiv(m, tile.rows),
        x, mean, rstd, m, c, EPS=eps, ROWS=tile.rows, COLS=tile.cols, ACC=acc_triton(x.dtype), num_warps=tile.warps,
    )  # fmt: skip
    return Statistics(mean, rstd)


def _spread(bm: int, hw: int, samples: int) -> int:
    """SAMPLES of `_of_sample` for tiles of bm rows."""
    if samples == 1 or hw % bm == 0:
        return 1
    return 2 if bm == 2 * hw else 0


def _matrix(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], -1)


def _operands(x: Tensor, weight: Tensor, tile: PointwiseTile) -> tuple[Tensor, Tensor] | tuple[TensorDescriptor, ...]:
    if not tile.tma:
        return x, weight
    return (
        TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight, [tile.n, tile.k]),
    )


def _tile(x: Tensor, weight: Tensor, heavy: bool) -> PointwiseTile:
    (m, k), n = x.shape, weight.shape[0]
    tile = pointwise_tile(m, n, k, x.dtype, capability(x), heavy)
    row_bytes = (x.stride(0) | weight.stride(0)) * x.element_size()  # of a single row, whatever it was cut from
    if tile.tma and (x.data_ptr() | weight.data_ptr() | row_bytes) % 16 != 0:
        return pointwise_tile(m, n, k, x.dtype, 0, heavy)
    return tile


def project(vectors: Tensor, weight: Tensor) -> Tensor:
    """vectors (B, K) times the transpose of weight (N, K, 1, 1): (B, N), in the accumulation type, not rounded."""
    weight = _matrix(weight)
    y = empty_acc(vectors.shape[0], weight.shape[0], like=vectors)
    tile = _tile(vectors, weight, False)
    _launch(y, vectors, weight, tile, 1, vectors.shape[0])
    return y


def modulation_terms(weight: Tensor, bias: Tensor | None, shift: Tensor, scale: Tensor) -> Modulation:
    """What the "norm" prologue wants: adaLN with shift and scale (B, K), in front of weight (N, K, 1, 1), bias (N,)."""
    b = max(shift.shape[0], scale.shape[0])
    s = 1 + scale
    uv = project(torch.cat([s.expand(b, -1), shift.expand(b, -1)]), weight)
    u, v = uv[:b], uv[b:]
    return Modulation(s, u, v if bias is None else v + bias)


def _launch(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    tile: PointwiseTile,
    samples: int,
    hw: int,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    modulation: Modulation | None = None,
    statistics: Statistics | Partials | None = None,
    result: Statistics | None = None,
    eps: float = 0.0,
    gelu: bool = False,
    before_gelu: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    row_parts: Tensor | None = None,
    channel: str = "none",
    channel_parts: Tensor | None = None,
) -> None:
    """y, x and weight as matrices: (M, N), (M, K), (N, K); the rest as the kernel has it."""
    (m, k), n = x.shape, weight.shape[0]
    bias = bias if modulation is None else modulation.v
    s = scale if modulation is None else modulation.s
    strides = [0 if v is None or v.dim() == 1 else batch_stride(v) for v in (s, bias, gate)]
    if channel == "none" and not any(strides):
        samples, hw = 1, m
    u = None if modulation is None else modulation.u
    mean, rstd = statistics if isinstance(statistics, Statistics) else (statistics and statistics.moments, None)
    row_blocks, col_blocks = cdiv(m, tile.m), cdiv(n, tile.n)
    spread = _spread(tile.m, hw, samples)
    precision = matmul_precision(x.dtype)
    on_tensor_cores = x.dtype.itemsize == 2 or precision == "tf32"
    launch(
        _gemm_fwd_kernel, row_blocks * col_blocks,
        y, *_operands(x, weight, tile), bias, s, u, mean, rstd, *(result or (None, None)),
        residual, gate, before_gelu, row_parts, channel_parts,
        m, n, k, hw, samples, row_blocks, col_blocks, *strides,
        PROLOGUE="none" if s is None else "scale" if modulation is None else "norm",
        PART=statistics.width if isinstance(statistics, Partials) else 0,
        BIAS=bias is not None, GELU=gelu, PRE=before_gelu is not None, GATE=gate is not None,
        STATS=row_parts is not None, CHANNEL=channel, SAMPLES=spread, EPS=eps,
        PRECISION=precision, TMA=tile.tma, DRAIN=s is not None and on_tensor_cores and multiplies_by_wgmma(x),
        BM=tile.m, BN=tile.n, BK=tile.k, ACC=acc_triton(x.dtype),
        # a scale for every row is as large as x's own tile
        num_warps=tile.warps, num_stages=tile.stages if spread else 2, maxnreg=tile.maxnreg,
    )  # fmt: skip


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    modulation: Modulation | None = None,
    statistics: Statistics | Partials | None = None,
    eps: float = 1e-6,
    gelu: bool = False,
    keep: bool = False,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    partials: bool = False,
    channel: str = "none",
) -> Product:
    """1x1 convolution of an image with its neighbours in one kernel; the module's docstring has the formulas.

    Args:
        x: (N, K, H, W), channels_last.
        weight: (C, K, 1, 1) or (C, K), x's type.
        bias: (C,); with `modulation` it is in there already.
        scale: (N, K) or (1, K), x's or the accumulation type: multiplies x.
        modulation: adaLN on x, whose statistics are `statistics`; partials are combined, and returned combined.
        eps: adaLN's, used where partials are combined.
        gelu: GELU on the product; `keep` also returns the value before it.
        gate: (N, C) or (1, C), with `residual` like y: y = residual + gate * product.
        partials: return Partials of y.
        channel: "sums" or "squares": sums of y or y * y over each sample's pixels.
    """
    b, k, h, w = x.shape
    n, m, hw = weight.shape[0], b * h * w, h * w
    matrix, rows = _matrix(weight), x.permute(0, 2, 3, 1).reshape(m, k)
    tile = _tile(rows, matrix, heavy=modulation is not None or gelu or hw < 128)

    def rows_of(image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1).view(m, n)

    y = empty_image(b, n, h, w, like=x)
    before = empty_image(b, n, h, w, like=x) if keep else None
    combined = None
    if isinstance(statistics, Partials):
        combined = Statistics(empty_acc(b, h, w, like=x), empty_acc(b, h, w, like=x))
    row_parts = empty_acc(cdiv(n, tile.n), 2, m, like=x) if partials else None
    # Tiles that hold whole samples, or parts of one, add up what they hold; any others leave it to a pass over y.
    spread = _spread(tile.m, hw, b)
    fused = channel != "none" and spread > 0
    channel_parts = empty_acc(cdiv(m, tile.m) * spread, n, like=x) if fused else None
    _launch(
        rows_of(y), rows, matrix, tile, b, hw,
        bias=bias, scale=scale, modulation=modulation, statistics=statistics, eps=eps,
        result=combined,
        gelu=gelu, before_gelu=None if before is None else rows_of(before), gate=gate,
        residual=residual, row_parts=row_parts,
        channel=channel if fused else "none", channel_parts=channel_parts,
    )  # fmt: skip
    sums = None
    if channel_parts is not None:
        sums = channel_parts[: max(hw // tile.m, 1) * b] if b > 1 else channel_parts
        sums = sums.reshape(b, -1, n)
    elif channel != "none":
        sums = channel_sums(y) if channel == "sums" else channel_dots(y, y)
    return Product(
        y,
        before,
        statistics if isinstance(statistics, Statistics) else combined,
        None if row_parts is None else Partials(row_parts, tile.n),
        sums,
    )
