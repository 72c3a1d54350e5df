"""The decoder's entry, 1x1 convolution of cat[PixelShuffle(2)(up), skip], as one matrix product with two sums.

Rows are output pixels. The first sum gathers its operand from `up` as it lies in memory, the second reads `skip`;
neither the shuffled nor the concatenated tensor exists. Images (N, C, H, W) with channels_last memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dico_kernels.kernels.channel import channel_sums
from dico_kernels.kernels.common import (
    acc_triton,
    cdiv,
    dot,
    empty_acc,
    empty_image,
    kernel,
    launch,
    load,
    load_operand,
    matmul_precision,
    row_offset,
    store,
    wide,
)
from dico_kernels.kernels.tiles import gemm_tile, weight_grad_chunk


@triton.jit
def _shuffled(m_first, BLOCK: tl.constexpr, C, H, W):
    """Where BLOCK output rows from m_first on lie in `up`: element offset of (row, channel 0); channels are 4 apart."""
    # One 64-bit division a program; within an image 32 bits are enough, and a division there costs a tenth.
    pixels = wide(H) * W * 4
    local = (m_first % pixels).to(tl.int32) + tl.arange(0, BLOCK)
    n = m_first // pixels + local // pixels.to(tl.int32)
    local = local % pixels.to(tl.int32)
    y = local // (2 * W)
    x = local % (2 * W)
    row = (n * H + y // 2) * W + x // 2
    return row_offset(row, C) * 4 + (y % 2) * 2 + x % 2


@kernel
def _pixel_shuffle_skip_fwd_kernel(
    up, skip, weight, bias, out,
    M, K, C, S, H, W, col_blocks,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    first = wide(pid // col_blocks) * BM
    m = first + tl.arange(0, BM)
    k = wide(pid % col_blocks) * BN + tl.arange(0, BN)
    i = tl.arange(0, BK).to(tl.int64)
    mmask, kmask = (m < M)[:, None], (k < K)[None, :]
    acc = tl.zeros([BM, BN], ACC)
    source = up + _shuffled(first, BM, C, H, W)[:, None] + i[None, :] * 4
    taps = weight + row_offset(k, C + S)[None, :] + i[:, None]
    for at in range(0, C, BK):
        left = i < C - at
        a = load_operand(source + wide(at) * 4, mmask & left[None, :])
        acc = dot(a, load_operand(taps + wide(at), kmask & left[:, None]), acc, PRECISION)
    source = skip + row_offset(m, S)[:, None] + i[None, :]
    taps += wide(C)
    for at in range(0, S, BK):
        left = i < S - at
        a = load_operand(source + wide(at), mmask & left[None, :])
        acc = dot(a, load_operand(taps + wide(at), kmask & left[:, None]), acc, PRECISION)
    if BIAS:
        acc += load(bias + k[None, :], kmask, ACC)
    store(out + row_offset(m, K)[:, None] + k[None, :], acc, mmask & kmask)


@kernel
def _pixel_shuffle_skip_bwd_up_kernel(
    dy, weight, dup,
    M, K, C, S, H, W, col_blocks,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dup at BM pixels of `up` and BN shuffled channels: four products, one an output sub-pixel, interleaved."""
    pid = tl.program_id(0)
    first = wide(pid // col_blocks) * BM
    m = first + tl.arange(0, BM)
    c = wide(pid % col_blocks) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK).to(tl.int64)
    pixels = wide(H) * W
    local = (first % pixels).to(tl.int32) + tl.arange(0, BM)
    n = first // pixels + local // pixels.to(tl.int32)
    local = local % pixels.to(tl.int32)
    row = (n * (2 * H) + (local // W) * 2) * (2 * W) + (local % W) * 2
    mmask, cmask = (m < M)[:, None], (c < C)[None, :]
    source = dy + row_offset(row, K)[:, None] + k[None, :]
    right, below = wide(K), wide(K) * W * 2
    taps = weight + row_offset(k, C + S)[:, None] + c[None, :]
    s00 = tl.zeros([BM, BN], ACC)
    s01 = tl.zeros([BM, BN], ACC)
    s10 = tl.zeros([BM, BN], ACC)
    s11 = tl.zeros([BM, BN], ACC)
    # an empty loop ruled out, ptxas keeps several wgmma in flight; else it waits for each (Hopper)
    tl.assume(K > 0)
    for at in range(0, K, BK):
        left = k < K - at
        ok = mmask & left[None, :]
        here = source + wide(at)
        b = load_operand(taps, left[:, None] & cmask)
        s00 = dot(load_operand(here, ok), b, s00, PRECISION)
        s01 = dot(load_operand(here + right, ok), b, s01, PRECISION)
        s10 = dot(load_operand(here + below, ok), b, s10, PRECISION)
        s11 = dot(load_operand(here + below + right, ok), b, s11, PRECISION)
        taps += BK * (wide(C) + S)
    # channel 4c + 2i + j: interleaved like this a thread writes whole runs, not every fourth element
    merged = tl.interleave(tl.interleave(s00, s10), tl.interleave(s01, s11))
    q = wide(pid % col_blocks) * (BN * 4) + tl.arange(0, BN * 4)
    store(dup + row_offset(m, C)[:, None] * 4 + q[None, :], merged, mmask & (q < wide(C) * 4)[None, :])


@kernel
def _pixel_shuffle_skip_bwd_weight_kernel(
    dy, up, skip, part,
    M, K, C, S, H, W, k_blocks, c_blocks, s_blocks,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """CHUNK pixels' share of dweight, at BM outputs by BN inputs, first those in `up`, then in skip."""
    pid = tl.program_id(0)
    block = wide(pid % (c_blocks + s_blocks))
    pid = pid // (c_blocks + s_blocks)
    k = wide(pid % k_blocks) * BM + tl.arange(0, BM)
    chunk = wide(pid // k_blocks)
    i = tl.arange(0, BK)
    kmask = (k < K)[:, None]
    acc = tl.zeros([BM, BN], ACC)
    base = part + row_offset(chunk * K + k, C + S)[:, None]
    if block < c_blocks:
        c = block * BN + tl.arange(0, BN)
        for step in range(0, CHUNK, BK):
            first = chunk * CHUNK + step
            m = first + i
            a = load_operand(dy + row_offset(m, K)[None, :] + k[:, None], kmask & (m < M)[None, :])
            source = up + _shuffled(first, BK, C, H, W)[:, None] + c[None, :] * 4
            acc = dot(a, load_operand(source, (m < M)[:, None] & (c < C)[None, :]), acc, PRECISION)
        tl.store(base + c[None, :], acc, mask=kmask & (c < C)[None, :])
    else:
        s = (block - c_blocks) * BN + tl.arange(0, BN)
        for step in range(0, CHUNK, BK):
            m = chunk * CHUNK + step + i
            a = load_operand(dy + row_offset(m, K)[None, :] + k[:, None], kmask & (m < M)[None, :])
            source = skip + row_offset(m, S)[:, None] + s[None, :]
            acc = dot(a, load_operand(source, (m < M)[:, None] & (s < S)[None, :]), acc, PRECISION)
        tl.store(base + wide(C) + s[None, :], acc, mask=kmask & (s < S)[None, :])


def pixel_shuffle_skip(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """up (N, 4C, H, W), skip (N, S, 2H, 2W), weight (K, C + S, 1, 1), bias (K,) or None -> (N, K, 2H, 2W)."""
    n, c4, h, w = up.shape
    c, s, k = c4 // 4, skip.shape[1], weight.shape[0]
    m = n * h * w * 4
    tile = gemm_tile(m, k, max(c, s), up.dtype)
    col_blocks = cdiv(k, tile.n)
    out = empty_image(n, k, 2 * h, 2 * w, like=up)
    launch(
        _pixel_shuffle_skip_fwd_kernel, cdiv(m, tile.m) * col_blocks,
        up, skip, weight, bias, out, m, k, c, s, h, w, col_blocks,
        BIAS=bias is not None, PRECISION=matmul_precision(up.dtype),
        BM=tile.m, BN=tile.n, BK=tile.k, ACC=acc_triton(up.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def pixel_shuffle_skip_backward(
    dy: Tensor, up: Tensor, skip: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dup like up, dskip like skip; dweight (1, parts, K * (C + S)) and dbias (N, parts, K), accumulation type."""
    n, c4, h, w = up.shape
    c, s, k = c4 // 4, skip.shape[1], weight.shape[0]
    precision, acc = matmul_precision(up.dtype), acc_triton(up.dtype)

    rows = n * h * w
    # four accumulators and five operands at a time: a quarter of the tile's width, half of its depth
    tile = gemm_tile(min(rows, 64), min(c, 32), min(k, 32 if up.element_size() == 2 else 16), up.dtype)
    col_blocks = cdiv(c, tile.n)
    dup = empty_image(n, c4, h, w, like=up)
    launch(
        _pixel_shuffle_skip_bwd_up_kernel, cdiv(rows, tile.m) * col_blocks,
        dy, weight, dup, rows, k, c, s, h, w, col_blocks,
        PRECISION=precision, BM=tile.m, BN=tile.n, BK=tile.k, ACC=acc,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip

    # a plain product of rows: the library's
    dy_rows = dy.permute(0, 2, 3, 1).reshape(rows * 4, k)
    dskip = (dy_rows @ weight.reshape(k, c + s)[:, c:]).reshape(n, 2 * h, 2 * w, s).permute(0, 3, 1, 2)

    m = rows * 4
    chunk = weight_grad_chunk(m)
    tile = gemm_tile(k, max(c, s), min(m, chunk), up.dtype)
    chunks, k_blocks, c_blocks, s_blocks = cdiv(m, chunk), cdiv(k, tile.m), cdiv(c, tile.n), cdiv(s, tile.n)
    part = empty_acc(chunks, k, c + s, like=up)
    launch(
        _pixel_shuffle_skip_bwd_weight_kernel, chunks * k_blocks * (c_blocks + s_blocks),
        dy, up, skip, part, m, k, c, s, h, w, k_blocks, c_blocks, s_blocks,
        PRECISION=precision, CHUNK=chunk, BM=tile.m, BN=tile.n, BK=tile.k, ACC=acc,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dup, dskip, part.reshape(1, chunks, k * (c + s)), channel_sums(dy)
