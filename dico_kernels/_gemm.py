"""1x1 convolutions as native products with what surrounds them inside: csrc/cpu/gemm.h as functions of tensors."""

from __future__ import annotations

import functools
import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from dico_kernels._extension import WATCH, available, call, extension
from dico_kernels._linear import loops
from dico_kernels._memory import DTYPES, dense, image, kind, reduced, shuffled, vector, wide_stream
from dico_kernels._packed import packed
from dico_kernels.dtypes import accumulation_dtype


class Product(NamedTuple):
    """What ``pointwise`` returns; None for what was not asked for.

    y (N, K, H, W); before, like y, what GELU was applied to; mean and rstd (N, H, W) of adaLN; squares (N, K).
    """

    y: Tensor
    before: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    squares: Tensor | None = None


# Rows of an image that go through a product together: enough that a weight read from the third-level cache is used
# often, few enough that they stay in the second and that a small batch occupies several threads.
_ROWS = (32, 96)
_BUFFER_BYTES = 3 << 18
# Blocks of all images from which it does not matter that some threads have one more; of fewer rows are then divided
# evenly, into blocks of as few as three quarters of the above.
_MANY = 64


class Scratch(threading.local):
    """A thread's buffer, kept: fresh memory of this size costs a page fault each 4 KiB under glibc's defaults."""

    def __init__(self) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8, device="cpu")

    def of(self, size: int) -> Tensor:
        if self.bytes.numel() < size:
            with torch.inference_mode(False):
                self.bytes = torch.empty(size, dtype=torch.uint8, device="cpu")
        if WATCH.recorder is not None:
            WATCH.recorder.used(self.bytes, size)
        return self.bytes


SCRATCH = Scratch()


def _block_rows(images: int, rows: int, inputs: int, size: int) -> int:
    most = max(min(_ROWS[1], _BUFFER_BYTES // (inputs * size)), _ROWS[0])
    blocks = -(-rows // min(max(-(-images * rows // 8), _ROWS[0]), most))
    # About as many for each of 8, 4 or 2 threads: of 11 blocks one of two has a fifth more than the other.
    for threads in (8, 4, 2) if images * blocks < _MANY else ():
        step = threads // math.gcd(threads, images)
        even = -(-blocks // step) * step
        if 4 * rows >= 3 * even * _ROWS[0]:
            return -(-rows // even)
    return -(-rows // blocks)


@functools.cache
def _amx() -> bool:
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())  # older versions do not say


def _multiplies(dtype: torch.dtype, isa: str) -> bool:
    if isa == "base":  # no multiply-add, or one that nobody has timed
        return False
    if dtype == torch.float32 or loops(dtype):
        return True
    return dtype == torch.bfloat16 and isa == "v4bf16" and not _amx()  # whose units the library's products use


def multiplies(weight: Tensor) -> bool:
    """Whether ``pointwise`` is at least as fast as the library's product on this processor."""
    return available() and weight.is_cpu and _multiplies(weight.dtype, extension().selected_isa())


def form() -> str:
    """Names the layout in which ``pack`` writes: that of the instruction set in use."""
    return f"native {extension().selected_isa()}"


def pack(weight: Tensor) -> Tensor:
    """A weight (K, C), in any strides, or (K, C, 1, 1), as ``pointwise`` reads it: bytes."""
    matrix = weight.reshape(weight.shape[0], weight.shape[1])
    if matrix.dtype not in DTYPES:
        raise ValueError(f"weight has dtype {weight.dtype}: expected a floating dtype")
    size = extension().packed_size(DTYPES[matrix.dtype], *matrix.shape)
    out = torch.empty(size, dtype=torch.uint8, device=weight.device)
    call("pack", matrix, matrix, out, *matrix.shape, *matrix.stride())
    return out


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    kept: Tensor | None = None,
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
    """1x1 convolution of an image: W x + b, with what stands before and behind it.

    Args:
        x: (N, C, H, W), channels_last, of weight's dtype; with adaLN also float32 beside a 16-bit weight.
        weight: (K, C) or (K, C, 1, 1), in any strides.
        bias: (K,) or None.
        skip: (N, S, 2H, 2W): cat[PixelShuffle(2)(x), skip] is multiplied, of x (N, 4C, H, W), with nothing else
            before or behind it than the bias.
        kept: pack(weight), where the caller has it.
        frozen: what was kept of the weights in this layout is used while it is valid.
        shift: (N, C) or (1, C), with scale: adaLN of x is multiplied.
        scale: as shift.
        eps: adaLN's.
        statistics: return adaLN's.
        s: (N, C) in the accumulation dtype: s * x is multiplied.
        plus: (C,), with s: s * x + plus is.
        gelu: GELU of the product, in its exact form.
        keep: return what GELU is applied to.
        squares: return the sums over (H, W) of y * y, (N, K) in the accumulation dtype.
        then: a second weight (O, K) and bias (O,) or None, to multiply the first product by; with a gate.
        gate: (N, K) or (1, K), with residual: y = residual + gate * product. Of the second product O for K.
        residual: (N, K, H, W), channels_last, of weight's dtype, or float32 beside a 16-bit weight: y is as residual.

    Raises:
        ValueError: a wrong shape, layout, dtype or device, naming the argument; or options that exclude each other.
    """
    image("x", x)
    n, c, h, w = x.shape
    images, pixels, skipped = n, h * w, 0
    dtype = weight.dtype
    if skip is not None:
        if any(v is not None for v in (shift, s, then, gate)) or gelu or keep or squares:
            raise ValueError("expected nothing but a bias with skip")
        shuffled("x", x, skip)
        skipped = skip.shape[1]
        c, images, pixels = c // 4 + skipped, n * h, 4 * w
    outputs = last = _outputs("weight", weight, bias, c, dtype, x.device)
    if then is not None:
        last = _outputs("then", *then, outputs, dtype, x.device)
    for first, second, names in ((shift, scale, "shift and scale"), (gate, residual, "gate and residual")):
        if (first is None) != (second is None):
            raise ValueError(f"{names} belong together: expected both or neither")
    if (shift is not None and s is not None) or (gate is not None and then is None and (gelu or keep or squares)):
        raise ValueError("expected adaLN or s, and of one product GELU or a gate, not both")
    if then is not None and (gate is None or squares):
        raise ValueError("expected a gate with then, and no squares")
    wide, strides, mean, rstd = 0, (0, 0), None, None
    if shift is not None and scale is not None:
        wide = wide_stream(x, dtype)
        strides = vector("shift", shift, x, dtype), vector("scale", scale, x, dtype)
    else:
        kind("x", x, dtype, x.device)
        if s is not None:
            dense("s", s, (n, c), accumulation_dtype(dtype), x.device)
    if plus is not None:
        if s is None:
            raise ValueError("s is None: expected it with plus")
        dense("plus", plus, (c,), dtype, x.device)
    if gate is not None and residual is not None:
        image("residual", residual)
        kind("residual", residual, residual.dtype, x.device)
        if tuple(residual.shape) != (n, last, h, w):
            raise ValueError(f"residual has shape {tuple(residual.shape)}: expected {(n, last, h, w)}")
        wide = wide_stream(residual, dtype)
        gate_stride = vector("gate", gate, residual, dtype)
        if shift is not None and residual.dtype != x.dtype:
            raise ValueError(f"residual has dtype {residual.dtype}: expected x's, {x.dtype}")
    else:
        gate_stride = 0
    block = _block_rows(images, pixels, c + (0 if then is None else outputs), weight.element_size())
    # Where images are too small to occupy the threads by themselves, so are their outputs divided.
    blocks, threads = images * -(-pixels // block), torch.get_num_threads()
    parts = 1 if blocks >= threads or not blocks else -(-threads // blocks)
    if then is not None and parts > 1:
        alone = pointwise(
            x, weight, bias, shift=shift, scale=scale, eps=eps, statistics=statistics, s=s, plus=plus, gelu=gelu,
            keep=keep, frozen=frozen,
        )  # fmt: skip
        return alone._replace(y=pointwise(alone.y, *then, frozen=frozen, gate=gate, residual=residual).y)
    if residual is None:
        y = _image(x if skip is None else skip, outputs, dtype)
    else:
        y = torch.empty_like(residual, memory_format=torch.channels_last)
    before = _image(x, outputs, dtype) if keep else None
    if shift is not None and statistics:
        mean, rstd = reduced(x, n, h, w), reduced(x, n, h, w)
    sums, partial = None, None
    if squares:
        sums, partial = reduced(x, n, outputs), reduced(x, blocks, outputs)
    matrix = factor(weight, frozen) if kept is None else kept
    second = then_bias = None
    if then is not None:
        second, then_bias = factor(then[0], frozen), then[1]
    hidden = 0 if then is None else outputs
    size = extension().pointwise_scratch(DTYPES[dtype], threads, c, hidden, block)
    scratch = SCRATCH.of(size)
    call(
        "pointwise", x, images, pixels, c, block, x, skip, matrix, bias, shift, scale, mean, rstd, s, plus, second,
        then_bias, gate, residual, before, y, sums, partial, scratch, outputs, last, parts, skipped, int(gelu),
        *strides, gate_stride, eps, wide, dtype=dtype,
    )  # fmt: skip
    return Product(y, before, mean, rstd, sums)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, kept: Tensor | None = None) -> Tensor:
    """x W^T + b for x (..., C), not empty, weight (K, C) and bias (K,) or None: (..., K); kept as in pointwise."""
    rows = x.reshape(1, -1, 1, x.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    y = pointwise(rows.permute(0, 3, 1, 2), weight, bias, kept=kept).y
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def _outputs(
    name: str, weight: Tensor, bias: Tensor | None, inputs: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Check a weight and its bias; the number of outputs."""
    k = weight.shape[0] if weight.ndim else 0
    if tuple(weight.shape) not in ((k, inputs), (k, inputs, 1, 1)) or k == 0:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}: expected (K, {inputs}) or (K, {inputs}, 1, 1), K > 0"
        )
    kind(name, weight, dtype, device)
    if bias is not None:
        dense(f"{name}'s bias", bias, (k,), dtype, device)
    return k


def factor(weight: Tensor, frozen: bool) -> Tensor:
    """A weight as pointwise reads it: what was kept of it, if frozen says that this may be used, or packed now."""
    kept = packed(weight, form()) if frozen else None
    return pack(weight) if kept is None else kept


def _image(x: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    n, _, h, w = x.shape
    return torch.empty((n, channels, h, w), dtype=dtype, device=x.device, memory_format=torch.channels_last)


__all__ = ["Product", "factor", "form", "linear", "multiplies", "pack", "pointwise"]
