"""The one door to ``dico_kernels._C``, the kernels built from csrc/.

The extension knows pointers and sizes only, so whatever keeps those valid is checked here; what an op accepts is
checked by dico_kernels.ops. torch is imported first, so that the extension binds to torch's OpenMP runtime and the two
share one pool of threads.

The functions below are the kernel interface that every backend implements: images in channels_last memory, at least one
pixel, vectors (N, C) or (1, C), all of one dtype; statistics and reduced gradients come back in the accumulation dtype
(float64 for float64, else float32), reduced gradients of conditioning vectors per sample.
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


# ---- arguments ----

_PARALLEL_FROM = 1 << 14  # elements below which waking other threads costs more than they save
_CHUNK_BYTES = 1 << 20  # scratch of pixel_shuffle_skip: stays in cache


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _PARALLEL_FROM else 1


def _image(name: str, v: Tensor, like: Tensor | None = None, device: str = "cpu") -> int:
    """The address of an image, once it is known to be one."""
    if v.ndim != 4 or v.numel() == 0 or not v.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} has shape {tuple(v.shape)}, strides {v.stride()}: expected a channels_last image")
    if v.dtype not in _DTYPES or v.device.type != device:
        raise ValueError(f"{name} is {v.dtype} on {v.device}: expected a floating dtype on {device}")
    if like is not None and (v.shape != like.shape or v.dtype != like.dtype):
        raise ValueError(
            f"{name} is {tuple(v.shape)} {v.dtype}: expected the other images', {tuple(like.shape)} {like.dtype}"
        )
    return v.data_ptr()


def _vector(name: str, v: Tensor | None, x: Tensor, wide: bool = False) -> tuple[int, int]:
    """Address of a (N, C) or (1, C) vector and its stride from image to image; zeros when it is absent."""
    if v is None:
        return 0, 0
    n, c = x.shape[:2]
    dtype = accumulation_dtype(x.dtype) if wide else x.dtype
    if v.shape not in ((n, c), (1, c)) or not v.is_contiguous() or v.dtype != dtype or v.device != x.device:
        raise ValueError(
            f"{name} is {tuple(v.shape)} {v.dtype} on {v.device}: expected contiguous ({n} or 1, {c}) {dtype}"
        )
    return v.data_ptr(), c if v.shape[0] == n else 0


def _parameter(name: str, v: Tensor | None, size: int, x: Tensor) -> int:
    """Address of a contiguous parameter of so many elements; zero when it is absent."""
    if v is None:
        return 0
    if v.numel() != size or not v.is_contiguous() or v.dtype != x.dtype or v.device != x.device:
        raise ValueError(f"{name} is {tuple(v.shape)} {v.dtype}: expected {size} contiguous elements of {x.dtype}")
    return v.data_ptr()


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return _DTYPES[x.dtype], n, h * w, c


def _new(x: Tensor, channels: int | None = None, scale: int = 1) -> Tensor:
    n, c, h, w = x.shape
    shape = (n, c if channels is None else channels, h * scale, w * scale)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _wide(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=x.device)


# ---- adaln ----


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd): LayerNorm over channels without affine, * (1 + scale) + shift; on a GPU where built for it."""
    module, device = extension(), x.device.type
    address = _image("x", x, device=device if device == "cuda" else "cpu")
    (shift_at, shift_stride), (scale_at, scale_stride) = _vector("shift", shift, x), _vector("scale", scale, x)
    n, _, h, w = x.shape
    y, mean, rstd = _new(x), _wide(x, n, h, w), _wide(x, n, h, w)
    out = y.data_ptr(), mean.data_ptr(), rstd.data_ptr()
    vectors = shift_at, shift_stride, scale_at, scale_stride, eps
    if device == "cuda":
        if not with_cuda():
            raise RuntimeError(f"x is on {x.device}, but the extension has no CUDA code: {build()['cuda']}")
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream(x.device).cuda_stream
            module.adaln_modulate_cuda(*_sizes(x), address, *vectors, *out, x.device.index, stream)
    else:
        module.adaln_forward(*_sizes(x), address, 0, 0, 0, *vectors, 0, *out, _threads(x))
    return y, mean, rstd


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """X + gate * branch."""
    y = _new(x)
    images = _image("x", x), _image("branch", branch, x)
    extension().adaln_forward(
        *_sizes(x), *images, *_vector("gate", gate, x), 0, 0, 0, 0, 0.0, y.data_ptr(), 0, 0, 0, _threads(x)
    )
    return y


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd): y = x + gate * branch, h = adaLN(y)."""
    n, _, height, width = x.shape
    y, h, mean, rstd = _new(x), _new(x), _wide(x, n, height, width), _wide(x, n, height, width)
    images = _image("x", x), _image("branch", branch, x)
    vectors = *_vector("gate", gate, x), *_vector("shift", shift, x), *_vector("scale", scale, x)
    out = tuple(v.data_ptr() for v in (y, h, mean, rstd))
    extension().adaln_forward(*_sizes(x), *images, *vectors, eps, *out, _threads(x))
    return y, h, mean, rstd


def _adaln_backward(
    dy: Tensor | None,
    dh: Tensor | None,
    x: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbranch, sums): what is absent is not computed; sums (N, 3, C) of gate, shift and scale."""
    like = next(v for v in (dy, dh) if v is not None)
    dx, dbranch, sums = _new(like), _new(like), _wide(like, like.shape[0], 3, like.shape[1])
    pixels = like.numel() // like.shape[1]
    for name, v in (("mean", mean), ("rstd", rstd)):
        if v is not None and (v.numel() != pixels or not v.is_contiguous() or v.dtype != sums.dtype):
            raise ValueError(f"{name} is {tuple(v.shape)} {v.dtype}: expected {pixels} contiguous {sums.dtype}")
    images = (
        0 if v is None else _image(name, v, like) for name, v in (("dy", dy), ("dh", dh), ("x", x), ("branch", branch))
    )
    statistics = (0 if v is None else v.data_ptr() for v in (mean, rstd))
    extension().adaln_backward(
        *_sizes(like),
        *images,
        *_vector("gate", gate, like),
        *_vector("scale", scale, like),
        *statistics,
        dx.data_ptr(),
        dbranch.data_ptr(),
        sums.data_ptr(),
        _threads(like),
    )
    return dx, dbranch, sums


def adaln_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dshift, dscale)."""
    dx, _, sums = _adaln_backward(None, dy, x, None, None, scale, mean, rstd)
    return dx, sums[:, 1].clone(), sums[:, 2].clone()


def gated_residual_backward(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(dbranch, dgate)."""
    _, dbranch, sums = _adaln_backward(dy, None, None, branch, gate, None, None, None)
    return dbranch, sums[:, 0].clone()


def gated_residual_adaln_backward(
    dy: Tensor, dh: Tensor, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dgate, dshift, dscale)."""
    dx, dbranch, sums = _adaln_backward(dy, dh, y, branch, gate, scale, mean, rstd)
    return dx, dbranch, sums[:, 0].clone(), sums[:, 1].clone(), sums[:, 2].clone()


# ---- depthwise ----


def _depthwise_sizes(x: Tensor, weight: Tensor, gelu: bool) -> tuple[int, int, int, int, int, int, bool]:
    n, c, h, w = x.shape
    k = weight.shape[-1]
    if weight.shape[-2] != k or k % 2 == 0 or not 1 <= k <= 9:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected square, odd, 1 to 9")
    return _DTYPES[x.dtype], n, h, w, c, k, gelu


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Depthwise convolution, zero padding k // 2, through GELU if asked; weight (C, 1, k, k)."""
    sizes, y = _depthwise_sizes(x, weight, gelu), _new(x)
    c, k = x.shape[1], weight.shape[-1]
    parameters = _parameter("weight", weight, c * k * k, x), _parameter("bias", bias, c, x)
    extension().depthwise_forward(*sizes, _image("x", x), *parameters, y.data_ptr(), _threads(x))
    return y


def depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); the convolution is recomputed when its output went through GELU."""
    sizes, dx = _depthwise_sizes(x, weight, gelu), _new(x)
    c, k = x.shape[1], weight.shape[-1]
    dweight, dbias = _wide(x, c, 1, k, k), _wide(x, c)
    images = _image("dy", dy, x), _image("x", x)
    parameters = _parameter("weight", weight, c * k * k, x), _parameter("bias", bias, c, x)
    out = dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr()
    extension().depthwise_backward(*sizes, *images, *parameters, *out, _threads(x))
    return dx, dweight, dbias


# ---- channel ----


def channel_sums(x: Tensor) -> Tensor:
    """(N, C) sums over pixels."""
    out = _wide(x, x.shape[0], x.shape[1])
    extension().channel_sums(*_sizes(x), _image("x", x), 0, out.data_ptr(), _threads(x))
    return out


def channel_dots(a: Tensor, b: Tensor) -> Tensor:
    """(N, C) sums over pixels of a * b."""
    out = _wide(a, a.shape[0], a.shape[1])
    extension().channel_sums(*_sizes(a), _image("a", a), _image("b", b, a), out.data_ptr(), _threads(a))
    return out


def channel_affine(
    x: Tensor, s: Tensor, shift: Tensor | None = None, z: Tensor | None = None, r: Tensor | None = None
) -> Tensor:
    """X * s + z * r + shift; s, r and shift in the accumulation dtype."""
    y = _new(x)
    extension().channel_affine(
        *_sizes(x),
        _image("x", x),
        *_vector("s", s, x, wide=True),
        *_vector("shift", shift, x, wide=True),
        0 if z is None else _image("z", z, x),
        *_vector("r", r, x, wide=True),
        y.data_ptr(),
        _threads(x),
    )
    return y


# ---- pixel_shuffle ----


def _chunks(up: Tensor, skip: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(first, count, scratch) for runs of pairs of the output's image rows, each one's operand within _CHUNK_BYTES."""
    width, channels = skip.shape[3], up.shape[1] // 4 + skip.shape[1]
    rows = skip.shape[0] * skip.shape[2]
    most = min(rows, max(2, _CHUNK_BYTES // (width * channels * up.element_size()) // 2 * 2))
    scratch = torch.empty((most * width, channels), dtype=up.dtype)
    for first in range(0, rows, most):
        count = min(most, rows - first)
        yield first, count, scratch[: count * width]


def _shuffle(gather: bool, up: Tensor, skip: Tensor, first: int, count: int, joined: Tensor) -> None:
    n, c4, h, w = up.shape
    if c4 % 4 or skip.shape[0] != n or skip.shape[2:] != (2 * h, 2 * w) or skip.dtype != up.dtype:
        raise ValueError(f"skip is {tuple(skip.shape)} {skip.dtype}: expected ({n}, S, {2 * h}, {2 * w}) {up.dtype}")
    addresses = _image("up", up), _image("skip", skip), joined.data_ptr()
    sizes = _DTYPES[up.dtype], h, w, c4 // 4, skip.shape[1], first, count
    extension().shuffle(gather, *sizes, *addresses, _threads(joined))


def _matrix(image: Tensor) -> Tensor:
    """A channels_last image as the matrix of its pixels, without a copy."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def pixel_shuffle_skip(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution of cat[PixelShuffle(2)(up), skip], whose operand exists a cache-sized chunk at a time."""
    y = _new(up, weight.shape[0], 2)
    out, taps, width = _matrix(y), weight.flatten(1).t(), skip.shape[3]
    for first, count, joined in _chunks(up, skip):
        _shuffle(True, up, skip, first, count, joined)
        rows = out[first * width : (first + count) * width]
        if bias is None:
            torch.mm(joined, taps, out=rows)
        else:
            torch.addmm(bias, joined, taps, out=rows)
    return y


def pixel_shuffle_skip_backward(
    dy: Tensor, up: Tensor, skip: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dup, dskip, dweight, dbias)."""
    dup, dskip = _new(up), _new(skip)
    gradient, taps, width = _matrix(dy), weight.flatten(1), skip.shape[3]
    dweight = torch.zeros(taps.shape, dtype=accumulation_dtype(up.dtype))
    dbias = torch.zeros(taps.shape[0], dtype=accumulation_dtype(up.dtype))
    for first, count, joined in _chunks(up, skip):
        rows = gradient[first * width : (first + count) * width]
        _shuffle(True, up, skip, first, count, joined)
        dweight += rows.t() @ joined
        dbias += rows.sum(0, dtype=dbias.dtype)
        torch.mm(rows, taps, out=joined)
        _shuffle(False, dup, dskip, first, count, joined)
    return dup, dskip, dweight.reshape(weight.shape), dbias
