"""Depthwise k x k convolution (k odd, up to 9), bias and GELU, by streaming image rows.

A program owns one image, a few channels, a run of columns and a run of rows. It walks down the rows: every input row
is loaded k times, shifted by one pixel each (the cache serves all but the first), and added into the k output rows it
touches, whose accumulators move up by one a row. So nothing is loaded k * k times, and a finished row is written once.

Images (N, C, H, W) with channels_last memory; weight (C, 1, k, k), bias (C,) or None.
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
    gelu,
    gelu_grad,
    kernel,
    launch,
    load,
    row_offset,
    store,
    wide,
)
from dico_kernels.kernels.tiles import DepthwiseTile, depthwise_backward_tile, depthwise_tile

# The fused backward holds k * k accumulators of the weight gradient beside dx's: more than 9 do not fit in registers.
_FUSED_K = 3


@triton.jit
def _taps(weight, c, C, K: tl.constexpr, FLIP: tl.constexpr, ACC: tl.constexpr):
    """The k * k taps of each channel, as a tuple of [1, channels] rows."""
    taps = ()
    for t in tl.static_range(K * K):
        at = K * K - 1 - t if FLIP else t
        taps = taps + (load(weight + row_offset(c, K * K)[None, :] + wide(at), (c < C)[None, :], ACC),)
    return taps


@kernel
def _depthwise_fwd_kernel(
    x, weight, bias, dy, y,
    C, H, W, row_blocks, col_blocks, channel_blocks,
    K: tl.constexpr, BIAS: tl.constexpr, EPILOGUE: tl.constexpr, FLIP: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """EPILOGUE: "none"; "gelu"; "dz", which writes dy * GELU'(z) instead of GELU(z)."""
    P: tl.constexpr = K // 2
    pid = tl.program_id(0)
    c = wide(pid % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    pid = pid // channel_blocks
    if K < 7:
        w = wide(pid % col_blocks) * WIDTH + tl.arange(0, WIDTH)
    else:  # 49 taps leave no registers to compare columns in 64 bits with, which fewer taps are compiled better for
        w = pid % col_blocks * WIDTH + tl.arange(0, WIDTH)
    pid = pid // col_blocks
    first = wide(pid % row_blocks) * HEIGHT
    image = wide(pid // row_blocks) * H
    last = tl.minimum(first + HEIGHT, H)
    inner = row_offset(w, C)[:, None] + c[None, :]
    mask = (w < W)[:, None] & (c < C)[None, :]
    taps = _taps(weight, c, C, K, FLIP, ACC)
    start = tl.zeros([WIDTH, CHANNELS], ACC)
    if BIAS:
        start += load(bias + c[None, :], (c < C)[None, :], ACC)
    rows = ()
    for _ in tl.static_range(K):
        rows = rows + (start,)
    for r in range(first - P, last + P):
        source = x + row_offset((image + r) * W, C) + inner
        inside = (r >= 0) & (r < H)
        for kx in tl.static_range(K):
            shifted = w + (kx - P)
            ok = inside & ((shifted >= 0) & (shifted < W))[:, None] & (c < C)[None, :]
            v = load(source + (kx - P) * wide(C), ok, ACC)
            # rows[j] belongs to output row r - P + j, which meets input row r with tap row K - 1 - j
            added = ()
            for j in tl.static_range(K):
                added = added + (rows[j] + v * taps[(K - 1 - j) * K + kx],)
            rows = added
        done = r - P
        z = rows[0]
        offset = row_offset((image + done) * W, C) + inner
        write = mask & (done >= first)
        if EPILOGUE == "gelu":
            z = gelu(z)
        elif EPILOGUE == "dz":
            z = load(dy + offset, write, ACC) * gelu_grad(z)
        store(y + offset, z, write)
        moved = ()
        for j in tl.static_range(1, K):
            moved = moved + (rows[j],)
        rows = moved + (start,)


@kernel
def _depthwise_bwd_kernel(
    dz, x, weight, dx, taps_out, bias_out,
    C, H, W, row_blocks, col_blocks, channel_blocks,
    K: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx and the partial dweight and dbias in one walk over dz: both need the same shifted rows of it.

    Row s of dz, shifted by kx, meets row r = s + ky - P of x: dx[r] += tap[ky, kx] * dz, dtap[ky, kx] += x[r] * dz.
    """
    P: tl.constexpr = K // 2
    pid = tl.program_id(0)
    channel_block = pid % channel_blocks
    c = wide(channel_block) * CHANNELS + tl.arange(0, CHANNELS)
    stream = pid // channel_blocks
    w = wide(stream % col_blocks) * WIDTH + tl.arange(0, WIDTH)
    band = stream // col_blocks
    first = wide(band % row_blocks) * HEIGHT
    image = wide(band // row_blocks) * H
    last = tl.minimum(first + HEIGHT, H)
    inner = row_offset(w, C)[:, None] + c[None, :]
    mask = (w < W)[:, None] & (c < C)[None, :]
    taps = _taps(weight, c, C, K, False, ACC)
    zero = tl.zeros([WIDTH, CHANNELS], ACC)
    bias_sum = zero
    dtaps = ()
    for _ in tl.static_range(K * K):
        dtaps = dtaps + (zero,)
    dxs = ()
    xs = ()
    # At row s the walk holds rows s - P .. s + P of dx and of x; rows of x outside [first, last) count as zero, since
    # another program adds them up.
    for _ in tl.static_range(K):
        dxs = dxs + (zero,)
    for j in tl.static_range(K - 1):
        r = first - 2 * P + j
        xs = xs + (load(x + row_offset((image + r) * W, C) + inner, mask & (r >= first) & (r < last), ACC),)
    for s in range(first - P, last + P):
        r = s + P
        xs = xs + (load(x + row_offset((image + r) * W, C) + inner, mask & (r >= first) & (r < last), ACC),)
        source = dz + row_offset((image + s) * W, C) + inner
        inside = (s >= 0) & (s < H)
        for kx in tl.static_range(K):
            shifted = w + (P - kx)
            ok = inside & ((shifted >= 0) & (shifted < W))[:, None] & (c < C)[None, :]
            d = load(source + (P - kx) * wide(C), ok, ACC)
            added = ()
            counted = ()
            for ky in tl.static_range(K):
                added = added + (dxs[ky] + d * taps[ky * K + kx],)
                for i in tl.static_range(K):
                    if i == kx:
                        counted = counted + (dtaps[ky * K + i] + d * xs[ky],)
                    else:
                        counted = counted + (dtaps[ky * K + i],)
            dxs = added
            dtaps = counted
            if kx == P:
                bias_sum += tl.where((s >= first) & (s < last), d, 0.0)
        done = s - P
        store(dx + row_offset((image + done) * W, C) + inner, dxs[0], mask & (done >= first))
        moved = ()
        kept = ()
        for j in tl.static_range(1, K):
            moved = moved + (dxs[j],)
            kept = kept + (xs[j],)
        dxs = moved + (zero,)
        xs = kept
    for t in tl.static_range(K * K):
        tl.store(taps_out + ((row_offset(stream, C) + c) * (K * K) + t), tl.sum(dtaps[t], axis=0), mask=c < C)
    tl.store(bias_out + row_offset(stream, C) + c, tl.sum(bias_sum, axis=0), mask=c < C)


@kernel
def _depthwise_bwd_weight_kernel(
    dz, x, taps_out, bias_out,
    C, H, W, row_blocks, col_blocks, channel_blocks,
    K: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every tap in one walk over x, whose row r, shifted by kx, meets row r - ky + P of dz: dtap[ky, kx] += x * dz.

    So each row of x is loaded k times and each of dz once, for k * k products of every pixel.
    """
    P: tl.constexpr = K // 2
    pid = tl.program_id(0)
    c = wide(pid % channel_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    stream = pid // channel_blocks
    w = stream % col_blocks * WIDTH + tl.arange(0, WIDTH)
    band = stream // col_blocks
    first = wide(band % row_blocks) * HEIGHT
    image = wide(band // row_blocks) * H
    last = tl.minimum(first + HEIGHT, H)
    inner = row_offset(w, C)[:, None] + c[None, :]
    mask = (w < W)[:, None] & (c < C)[None, :]
    zero = tl.zeros([WIDTH, CHANNELS], ACC)
    bias_sum = zero
    dtaps = ()
    for _ in tl.static_range(K * K):
        dtaps = dtaps + (zero,)
    # At row r of x the walk holds rows r - P .. r + P of dz; those outside [first, last) count as zero, since another
    # program adds them up.
    ds = ()
    for _ in tl.static_range(K - 1):
        ds = ds + (zero,)
    for q in range(first, last + 2 * P):
        r = q - P
        d = load(dz + row_offset((image + q) * W, C) + inner, mask & (q < last), ACC)
        bias_sum += d
        ds = ds + (d,)
        source = x + row_offset((image + r) * W, C) + inner
        inside = (r >= 0) & (r < H)
        xs = ()
        for kx in tl.static_range(K):
            shifted = w + (kx - P)
            ok = inside & ((shifted >= 0) & (shifted < W))[:, None] & (c < C)[None, :]
            xs = xs + (load(source + (kx - P) * wide(C), ok, ACC),)
        added = ()
        for ky in tl.static_range(K):
            for kx in tl.static_range(K):
                added = added + (dtaps[ky * K + kx] + xs[kx] * ds[K - 1 - ky],)
        dtaps = added
        kept = ()
        for j in tl.static_range(1, K):
            kept = kept + (ds[j],)
        ds = kept
    for t in tl.static_range(K * K):
        tl.store(taps_out + ((row_offset(stream, C) + c) * (K * K) + t), tl.sum(dtaps[t], axis=0), mask=c < C)
    tl.store(bias_out + row_offset(stream, C) + c, tl.sum(bias_sum, axis=0), mask=c < C)


def _grid(x: Tensor, tile: DepthwiseTile) -> tuple[int, int, int]:
    _, c, h, w = x.shape
    return cdiv(h, tile.height), cdiv(w, tile.width), cdiv(c, tile.channels)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, dy: Tensor | None, epilogue: str, flip: bool = False
) -> Tensor:
    n, c, h, w = x.shape
    k = weight.shape[-1]
    tile = depthwise_tile(n, c, h, w, k, x.dtype)
    blocks = _grid(x, tile)
    y = empty_image(n, c, h, w, like=x)
    launch(
        _depthwise_fwd_kernel, n * blocks[0] * blocks[1] * blocks[2],
        x, weight, bias, dy, y, c, h, w, *blocks,
        K=k, BIAS=bias is not None, EPILOGUE=epilogue, FLIP=flip,
        HEIGHT=tile.height, WIDTH=tile.width, CHANNELS=tile.channels, ACC=acc_triton(x.dtype),
        # the slope of GELU takes registers that 7x7 does not have to spare
        num_warps=tile.warps, maxnreg=None if epilogue == "dz" and k > 3 else tile.maxnreg,
    )  # fmt: skip
    return y


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Depthwise convolution with zero padding k // 2, plus bias, through GELU if asked; like x."""
    return _forward(x, weight, bias, None, "gelu" if gelu else "none")


def depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x; dweight (1, parts, C * k * k) and dbias (1, parts, C), accumulation type, with or without a bias.

    With GELU a first pass recomputes z and stores dz = dy * GELU'(z) in x's type: dx and dweight need dz at every
    pixel's neighbours too, and recomputing z there again would cost more than this one write and read.
    """
    n, c, h, w = x.shape
    k = weight.shape[-1]
    dz = _forward(x, weight, bias, dy, "dz") if gelu else dy
    tile = depthwise_backward_tile(c, w, k, x.dtype)
    blocks = _grid(x, tile)
    streams = n * blocks[0] * blocks[1]
    parts = empty_acc(1, streams, c * k * k, like=x), empty_acc(1, streams, c, like=x)
    shape = {"K": k, "HEIGHT": tile.height, "WIDTH": tile.width, "CHANNELS": tile.channels, "ACC": acc_triton(x.dtype)}
    if k <= _FUSED_K:
        dx = empty_image(n, c, h, w, like=x)
        launch(
            _depthwise_bwd_kernel, streams * blocks[2],
            dz, x, weight, dx, *parts, c, h, w, *blocks, **shape, num_warps=tile.warps,
        )  # fmt: skip
    else:
        dx = _forward(dz, weight, None, None, "none", flip=True)
        launch(
            _depthwise_bwd_weight_kernel, streams * blocks[2],
            dz, x, *parts, c, h, w, *blocks, **shape, num_warps=tile.warps, maxnreg=tile.maxnreg,
        )  # fmt: skip
    return dx, *parts
