"""What every kernel needs: rounding, loads into the accumulation type, GELU, and the one door to a launch.

Accumulation happens in ACC: float32, or float64 for float64 tensors. The interpreter (TRITON_INTERPRET=1) keeps
bfloat16 as raw 16-bit integers: arithmetic on it is wrong and its cast from float32 truncates. So kernels touch
bfloat16 only through `load`, `store`, `rounded` and `dot` below, which do on the interpreter what hardware does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fixed when a kernel is decorated, so it is read once, with the kernels' own import.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def bf16_bits(x):
    """The 16 bits of float32 x rounded to bfloat16, nearest even; NaN stays a NaN."""
    bits = x.to(tl.int32, bitcast=True)
    # Arithmetic shifts: only the low 16 bits of the result are kept, so the sign's smear does no harm.
    even = (bits >> 16) & 1
    # Adding half a unit to a NaN could carry it into infinity or zero: keep its upper half and make it quiet.
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x00400000, bits + 0x7FFF + even)
    return (bits >> 16).to(tl.int16)


@triton.jit
def bf16_value(bits):
    """The float32 with these upper 16 bits."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def load(ptr, mask, ACC: tl.constexpr):
    """A masked load as ACC; zero outside the mask."""
    x = tl.load(ptr, mask=mask, other=0.0)
    if INTERPRET:
        if x.dtype == tl.bfloat16:
            x = bf16_value(x.to(tl.int16, bitcast=True))
    return x.to(ACC)


@triton.jit
def store(ptr, x, mask):
    """A masked store, rounded to nearest even."""
    out: tl.constexpr = ptr.dtype.element_ty
    if INTERPRET:
        if out == tl.bfloat16:
            x = bf16_bits(x).to(tl.bfloat16, bitcast=True)
    tl.store(ptr, x.to(out), mask=mask)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """The value of x after rounding to dtype, still in x's own type."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            y = bf16_value(bf16_bits(x))
        else:
            y = x.to(dtype).to(x.dtype)
    else:
        y = x.to(dtype).to(x.dtype)
    return y


@triton.jit
def load_operand(ptr, mask):
    """An operand of `dot`: in its own type on hardware, float32 for 16-bit types when interpreting."""
    x = tl.load(ptr, mask=mask, other=0.0)
    if INTERPRET:
        if x.dtype == tl.bfloat16:
            x = bf16_value(x.to(tl.int16, bitcast=True))
        elif x.dtype == tl.float16:
            x = x.to(tl.float32)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in acc's type; PRECISION "tf32" or "ieee" says how float32 operands multiply."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def normal_cdf(x):
    """Phi(x). float64: the error function. Else Abramowitz & Stegun 7.1.26, within 7.5e-8, in a third of the time."""
    if x.dtype == tl.float64:
        phi = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    else:
        z = tl.abs(x) * 0.7071067811865476
        t = 1.0 / (1.0 + 0.3275911 * z)
        poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        # exp(-z^2) by exp2, which is one instruction; the constant is log2(e)
        tail = 0.5 * poly * tl.exp2(-1.4426950408889634 * z * z)
        phi = tl.where(x < 0, tail, 1.0 - tail)
    return phi


@triton.jit
def gelu(x):
    """x * Phi(x)."""
    return x * normal_cdf(x)


@triton.jit
def gelu_grad(x):
    """Phi(x) + x * phi(x)."""
    if x.dtype == tl.float64:
        density = tl.exp(-0.5 * x * x)
    else:
        density = tl.exp2(-0.7213475204444817 * x * x)
    return normal_cdf(x) + x * density * 0.3989422804014327


@triton.jit
def wide(v):
    """v in 64 bits, whether an argument, a loop's counter or (specialised by Triton, when it is 1) a constant."""
    return tl.full([], v, tl.int64)


@triton.jit
def row_offset(row, C):
    """Element offset of a row of C, in 64 bits from the multiplication on: N * H * W * C exceeds 2^31."""
    return row.to(tl.int64) * C


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what ahead-of-time compilation needs to build the same kernel."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


_recording: list[Launch] | None = None


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches instead of running them, so that meta tensors show which kernels a call would launch."""
    global _recording
    before, _recording = _recording, []
    try:
        yield _recording
    finally:
        _recording = before


def launch(
    kernel: Any, programs: int, *args: Tensor | int | None, num_warps: int, num_stages: int = 3, **constants: Any
) -> None:
    """Run `programs` programs of a kernel on the device of its first argument."""
    if _recording is not None:
        _recording.append(Launch(kernel, args, constants, num_warps, num_stages))
        return
    x = args[0]
    assert isinstance(x, Tensor)
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def acc_torch(dtype: torch.dtype) -> torch.dtype:
    """The accumulation type of a tensor type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def acc_triton(dtype: torch.dtype) -> tl.dtype:
    """The same, as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def empty_image(n: int, c: int, h: int, w: int, like: Tensor) -> Tensor:
    """An unwritten (n, c, h, w) image in channels_last, of like's type and device."""
    # Memory (n, h, w, c) seen as (n, c, h, w): torch's channels_last, without its ambiguity when a size is 1.
    return torch.empty((n, h, w, c), dtype=like.dtype, device=like.device).permute(0, 3, 1, 2)


def empty_acc(*shape: int, like: Tensor) -> Tensor:
    """Unwritten, contiguous, in the accumulation type of like."""
    return torch.empty(shape, dtype=acc_torch(like.dtype), device=like.device)


def batch_stride(v: Tensor) -> int:
    """Elements from one sample's (N, C) vector to the next: 0 where one vector serves all."""
    return 0 if v.shape[0] == 1 else v.shape[1]


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
