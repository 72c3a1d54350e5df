"""Tile shapes and warps by rule, from shapes and types alone: no timing at first call, the same result every run.

A thread should hold some 8 to 16 elements of each tensor: enough loads in flight to cover memory latency, few enough
to stay out of spills. Sums are partitioned by the shape of one sample only, never by the batch, so a sample's have the
same bits in any batch; `pointwise_tile` is the exception: a small batch gets smaller tiles, and the sums and row
statistics that its epilogue writes are added up in another order.

The rules are remembered: in an eager step of a small batch the GPU waits for Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


def pow2(n: int) -> int:
    """The next power of two, n itself included."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class RowTile:
    """`rows` whole rows of C at a time (`cols` >= C), `span` rows of one sample a program."""

    rows: int
    cols: int
    span: int
    warps: int


@dataclass(frozen=True)
class BandTile:
    """`rows` rows by `cols` channels at a time, `span` rows of one sample a program."""

    rows: int
    cols: int
    span: int
    warps: int


@dataclass(frozen=True)
class DepthwiseTile:
    """A program streams `height` image rows, `width` pixels by `channels` at a time; `maxnreg` limits a thread."""

    height: int
    width: int
    channels: int
    warps: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class GemmTile:
    """An m x n tile of the result, k elements of the sum at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def _span(hw: int) -> int:
    # 16 programs a sample keep a GPU busy from small batches on; 64 rows make the partial sums 2-4% of the traffic.
    return min(max(pow2(hw // 16), 8), 64)


@cache
def row_tile(c: int, hw: int, tensors: int) -> RowTile:
    """Rows for LayerNorm: a row has to be in one program; `tensors` is how many tiles are live at once."""
    cols = pow2(c)
    if tensors > 2:
        # Backward: four and more tiles and sums that last as long as the program. Shared out to one or two warps they
        # would spill, and its programs are few, so a row's warps meet at barriers instead.
        elements, per_thread = 1024, 8
    elif cols > 256:
        # A row within one warp is summed by shuffles alone; where several share it, each of its sums is a trip through
        # shared memory with two barriers. 32 elements a thread still leave registers for 28 warps a multiprocessor.
        elements, per_thread = 1024, 32
    else:
        # each warp has whole rows to itself as it is
        elements, per_thread = 2048, 16
    rows = min(max(elements // cols, 1), 16, pow2(hw))
    warps = min(max(pow2(rows * cols // (32 * per_thread)), 1), 16)
    return RowTile(rows, cols, max(_span(hw), rows), warps)


@cache
def band_tile(c: int, hw: int) -> BandTile:
    """Rows by channels for sums over pixels and for elementwise work: no row has to be whole."""
    # 64 channels of bf16 are a full 128-byte line; no more than C needs when C is small.
    cols = min(pow2(c), 64)
    rows = min(max(2048 // cols, 1), 64, pow2(hw))
    return BandTile(rows, cols, max(_span(hw), rows), 4 if rows * cols >= 1024 else 1)


# Rows that one program streams, fewer where the image ends: 3x3 then reads 6% of its rows twice, and images of 32 rows
# and fewer, most of a latent model's, none.
_STREAM = 32
# Warps below which a GPU waits for memory rather than for instructions: 12 for each of an H100's 132 multiprocessors.
_BUSY = 1600


# Two programs of 8 warps, or four of 4, are 16 warps a multiprocessor; a register more, and the second does not fit.
_TWO_PROGRAMS = 128


@cache
def depthwise_tile(n: int, c: int, h: int, w: int, k: int, dtype: torch.dtype) -> DepthwiseTile:
    """The forward pass: k accumulators and k * k taps live in registers.

    A program's time is that of the rows it walks down, height + k - 1. So small batches get less height, half as often
    as there are not enough warps, though that reads more rows twice; the bits of a pixel do not depend on it.
    """
    # 32 divides DiCo's 416 and 352 and is a 64-byte run of bf16.
    channels = min(pow2(c), 32)
    width = min(pow2(w), 32 if k <= 3 else 16 if dtype != torch.float64 else 8)
    # Each channel that a thread owns costs it k * k taps: at most 8 elements a thread for 3x3, 2 for the larger.
    per_thread = (8 if k <= 3 else 2) // (2 if dtype == torch.float64 else 1)
    warps = min(max(pow2(width * channels // (32 * per_thread)), 1), 8)
    height = _STREAM
    while height > 2 and warps * n * -(-c // channels) * -(-w // width) * -(-h // height) < _BUSY:
        height //= 2
    # 3x3 takes up to 159 registers by itself, and spills none or two when held to the limit, outside of its loop. 7x7
    # takes some 154, and then reads one back in each row, of 175 instructions; 9x9 would a hundred.
    limited = k in (3, 7) and dtype != torch.float64
    return DepthwiseTile(height, width, channels, warps, _TWO_PROGRAMS if limited else None)


@cache
def depthwise_backward_tile(c: int, w: int, k: int, dtype: torch.dtype) -> DepthwiseTile:
    """Weight gradient: k * k accumulators, for k <= 3 with dx in the same pass."""
    channels = min(pow2(c), 32)
    width = min(pow2(w), 8 if k > 3 and dtype == torch.float64 else 16)
    # 18 tiles are live for k = 3: 4 elements a thread make that 72 registers. The larger have k * k + k, 56 for k = 7:
    # 2 elements a thread, and in the limit 8 of a row's 206 instructions move what did not fit.
    per_thread = (4 if k <= 3 else 2) // (2 if dtype == torch.float64 else 1)
    warps = min(max(pow2(width * channels // (32 * per_thread)), 1), 8)
    limited = k == 7 and dtype != torch.float64
    return DepthwiseTile(_STREAM, width, channels, warps, _TWO_PROGRAMS if limited else None)


@cache
def gemm_tile(m: int, n: int, k: int, dtype: torch.dtype) -> GemmTile:
    """A matrix product of m x k and k x n; each side at least 16, which tl.dot needs."""
    side_m, side_n = min(max(pow2(m), 16), 128), min(max(pow2(n), 16), 128)
    if dtype == torch.float64:  # twice the registers of float32, and no tensor cores worth feeding
        return GemmTile(min(side_m, 32), min(side_n, 32), 16, 4, 2)
    if dtype == torch.float32:  # halves the tile: exact float32 products keep both operands in registers
        return GemmTile(min(side_m, 64), min(side_n, 64), min(max(pow2(k), 16), 32), 4, 3)
    big = side_m * side_n >= 16384
    # 128 accumulators a thread would leave no registers for addresses: eight warps share the largest tile
    return GemmTile(side_m, side_n, min(max(pow2(k), 16), 32 if big else 64), 8 if big else 4, 3)


def weight_grad_chunk(m: int) -> int:
    """Rows of the long sum that one program of a weight gradient adds up: at most 64 partial results."""
    return max(pow2(-(-m // 64)), 1024)


@dataclass(frozen=True)
class PointwiseTile:
    """As GemmTile, with a limit of registers a thread, and whether operands come by TMA (9.x to 11.x)."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    maxnreg: int | None = None
    tma: bool = False


# Programs that fill the smallest GPU worth tuning for once (an A100 has 108 multiprocessors, an H100 132).
_FILL = 128


@cache
def pointwise_tile(m: int, n: int, k: int, dtype: torch.dtype, capability: int, heavy: bool) -> PointwiseTile:
    """A 1x1 convolution of m pixels, k to n channels; heavy: LayerNorm's prologue, GELU, or vectors of
    more than one sample a tile want registers.

    capability: see common.capability. Operands are assumed to be aligned to 16 bytes.
    """
    if dtype.itemsize > 2:
        t = gemm_tile(m, n, k, dtype)
        return PointwiseTile(t.m, t.n, t.k, t.warps, t.stages)
    side_m, side_n = min(max(pow2(m), 16), 128), min(max(pow2(n), 16), 128)
    # Fewer programs than multiprocessors: smaller tiles share the work out, and weights are read from L2 anyway.
    if -(-m // side_m) * -(-n // side_n) < _FILL:
        side_m = min(side_m, 64)
    if -(-m // side_m) * -(-n // side_n) < _FILL:
        side_n = min(side_n, 64)
    big = side_m * side_n >= 16384
    # TMA moves whole tiles with one instruction, and rows of them have to begin at multiples of 16 bytes.
    # Not on 12.x, whose kernels spill in that many registers.
    if 90 <= capability < 120 and k * dtype.itemsize % 16 == 0 and k >= 16:
        # 128 x 128 x 64 in 3 stages is 96 KiB: two programs a multiprocessor, so that one computes while the other is
        # in its epilogue. Both fit the register file too: 4 warps of 255 registers, or 8 of 128, which leave room for
        # a prologue in float32 or GELU.
        warps = 8 if big and heavy else 4
        return PointwiseTile(side_m, side_n, min(pow2(k), 64), warps, 3, 128 if warps == 8 else None, True)
    if k * dtype.itemsize % 16 != 0:
        # Such rows are loaded an element at a time, each by an address of its own: half as many a thread.
        return PointwiseTile(min(side_m, 64), side_n, min(max(pow2(k), 16), 32), 8 if side_n == 128 else 4, 3)
    depth = min(max(pow2(k), 16), 32 if big else 64)
    return PointwiseTile(side_m, side_n, depth, 8 if big else 4, 3)


@cache
def vector_tile(b: int, n: int, k: int, groups: int, dtype: torch.dtype, itemsize: int) -> GemmTile:
    """A product of b vectors of k with `groups` weights of n x k each: as many programs as read memory at its rate.

    itemsize: of the vectors, which may be wider than the weights.
    """
    depth = {2: 128 if itemsize == 2 else 64, 4: 32, 8: 16}[dtype.itemsize]
    # From 64 on Hopper would multiply by wgmma, for no gain here, and with the hazard that kernels/gemm.py describes.
    m, width = min(max(pow2(b), 16), 32 if dtype.itemsize == 2 else 16), min(max(pow2(n), 16), 64)
    # Twice as many as multiprocessors: first narrower, then fewer vectors, since weights are read again from L2 alone.
    while width > 16 and groups * -(-b // m) * -(-n // width) < 2 * _FILL:
        width //= 2
    while m > 16 and groups * -(-b // m) * -(-n // width) < 2 * _FILL:
        m //= 2
    # The largest in three stages stay within the 64 KiB that AMD's GPUs have.
    return GemmTile(m, width, min(max(pow2(k), 16), depth), 4 if m * width >= 512 else 2, 3 if m * width > 1024 else 4)
