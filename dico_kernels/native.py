"""The one door to ``dico_kernels._C``, the kernels built from csrc/.

The extension knows pointers and sizes only; every check that keeps them valid is here. torch is imported first, so that
the extension binds to torch's OpenMP runtime and the two share one pool of threads.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ISA_VARIABLE = "DICO_KERNELS_CPU_ISA"
# Numbered as csrc/include/dico/types.h numbers them.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
BUILD_HINT = "run `pip install -e .` in the clone (it needs a C++17 compiler) to build it"


def _load() -> tuple[Any, str]:
    """The extension module, or None and the reason."""
    try:
        module = importlib.import_module("dico_kernels._C")
    except ImportError as error:
        return None, f"dico_kernels._C cannot be imported ({error}); {BUILD_HINT}"
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        try:
            module.select_isa(wanted)
        except ValueError as error:
            raise ValueError(f"{ISA_VARIABLE}={wanted!r}: {error}") from None
    return module, ""


_C, why_unavailable = _load()


def available() -> bool:
    """Whether the extension is there; ``why_unavailable`` says why when it is not."""
    return _C is not None


def extension() -> Any:
    """The extension module.

    Raises:
        ImportError: it was not built or cannot be loaded; the message says what to do.
    """
    if _C is None:
        raise ImportError(why_unavailable)
    return _C


def with_cuda() -> bool:
    """Whether the extension was built with CUDA kernels."""
    return available() and bool(extension().build()["with_cuda"])


def isas() -> list[str]:
    """CPU instruction sets that were compiled in and run here, best first: of "v4", "v3", "base"."""
    return list(extension().available_isas())


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Within the context, CPU kernels run as compiled for one instruction set.

    Raises:
        ValueError: a name that is not in isas().
    """
    module = extension()
    before = module.selected_isa()
    module.select_isa(name)
    try:
        yield
    finally:
        module.select_isa(before)


def build() -> dict[str, Any]:
    """What the extension says of its own build: version, compiler, openmp, cuda, with_cuda."""
    return dict(extension().build())


# ---- arguments: the ops above check what a user gave; these checks only keep memory safe ----


def _image(name: str, t: Tensor, like: Tensor | None = None) -> None:
    """Refuse an image that is not dense channels_last memory of a dtype and, given ``like``, of its shape and kind."""
    if t.ndim != 4 or 0 in t.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: expected (N, C, H, W) with C, H, W > 0")
    if t.dtype not in _DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise ValueError(f"{name} has dtype {t.dtype}: expected {names}")
    if not t.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} has strides {t.stride()}: expected channels_last memory")
    if like is not None:
        if t.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: expected {tuple(like.shape)}")
        _kind(name, t, like.dtype, like.device)


def _kind(name: str, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if t.dtype != dtype or t.device != device:
        raise ValueError(f"{name} is {t.dtype} on {t.device}: expected {dtype} on {device}")


def _dense(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a tensor that is not contiguous memory of exactly this shape and kind."""
    if tuple(t.shape) != shape or not t.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(t.shape)}, strides {t.stride()}: expected {shape}, contiguous")
    _kind(name, t, dtype, device)


def _vector(name: str, v: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> int:
    """Refuse what is not contiguous (N, C) or (1, C); its stride from image to image (0 broadcasts)."""
    n, c = x.shape[:2]
    if v.ndim != 2 or v.shape[1] != c or v.shape[0] not in (1, n):
        raise ValueError(f"{name} has shape {tuple(v.shape)}: expected ({n}, {c}) or (1, {c})")
    _dense(name, v, tuple(v.shape), dtype or x.dtype, x.device)
    return c if v.shape[0] == n else 0


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and reduced gradients for images of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _reduced(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=accumulator(x.dtype), device=x.device)


def _blocks(x: Tensor) -> tuple[int, int, int, int, int]:
    """(images, rows, channels, block_rows) of x for the kernels over rows, and the number of blocks.

    Blocks depend on the shape alone, so results do not depend on the number of threads: enough of them for a large
    machine, none so long that a sum over its rows loses digits.
    """
    n, c, h, w = x.shape
    rows = h * w
    block = min(max(-(-n * rows // 64), 16), 128)
    return n, rows, c, block, n * -(-rows // block)


def _call(kernel: str, x: Tensor, *args: Tensor | float | None) -> None:
    """Run a kernel of the extension in x's dtype; tensors go as pointers, None as a null one.

    Raises:
        RuntimeError: x is not on the CPU, naming the kernel.
        ImportError: the extension was not built.
    """
    module = extension()
    if x.device.type != "cpu":
        raise RuntimeError(f"{kernel}: the native kernel runs on cpu only, and the input is on {x.device}")
    values = [v.data_ptr() if isinstance(v, Tensor) else 0 if v is None else v for v in args]
    getattr(module, kernel)(_DTYPES[x.dtype], torch.get_num_threads(), *values)


# ---- adaLN and the gated residual: csrc/cpu/adaln.h ----


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over channels without affine, then * (1 + scale) + shift.

    Args:
        x: (N, C, H, W) in channels_last memory, on a CPU or (where built) a CUDA device.
        shift: (N, C) or (1, C), contiguous, of x's dtype and device.
        scale: as shift.
        eps: added to the variance.

    Returns:
        y as x, and each pixel's mean and 1 / deviation, (N, H, W) in the accumulation dtype.

    Raises:
        ValueError: a wrong rank, size, layout, dtype or device, naming the argument.
        ImportError: the extension was not built.
        RuntimeError: a CUDA error, or a CUDA tensor with an extension built without CUDA.
    """
    _image("x", x)
    strides = _vector("shift", shift, x), _vector("scale", scale, x)
    n, c, h, w = x.shape
    y, mean, rstd = _like(x), _reduced(x, n, h, w), _reduced(x, n, h, w)
    if x.device.type != "cuda":
        _call("adaln_modulate", x, *_blocks(x)[:4], x, shift, scale, y, mean, rstd, *strides, eps)
        return y, mean, rstd
    if not with_cuda():
        raise RuntimeError(f"x is on {x.device}, but the extension has no CUDA code: {build()['cuda']}")
    pointers = [t.data_ptr() for t in (x, shift, scale, y, mean, rstd)]
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        extension().adaln_modulate_cuda(_DTYPES[x.dtype], n, h * w, c, *pointers, *strides, eps, x.device.index, stream)
    return y, mean, rstd


def adaln_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of adaln_modulate: dx as x; dshift and dscale per sample, (N, C) in the accumulation dtype."""
    _image("x", x)
    _image("dy", dy, x)
    stride = _vector("scale", scale, x)
    _statistics(x, mean, rstd)
    n, c = x.shape[:2]
    *sizes, blocks = _blocks(x)
    dx, dshift, dscale, partial = _like(x), _reduced(x, n, c), _reduced(x, n, c), _reduced(x, blocks, 2, c)
    _call("adaln_modulate_backward", x, *sizes, dy, x, scale, mean, rstd, dx, dshift, dscale, partial, stride)
    return dx, dshift, dscale


def _statistics(x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    n, _, h, w = x.shape
    for name, t in (("mean", mean), ("rstd", rstd)):
        _dense(name, t, (n, h, w), accumulator(x.dtype), x.device)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch; gate (N, C) or (1, C)."""
    _image("x", x)
    _image("branch", branch, x)
    stride = _vector("gate", gate, x)
    y = _like(x)
    _call("gated_residual", x, *_blocks(x)[:4], x, branch, gate, y, stride)
    return y


def gated_residual_backward(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gated_residual but x's, which is dy: dbranch, and dgate per sample, (N, C), accumulation dtype."""
    _image("dy", dy)
    _image("branch", branch, dy)
    stride = _vector("gate", gate, dy)
    n, c = dy.shape[:2]
    *sizes, blocks = _blocks(dy)
    dbranch, dgate, partial = _like(dy), _reduced(dy, n, c), _reduced(dy, blocks, c)
    _call("gated_residual_backward", dy, *sizes, dy, branch, gate, dbranch, dgate, partial, stride)
    return dbranch, dgate


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd): y = x + gate * branch, rounded; h = adaLN of that y; mean, rstd as adaln_modulate's."""
    _image("x", x)
    _image("branch", branch, x)
    strides = _vector("gate", gate, x), _vector("shift", shift, x), _vector("scale", scale, x)
    n, _, height, width = x.shape
    y, h, mean, rstd = _like(x), _like(x), _reduced(x, n, height, width), _reduced(x, n, height, width)
    args = (x, branch, gate, shift, scale, y, h, mean, rstd, *strides, eps)
    _call("gated_residual_adaln", x, *_blocks(x)[:4], *args)
    return y, h, mean, rstd


def gated_residual_adaln_backward(
    dy: Tensor, dh: Tensor, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dgate, dshift, dscale) of gated_residual_adaln; the vectors per sample, accumulation dtype."""
    _image("y", y)
    for name, t in (("dy", dy), ("dh", dh), ("branch", branch)):
        _image(name, t, y)
    strides = _vector("gate", gate, y), _vector("scale", scale, y)
    _statistics(y, mean, rstd)
    n, c = y.shape[:2]
    *sizes, blocks = _blocks(y)
    dx, dbranch = _like(y), _like(y)
    dgate, dshift, dscale = _reduced(y, n, c), _reduced(y, n, c), _reduced(y, n, c)
    ins = (dy, dh, y, branch, gate, scale, mean, rstd)
    outs = (dx, dbranch, dgate, dshift, dscale, _reduced(y, blocks, 3, c))
    _call("gated_residual_adaln_backward", y, *sizes, *ins, *outs, *strides)
    return dx, dbranch, dgate, dshift, dscale


# ---- sums and affine maps per channel: csrc/cpu/channel.h ----


def channel_sums(x: Tensor) -> Tensor:
    """The sum over (H, W), (N, C) in the accumulation dtype."""
    _image("x", x)
    *sizes, blocks = _blocks(x)
    out, partial = _reduced(x, *x.shape[:2]), _reduced(x, blocks, x.shape[1])
    _call("channel_sums", x, *sizes, x, out, partial)
    return out


def channel_dots(a: Tensor, b: Tensor) -> Tensor:
    """The sum over (H, W) of a * b, (N, C) in the accumulation dtype."""
    _image("a", a)
    _image("b", b, a)
    *sizes, blocks = _blocks(a)
    out, partial = _reduced(a, *a.shape[:2]), _reduced(a, blocks, a.shape[1])
    _call("channel_dots", a, *sizes, a, b, out, partial)
    return out


def channel_affine(
    x: Tensor, s: Tensor, shift: Tensor | None = None, z: Tensor | None = None, r: Tensor | None = None
) -> Tensor:
    """x * s + z * r + shift; s, shift and r (N, C) or (1, C) in the accumulation dtype, z and r together or neither."""
    _image("x", x)
    if (z is None) != (r is None):
        raise ValueError("z and r belong together: expected both or neither")
    if z is not None:
        _image("z", z, x)
    vectors = (("s", s), ("shift", shift), ("r", r))
    strides = [0 if v is None else _vector(k, v, x, accumulator(x.dtype)) for k, v in vectors]
    y = _like(x)
    _call("channel_affine", x, *_blocks(x)[:4], x, s, shift, z, r, y, *strides)
    return y


# ---- depthwise convolution: csrc/cpu/depthwise.h ----


def _depthwise_sizes(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> tuple[int, ...]:
    """Check the weights; (images, height, width, channels, k, gelu, block_height) as the kernels want them.

    An image is cut into blocks of rows where images and channels alone would not occupy a machine, by shape only.
    """
    n, c, h, w = x.shape
    k = weight.shape[-1] if weight.ndim else 0
    if k not in (1, 3, 5, 7, 9):
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected ({c}, 1, k, k) with k in 1, 3, 5, 7, 9")
    _dense("weight", weight, (c, 1, k, k), x.dtype, x.device)
    if bias is not None:
        _dense("bias", bias, (c,), x.dtype, x.device)
    wanted = max(16 // max(n * -(-c // 64), 1), 1)
    block = max(-(-h // wanted), min(h, 8))
    return n, h, w, c, k, int(gelu), block


def _depthwise_scratch(x: Tensor, k: int, backward: bool) -> Tensor:
    if x.device.type != "cpu":
        return x  # about to be refused
    threads = torch.get_num_threads()
    size = extension().depthwise_scratch(_DTYPES[x.dtype], threads, x.shape[1], x.shape[3], k, backward)
    return torch.empty(size, dtype=torch.uint8)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Depthwise k x k convolution with zero padding k // 2, through GELU if gelu; weight (C, 1, k, k), bias (C,)."""
    _image("x", x)
    sizes = _depthwise_sizes(x, weight, bias, gelu)
    y = _like(x)
    _call("depthwise", x, x, weight, bias, y, _depthwise_scratch(x, sizes[4], False), *sizes)
    return y


def depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of depthwise: dx as x; dweight (C, 1, k, k) and dbias (C,) in the accumulation dtype."""
    _image("x", x)
    _image("dy", dy, x)
    sizes = _depthwise_sizes(x, weight, bias, gelu)
    n, h, _, c, k, _, block = sizes
    partitions = min(n * -(-h // block), 64)
    dx, dweight, dbias = _like(x), _reduced(x, c, 1, k, k), _reduced(x, c)
    partial = _reduced(x, partitions, k * k + 1, c)
    outs = (dx, dweight, dbias, partial, _depthwise_scratch(x, k, True))
    _call("depthwise_backward", x, dy, x, weight, bias, *outs, *sizes, partitions)
    return dx, dweight, dbias


# ---- PixelShuffle, skip and 1x1 convolution: csrc/cpu/pixel_shuffle.h ----

# Bytes of the concatenated rows that exist at any time. Fewer, and the product reads a wide weight too often.
_CHUNK_BYTES = 1 << 22


def _shuffle_views(up: Tensor, skip: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check; up as (N*H, W, 4C), skip as (N*H, 4W, S), weight as (K, C + S)."""
    _image("up", up)
    _image("skip", skip)
    n, c4, h, w = up.shape
    s = skip.shape[1]
    if c4 % 4:
        raise ValueError(f"up has {c4} channels: expected a multiple of 4")
    if skip.shape != (n, s, 2 * h, 2 * w):
        raise ValueError(f"skip has shape {tuple(skip.shape)}: expected ({n}, S, {2 * h}, {2 * w})")
    _kind("skip", skip, up.dtype, up.device)
    _dense("weight", weight, (weight.shape[0], c4 // 4 + s, 1, 1), up.dtype, up.device)
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


def pixel_shuffle_skip(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution of cat[PixelShuffle(2)(up), skip]: up (N, 4C, H, W), skip (N, S, 2H, 2W), weight (K, C+S, 1, 1).

    The concatenation exists only a few rows at a time.
    """
    small, large, matrix = _shuffle_views(up, skip, weight)
    k, wide = matrix.shape
    if bias is not None:
        _dense("bias", bias, (k,), up.dtype, up.device)
    n, _, height, width = skip.shape
    out = torch.empty((n, k, height, width), dtype=up.dtype, device=up.device, memory_format=torch.channels_last)
    rows = out.permute(0, 2, 3, 1).reshape(-1, k)
    for part, pixels, cat in _shuffle_chunks(small, wide):
        sizes = (part.stop - part.start, small.shape[1], small.shape[2] // 4, large.shape[2])
        _call("shuffle_gather", up, small[part], large[part], cat, *sizes)
        if bias is None:
            torch.mm(cat, matrix.t(), out=rows[pixels])
        else:
            torch.addmm(bias, cat, matrix.t(), out=rows[pixels])
    return out


def pixel_shuffle_skip_backward(
    dy: Tensor, up: Tensor, skip: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of pixel_shuffle_skip: dup, dskip; dweight (K, C+S, 1, 1) and dbias (K,) in the accumulation dtype."""
    small, large, matrix = _shuffle_views(up, skip, weight)
    k, wide = matrix.shape
    n, _, height, width = skip.shape
    _image("dy", dy)
    if dy.shape != (n, k, height, width):
        raise ValueError(f"dy has shape {tuple(dy.shape)}: expected {(n, k, height, width)}")
    _kind("dy", dy, up.dtype, up.device)
    dy_rows = dy.permute(0, 2, 3, 1).reshape(-1, k)
    dup, dskip = _like(up), _like(skip)
    dsmall = dup.permute(0, 2, 3, 1).reshape(small.shape)
    dlarge = dskip.permute(0, 2, 3, 1).reshape(large.shape)
    dweight = torch.zeros(k, wide, dtype=accumulator(up.dtype), device=up.device)
    for part, pixels, cat in _shuffle_chunks(small, wide):
        sizes = (part.stop - part.start, small.shape[1], small.shape[2] // 4, large.shape[2])
        _call("shuffle_gather", up, small[part], large[part], cat, *sizes)
        dweight += torch.mm(dy_rows[pixels].t(), cat)
        torch.mm(dy_rows[pixels], matrix, out=cat)
        _call("shuffle_scatter", up, dsmall[part], dlarge[part], cat, *sizes)
    return dup, dskip, dweight.reshape(k, wide, 1, 1), channel_sums(dy).sum(0)
