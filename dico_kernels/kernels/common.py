"""What every kernel needs: rounding, loads into the accumulation type, GELU, and the one door to a launch.

Accumulation happens in ACC: float32, or float64 for float64 tensors. The interpreter (TRITON_INTERPRET=1) keeps
bfloat16 as raw 16-bit integers: arithmetic on it is wrong and its cast from float32 truncates. So kernels touch
bfloat16 only through `load`, `store`, `rounded` and `dot` below, which do on the interpreter what hardware does.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dico_kernels.dtypes import accumulation_dtype, tf32_products

# Fixed when a kernel is decorated, so it is read once, with the kernels' own import.
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))

# The arguments of kernels that follow the batch and the size of images: n0 and e0 of add_up do too, but not numbers of
# pixels, which of most images are multiples of 16.
_COUNTS = re.compile(r"[BHW]|samples|parts|count|(\w+_)?blocks|[ne]\d")


def is_count(name: str) -> bool:
    """Whether a kernel's integer argument of this name follows the batch or the size of images."""
    return _COUNTS.fullmatch(name) is not None


def kernel(function: Callable[..., None]) -> Any:
    """triton.jit of a kernel that is not compiled anew for another number of samples, or of blocks of anything.

    Triton compiles anew where an integer argument becomes 1, or a multiple of 16 or none. Addresses gain by that in
    what rows are long and apart (C, N, K, S and strides), and nothing does in counts.
    """
    counts = [name for name in inspect.signature(function).parameters if is_count(name)]
    return triton.jit(function, do_not_specialize=counts)


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
def widened(x, ACC: tl.constexpr):
    """Loaded values, in the type they have in memory, as ACC."""
    if INTERPRET:
        if x.dtype == tl.bfloat16:
            x = bf16_value(x.to(tl.int16, bitcast=True))
    return x.to(ACC)


@triton.jit
def load(ptr, mask, ACC: tl.constexpr):
    """A masked load as ACC; zero outside the mask."""
    if INTERPRET:
        mask = mask != 0
    return widened(tl.load(ptr, mask=mask, other=0.0), ACC)


@triton.jit
def store(ptr, x, mask):
    """A masked store, rounded to nearest even."""
    out: tl.constexpr = ptr.dtype.element_ty
    if INTERPRET:
        # It makes integers of a mask that meets a scalar, and from 3.9 on takes no integers for a mask.
        mask = mask != 0
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
def operand(x):
    """Loaded values as an operand of `dot`: on hardware in their own type, interpreted 16-bit types as float32."""
    if INTERPRET:
        if x.dtype == tl.bfloat16:
            x = bf16_value(x.to(tl.int16, bitcast=True))
        elif x.dtype == tl.float16:
            x = x.to(tl.float32)
    return x


@triton.jit
def load_operand(ptr, mask):
    """A masked load as an operand of `dot`; zero outside the mask."""
    return operand(tl.load(ptr, mask=mask, other=0.0))


@triton.jit
def as_operand(x, dtype: tl.constexpr):
    """Computed values rounded to dtype, as an operand of `dot`."""
    if INTERPRET:
        x = rounded(x, dtype)
    else:
        x = x.to(dtype)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in acc's type; PRECISION "tf32" or "ieee" says how float32 operands multiply."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def normal_cdf(x):
    """Phi(x). float64: the error function. Else Abramowitz & Stegun 7.1.26, within 7.5e-8, in a quarter of the time."""
    if x.dtype == tl.float64:
        phi = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    else:
        # Their t = 1 / u at |x| / sqrt(2), which is folded into the constants, as is the half of Phi's tail. A division
        # is a guarded sequence of instructions; rsqrt is one, and of u * u no less accurate.
        u = 1.0 + 0.23164188826636045 * tl.abs(x)
        t = tl.rsqrt(u * u)
        poly = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
        # exp(-x^2 / 2) by exp2, which is one instruction; the constant is log2(e) / 2
        tail = poly * tl.exp2(-0.7213475204444817 * x * x)
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


@triton.jit
def summed_parts(parts, n, count, C, c, PARTS: tl.constexpr, ACC: tl.constexpr):
    """The sum over the parts of sample n, (samples, count, C), in columns c: PARTS at a time, so that none waits."""
    i = tl.arange(0, PARTS)
    sums = tl.zeros([c.shape[0]], ACC)
    for first in range(0, count, PARTS):
        p = first + i
        mask = (p < count)[:, None] & (c < C)[None, :]
        sums += tl.sum(load(parts + row_offset(n * count + p, C)[:, None] + c[None, :], mask, ACC), axis=0)
    return sums


@dataclass(frozen=True)
class Launch:
    """One recorded launch: what ahead-of-time compilation needs to build the same kernel."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


_recording: list[Launch] | None = None
_recorded_capability = 0


@contextlib.contextmanager
def record(capability: int = 0) -> Iterator[list[Launch]]:
    """Collect launches instead of running them, so that meta tensors show which kernels a call would launch.

    capability is the compute capability that such a call is to choose its kernels for, as `capability()` has it.
    """
    global _recording, _recorded_capability
    before = _recording, _recorded_capability
    launches: list[Launch] = []
    _recording, _recorded_capability = launches, capability
    try:
        yield launches
    finally:
        _recording, _recorded_capability = before


def capability(x: Tensor) -> int:
    """Compute capability of x's device, 90 for Hopper; 0 where that means nothing (interpreter, AMD)."""
    if _recording is not None:
        return _recorded_capability
    # AMD devices have a "capability" too, and gfx942's would pass for a Hopper's
    if not _on_nvidia(x):
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


def _on_nvidia(x: Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


def multiplies_by_wgmma(x: Tensor) -> bool:
    """Whether tensor cores of x's device read a product's first factor from registers, and go on while they do."""
    return 90 <= capability(x) < 100


# What every kernel is compiled with. A product and the sum it goes into are one instruction, unless Triton's variable
# says otherwise; without being asked Triton makes them one for now, and from 3.9 on warns that this will change.
OPTIONS: dict[str, Any] = {} if os.environ.get("TRITON_DEFAULT_FP_FUSION") else {"enable_fp_fusion": True}

# By all that Triton compiles a kernel anew for: that kernel, what it compiled, and the constants behind the arguments.
_COMPILED: dict[tuple[Any, ...], tuple[Any, Any, tuple[Any, ...]]] = {}


@cache
def _counts(kernel: Any) -> tuple[bool, ...]:
    return tuple(map(is_count, kernel.arg_names))


def _specialised(v: Tensor | TensorDescriptor | float | None, count: bool) -> Any:
    """What Triton compiles a kernel anew for, of an argument."""
    if isinstance(v, Tensor):
        return v.dtype, v.data_ptr() % 16 == 0
    if isinstance(v, int):
        small = -(2**31) <= v < 2**31
        return small if count else (v == 1, v % 16 == 0, small)
    if isinstance(v, TensorDescriptor):
        return v.base.dtype, *v.block_shape
    return type(v)


def launch(
    kernel: Any,
    programs: int,
    *args: Tensor | TensorDescriptor | int | None,
    num_warps: int,
    num_stages: int = 3,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Run `programs` programs of a kernel on the device of its first argument; maxnreg limits registers on NVIDIA's.

    What was compiled is kept and called from the second time on: to find it anew takes Triton 14 to 29 us, to call it
    2 to 8.
    """
    if _recording is not None:
        _recording.append(Launch(kernel, args, constants, num_warps, num_stages, maxnreg))
        return
    x = args[0]
    assert isinstance(x, Tensor)
    # Triton launches on the current device, which need not be the tensor's; to ask is cheaper than to set it.
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext():
        nvidia = _on_nvidia(x)  # to AMD's compiler pointers have one property more
        options = (num_warps, num_stages, maxnreg)
        key: tuple[Any, ...] = ()
        if nvidia:
            specialised = map(_specialised, args, _counts(kernel))
            key = (id(kernel), x.device.index, options, *constants.items(), *specialised)
        if (found := _COMPILED.get(key)) is not None:
            found[1][(programs, 1, 1)](*args, *found[2])
            return
        # AMD's has no such option, and Triton refuses what a compiler does not know.
        limit = {} if maxnreg is None or torch.version.hip is not None else {"maxnreg": maxnreg}
        given = {**constants, **limit, **OPTIONS, "num_warps": num_warps, "num_stages": num_stages}
        compiled = kernel[(programs,)](*args, **given)
        if nvidia:
            _COMPILED[key] = kernel, compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


def acc_triton(dtype: torch.dtype) -> tl.dtype:
    """The accumulation type of a tensor type, as Triton names it."""
    return tl.float64 if accumulation_dtype(dtype) == torch.float64 else tl.float32


def element_triton(dtype: torch.dtype) -> tl.dtype:
    """A tensor type as Triton names it."""
    found: tl.dtype = getattr(tl, str(dtype).removeprefix("torch."))
    return found


def matmul_precision(dtype: torch.dtype) -> str:
    """How dots multiply: float32 as torch's own matmuls are set to; the other types have no choice."""
    return "tf32" if dtype == torch.float32 and tf32_products() else "ieee"


def empty_image(n: int, c: int, h: int, w: int, like: Tensor) -> Tensor:
    """An unwritten (n, c, h, w) image in channels_last, of like's type and device."""
    # torch's channels_last, without its ambiguity when a size is 1. Not a permuted view: ops return these, and of an
    # output that is a view autograd allows no change in place.
    strides = (h * w * c, 1, w * c, c)
    return torch.empty_strided((n, c, h, w), strides, dtype=like.dtype, device=like.device)


def empty_acc(*shape: int, like: Tensor) -> Tensor:
    """Unwritten, contiguous, in the accumulation type of like."""
    return torch.empty(shape, dtype=accumulation_dtype(like.dtype), device=like.device)


def batch_stride(v: Tensor) -> int:
    """Elements from one sample's (N, C) vector, itself without gaps, to the next: 0 where one vector serves all."""
    return 0 if v.shape[0] == 1 else v.stride(0)


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
