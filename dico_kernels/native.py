"""The native kernels, built from csrc/, as functions of tensors.

The extension knows pointers and sizes only; every check that keeps them valid is here, and in the modules that what is
not defined here comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dico_kernels._channel import channel_affine as channel_affine
from dico_kernels._channel import channel_dots as channel_dots
from dico_kernels._channel import channel_sums as channel_sums
from dico_kernels._channel import grn_rescale as grn_rescale
from dico_kernels._channel import grn_scale as grn_scale
from dico_kernels._channel import grn_scale_backward as grn_scale_backward
from dico_kernels._convolution import convolution as convolution
from dico_kernels._convolution import convolution_gradient as convolution_gradient
from dico_kernels._convolution import convolution_weight_gradient as convolution_weight_gradient
from dico_kernels._extension import available as available
from dico_kernels._extension import build as build
from dico_kernels._extension import call
from dico_kernels._extension import extension as extension
from dico_kernels._extension import grain as grain
from dico_kernels._extension import isa as isa
from dico_kernels._extension import isas as isas
from dico_kernels._extension import why_unavailable as why_unavailable
from dico_kernels._extension import with_cuda as with_cuda
from dico_kernels._gemm import form
from dico_kernels._gemm import multiplies as multiplies
from dico_kernels._gemm import pointwise as pointwise
from dico_kernels._linear import from_rows, linear, rows
from dico_kernels._memory import DTYPES, dense, image, kind, like, reduced, row_blocks, shuffled, vector, wide_stream
from dico_kernels._packed import ONEDNN, packed
from dico_kernels._vectors import cca_gate as cca_gate
from dico_kernels._vectors import channel_attention as channel_attention
from dico_kernels._vectors import channel_attention_backward as channel_attention_backward
from dico_kernels._vectors import conditioning as conditioning
from dico_kernels._weight_gradients import gated_products as gated_products
from dico_kernels._weight_gradients import has_faster_weight_gradient as has_faster_weight_gradient
from dico_kernels._weight_gradients import weight_gradient as weight_gradient
from dico_kernels._winograd import winograd as winograd
from dico_kernels.dtypes import accumulation_dtype

# ---- adaLN and the gated residual: csrc/cpu/adaln.h ----


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over channels without affine, then * (1 + scale) + shift.

    Args:
        x: (N, C, H, W) in channels_last memory, on a CPU or (where built) a CUDA device.
        shift: (N, C) or (1, C), no gaps in a row, of x's device and dtype; also 16-bit where x is float32.
        scale: as shift.
        eps: added to the variance.

    Returns:
        y as x but of shift's dtype, and each pixel's mean and 1 / deviation, (N, H, W) in the accumulation dtype.

    Raises:
        ValueError: a wrong rank, size, layout, dtype or device, naming the argument.
        ImportError: the extension was not built.
        RuntimeError: a CUDA error, or a CUDA tensor with an extension built without CUDA.
    """
    image("x", x)
    dtype = shift.dtype
    wide = wide_stream(x, dtype)
    strides = vector("shift", shift, x, dtype), vector("scale", scale, x, dtype)
    if x.device.type == "cuda" and wide:
        # The CUDA kernel knows one dtype: the vectors widen without loss, and y is rounded once either way.
        y, mean, rstd = adaln_modulate(x, shift.to(x.dtype), scale.to(x.dtype), eps)
        return y.to(dtype), mean, rstd
    n, _, h, w = x.shape
    y, mean, rstd = like(x, dtype), reduced(x, n, h, w), reduced(x, n, h, w)
    if x.device.type != "cuda":
        args = (x, shift, scale, y, mean, rstd, *strides, eps, wide)
        call("adaln_modulate", x, *row_blocks(x)[:4], *args, dtype=dtype)
        return y, mean, rstd
    if not with_cuda():
        raise RuntimeError(f"x is on {x.device}, but the extension has no CUDA code: {build()['cuda']}")
    _launch_adaln((x, shift, scale, y, mean, rstd), strides, eps)
    return y, mean, rstd


def _launch_adaln(tensors: tuple[Tensor, ...], strides: tuple[int, int], eps: float) -> None:
    """csrc/cuda/adaln.cu on x's device and that device's current stream."""
    x = tensors[0]
    n, c, h, w = x.shape
    pointers = [t.data_ptr() for t in tensors]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        extension().adaln_modulate_cuda(DTYPES[x.dtype], n, h * w, c, *pointers, *strides, eps, x.device.index, stream)


def adaln_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of adaln_modulate: dx as x; dshift and dscale per sample, (N, C) in the accumulation dtype."""
    image("x", x)
    image("dy", dy, x)
    stride = vector("scale", scale, x)
    _statistics(x, mean, rstd)
    n, c = x.shape[:2]
    *sizes, blocks = row_blocks(x)
    dx, dshift, dscale, partial = like(x), reduced(x, n, c), reduced(x, n, c), reduced(x, blocks, 2, c)
    call("adaln_modulate_backward", x, *sizes, dy, x, scale, mean, rstd, dx, dshift, dscale, partial, stride)
    return dx, dshift, dscale


def adaln_modulate_backward_residual(
    dh: Tensor, dy: Tensor | None, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a residual around adaLN: dx, with dy (if any) added; h, adaLN's output anew; dshift, dscale per sample.

    x, dy and dx may be float32 though all else is a 16-bit type. h takes dh's memory.
    """
    image("x", x)
    image("dh", dh)
    if dy is not None:
        image("dy", dy, x)
    dtype = dh.dtype
    wide = wide_stream(x, dtype)
    if dh.shape != x.shape or dh.device != x.device:
        raise ValueError(f"dh has shape {tuple(dh.shape)} on {dh.device}: expected {tuple(x.shape)} on {x.device}")
    strides = vector("shift", shift, x, dtype), vector("scale", scale, x, dtype)
    _statistics(x, mean, rstd)
    n, c = x.shape[:2]
    *sizes, blocks = row_blocks(x)
    outs = (like(x), dh, reduced(x, n, c), reduced(x, n, c))
    args = (dh, dy, x, shift, scale, mean, rstd, *outs, reduced(x, blocks, 2, c), *strides, wide)
    call("adaln_modulate_backward_residual", x, *sizes, *args, dtype=dtype)
    return outs


def _statistics(x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    n, _, h, w = x.shape
    for name, t in (("mean", mean), ("rstd", rstd)):
        dense(name, t, (n, h, w), accumulation_dtype(x.dtype), x.device)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, overwrite: bool = False) -> Tensor:
    """x + gate * branch as x; gate (N, C) or (1, C). x may be float32 though branch and gate are a 16-bit type.

    With overwrite the result may take the branch's memory.
    """
    image("x", x)
    image("branch", branch)
    dtype = branch.dtype
    wide = wide_stream(x, dtype)
    if branch.shape != x.shape or branch.device != x.device:
        raise ValueError(f"branch has shape {tuple(branch.shape)} on {branch.device}: expected {tuple(x.shape)}, x's")
    stride = vector("gate", gate, x, dtype)
    y = branch if overwrite and not wide else like(x)
    call("gated_residual", x, *row_blocks(x)[:4], x, branch, gate, y, stride, wide, dtype=dtype)
    return y


def gate_gradient(dy: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gate * dy, dy, the sums over (H, W) of dy, of gate * dy): two of gate's dtype, two (N, C), accumulation dtype.

    dy may be float32 though gate is a 16-bit type; where it is not, the second result is dy itself.
    """
    image("dy", dy)
    dtype = gate.dtype
    wide = wide_stream(dy, dtype)
    stride = vector("gate", gate, dy, dtype)
    *sizes, blocks = row_blocks(dy)
    n, c = dy.shape[:2]
    dbranch, sums, gated = like(dy, dtype), reduced(dy, n, c), reduced(dy, n, c)
    narrow = like(dy, dtype) if wide else dy
    args = (dy, gate, dbranch, narrow, sums, gated, reduced(dy, blocks, c), stride, wide)
    call("gate_gradient", dy, *sizes, *args, dtype=dtype)
    return dbranch, narrow, sums, gated


def gated_residual_backward(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gated_residual but x's, which is dy: dbranch, and dgate per sample, (N, C), accumulation dtype."""
    image("dy", dy)
    image("branch", branch, dy)
    stride = vector("gate", gate, dy)
    n, c = dy.shape[:2]
    *sizes, blocks = row_blocks(dy)
    dbranch, dgate, partial = like(dy), reduced(dy, n, c), reduced(dy, blocks, c)
    call("gated_residual_backward", dy, *sizes, dy, branch, gate, dbranch, dgate, partial, stride)
    return dbranch, dgate


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd): y = x + gate * branch, rounded; h = adaLN of that y; mean, rstd as adaln_modulate's."""
    image("x", x)
    image("branch", branch, x)
    strides = vector("gate", gate, x), vector("shift", shift, x), vector("scale", scale, x)
    n, _, height, width = x.shape
    y, h, mean, rstd = like(x), like(x), reduced(x, n, height, width), reduced(x, n, height, width)
    args = (x, branch, gate, shift, scale, y, h, mean, rstd, *strides, eps)
    call("gated_residual_adaln", x, *row_blocks(x)[:4], *args)
    return y, h, mean, rstd


def gated_residual_adaln_backward(
    dy: Tensor, dh: Tensor, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dgate, dshift, dscale) of gated_residual_adaln; the vectors per sample, accumulation dtype."""
    image("y", y)
    for name, t in (("dy", dy), ("dh", dh), ("branch", branch)):
        image(name, t, y)
    strides = vector("gate", gate, y), vector("scale", scale, y)
    _statistics(y, mean, rstd)
    n, c = y.shape[:2]
    *sizes, blocks = row_blocks(y)
    dx, dbranch = like(y), like(y)
    dgate, dshift, dscale = reduced(y, n, c), reduced(y, n, c), reduced(y, n, c)
    ins = (dy, dh, y, branch, gate, scale, mean, rstd)
    outs = (dx, dbranch, dgate, dshift, dscale, reduced(y, blocks, 3, c))
    call("gated_residual_adaln_backward", y, *sizes, *ins, *outs, *strides)
    return dx, dbranch, dgate, dshift, dscale


# ---- sums in parts: csrc/cpu/sums.h ----


def add_up(parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The sums over the middle dimension of each, (groups, count, C) in dtype's accumulation dtype, as dtype."""
    found = []
    for part in parts:
        groups, count, c = part.shape
        dense("part", part, (groups, count, c), accumulation_dtype(dtype), part.device)
        out = torch.empty((groups, c), dtype=dtype, device=part.device)
        call("add_up", part, part, out, groups, count, c, dtype=dtype)
        found.append(out)
    return found


# ---- depthwise convolution: csrc/cpu/depthwise.h ----


def _depthwise_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> tuple[int, ...]:
    """Check the weights; (images, height, width, channels, k, gelu, block_height) as the kernels want them.

    An image is cut into blocks of rows where images and channels alone would not occupy a machine, by shape only.
    """
    n, c, h, w = x.shape
    k = weight.shape[-1] if weight.ndim else 0
    if k not in (1, 3, 5, 7, 9):
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected ({c}, 1, k, k) with k in 1, 3, 5, 7, 9")
    dense("weight", weight, (c, 1, k, k), x.dtype, x.device)
    if bias is not None:
        dense("bias", bias, (c,), x.dtype, x.device)
    wanted = max(16 // max(n * -(-c // 64), 1), 1)
    block = max(-(-h // wanted), min(h, 8))
    return n, h, w, c, k, int(gelu), block


def _depthwise_scratch(x: Tensor, k: int, backward: bool) -> Tensor:
    if x.device.type != "cpu":
        return x  # about to be refused
    threads = torch.get_num_threads()
    size = extension().depthwise_scratch(DTYPES[x.dtype], threads, x.shape[1], x.shape[3], k, backward)
    return torch.empty(size, dtype=torch.uint8, device="cpu")


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Depthwise k x k convolution with zero padding k // 2, through GELU if gelu; weight (C, 1, k, k), bias (C,)."""
    image("x", x)
    sizes = _depthwise_sizes(x, weight, bias, gelu)
    y = like(x)
    call("depthwise", x, x, weight, bias, y, None, None, _depthwise_scratch(x, sizes[4], False), *sizes)
    return y


def depthwise_sums(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> tuple[Tensor, Tensor]:
    """depthwise, and the sums over (H, W) of its output, (N, C) in the accumulation dtype."""
    image("x", x)
    sizes = _depthwise_sizes(x, weight, bias, gelu)
    n, h, _, c, k, _, block = sizes
    y, sums, partial = like(x), reduced(x, n, c), reduced(x, n * -(-h // block), c)
    call("depthwise", x, x, weight, bias, y, sums, partial, _depthwise_scratch(x, k, False), *sizes)
    return y, sums


def depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of depthwise: dx as x; dweight (C, 1, k, k) and dbias (C,) in the accumulation dtype."""
    image("x", x)
    image("dy", dy, x)
    sizes = _depthwise_sizes(x, weight, bias, gelu)
    n, h, _, c, k, _, block = sizes
    partitions = min(n * -(-h // block), 64)
    dx, dweight, dbias = like(x), reduced(x, c, 1, k, k), reduced(x, c)
    partial = reduced(x, partitions, k * k + 1, c)
    outs = (dx, dweight, dbias, partial, _depthwise_scratch(x, k, True))
    call("depthwise_backward", x, dy, x, weight, bias, *outs, *sizes, partitions)
    return dx, dweight, dbias


# ---- PixelShuffle, skip and 1x1 convolution: csrc/cpu/pixel_shuffle.h ----

# Bytes of the concatenated rows that exist at any time. Fewer, and the product reads a wide weight too often.
_CHUNK_BYTES = 1 << 24


def _shuffle_views(up: Tensor, skip: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check; up as (N*H, W, 4C), skip as (N*H, 4W, S), weight as (K, C + S)."""
    shuffled("up", up, skip)
    n, c4, h, w = up.shape
    s = skip.shape[1]
    dense("weight", weight, (weight.shape[0], c4 // 4 + s, 1, 1), up.dtype, up.device)
    return (
        up.permute(0, 2, 3, 1).reshape(n * h, w, c4),
        skip.permute(0, 2, 3, 1).reshape(n * h, 4 * w, s),
        weight.reshape(weight.shape[0], -1),
    )


def _shuffle_chunks(up: Tensor, wide: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of up, the pixels of the large image that they make, and scratch for those pixels' concatenated channels."""
    rows, width = up.shape[:2]
    step = min(max(_CHUNK_BYTES // (4 * width * wide * up.element_size()), 1), rows)
    scratch = up.new_empty(4 * width * step, wide)
    for first in range(0, rows, step):
        end = min(first + step, rows)
        yield slice(first, end), slice(4 * width * first, 4 * width * end), scratch[: 4 * width * (end - first)]


def pixel_shuffle_skip(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, own: bool = True) -> Tensor:
    """1x1 convolution of cat[PixelShuffle(2)(up), skip]: up (N, 4C, H, W), skip (N, S, 2H, 2W), weight (K, C+S, 1, 1).

    The concatenation exists a few rows at a time, or with own, where our product is the faster one, nowhere.
    """
    small, large, matrix = _shuffle_views(up, skip, weight)
    k, wide = matrix.shape
    if bias is not None:
        dense("bias", bias, (k,), up.dtype, up.device)
    own = own and multiplies(weight)
    out, kept = None, packed(weight, form() if own else ONEDNN)
    # Ours joins nothing; but to pack a weight for it takes longer than that saves where the pixels are few.
    if own and (kept is not None or 4 * large.shape[0] * large.shape[1] >= k):
        return pointwise(up, weight, bias, skip=skip, kept=kept, frozen=False).y
    for part, pixels, cat in _shuffle_chunks(small, wide):
        sizes = (part.stop - part.start, small.shape[1], small.shape[2] // 4, large.shape[2])
        call("shuffle_gather", up, small[part], large[part], cat, *sizes)
        product = linear(cat, matrix if kept is None else kept, bias)
        if part.stop - part.start == small.shape[0]:
            return from_rows(product, skip)
        if out is None:
            size = (skip.shape[0], k, *skip.shape[2:])
            out = torch.empty(size, dtype=up.dtype, device=up.device, memory_format=torch.channels_last)
        rows(out)[pixels] = product
    assert out is not None
    return out


def pixel_shuffle_skip_backward(
    dy: Tensor, up: Tensor, skip: Tensor, weight: Tensor, own: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of pixel_shuffle_skip: dup, dskip; dweight (K, C+S, 1, 1), and per sample dbias (N, K).

    dweight is in the accumulation dtype or in weight's, dbias in the former. own as in the forward.
    """
    small, large, matrix = _shuffle_views(up, skip, weight)
    k, wide = matrix.shape
    n, _, height, width = skip.shape
    image("dy", dy)
    if dy.shape != (n, k, height, width):
        raise ValueError(f"dy has shape {tuple(dy.shape)}: expected {(n, k, height, width)}")
    kind("dy", dy, up.dtype, up.device)
    own = own and multiplies(weight)
    dy_rows = rows(dy)
    dup, dskip = like(up), like(skip)
    dsmall = dup.permute(0, 2, 3, 1).reshape(small.shape)
    dlarge = dskip.permute(0, 2, 3, 1).reshape(large.shape)
    dweight = None
    for part, pixels, cat in _shuffle_chunks(small, wide):
        sizes = (part.stop - part.start, small.shape[1], small.shape[2] // 4, large.shape[2])
        given = dy_rows[pixels]
        call("shuffle_gather", up, small[part], large[part], cat, *sizes)
        if own and has_faster_weight_gradient(up.dtype):
            products = weight_gradient(given[None], cat[None])[0]
        else:
            products = torch.mm(given.t(), cat)
        if part.stop - part.start < small.shape[0]:  # the first of several, or a later one
            products = products.to(accumulation_dtype(up.dtype))
        dweight = products if dweight is None else dweight.add_(products)
        if own:
            cat = rows(pointwise(given.t()[None, :, :, None], matrix.t(), None, frozen=False).y)
        else:
            cat = linear(given, matrix.t())
        call("shuffle_scatter", up, dsmall[part], dlarge[part], cat, *sizes)
    assert dweight is not None
    return dup, dskip, dweight.reshape(k, wide, 1, 1), channel_sums(dy)


# ---- between two 1x1 convolutions: csrc/cpu/pointwise.h ----


def gelu(x: Tensor, squares: bool) -> tuple[Tensor, Tensor | None]:
    """GELU in its exact form; with squares also the sums over (H, W) of its square, (N, C), accumulation dtype."""
    image("x", x)
    *sizes, blocks = row_blocks(x)
    n, c = x.shape[:2]
    y, sums, partial = like(x), None, None
    if squares:
        sums, partial = reduced(x, n, c), reduced(x, blocks, c)
    call("gelu", x, *sizes, x, y, sums, partial)
    return y, sums


def gelu_backward(
    dy: Tensor, x: Tensor, s: Tensor | None = None, r: Tensor | None = None, keep: bool = False, overwrite: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, gelu(x) if keep, the sums over (H, W) of dx); with s and r, (N, C), of s * dy + r * gelu(x) instead of dy.

    With overwrite dx may take dy's memory.
    """
    image("x", x)
    image("dy", dy, x)
    if (s is None) != (r is None):
        raise ValueError("s and r belong together: expected both or neither")
    n, c = x.shape[:2]
    for name, v in (("s", s), ("r", r)):
        if v is not None:
            dense(name, v, (n, c), accumulation_dtype(x.dtype), x.device)
    *sizes, blocks = row_blocks(x)
    dx, sums, y = dy if overwrite else like(x), reduced(x, n, c), like(x) if keep else None
    call("gelu_backward", x, *sizes, dy, x, s, r, dx, y, sums, reduced(x, blocks, c))
    return dx, y, sums
