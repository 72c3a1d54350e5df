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


def _rows(x: Tensor) -> Tensor:
    """x in channels_last memory; converted once if it is not."""
    return x.contiguous(memory_format=torch.channels_last)


def _condition(name: str, v: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """A conditioning vector as contiguous rows, and its stride from image to image (0 broadcasts)."""
    n, c = x.shape[:2]
    if v.ndim != 2 or v.shape[1] != c or v.shape[0] not in (1, n):
        raise ValueError(f"{name} has shape {tuple(v.shape)}: expected ({n}, {c}) or (1, {c})")
    if v.dtype != x.dtype or v.device != x.device:
        raise ValueError(f"{name} is {v.dtype} on {v.device}: expected x's, {x.dtype} on {x.device}")
    return v.contiguous(), (c if v.shape[0] == n else 0)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm over channels without affine, then * (1 + scale) + shift. Forward only.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16, on a CPU or (where built) a CUDA device.
        shift: (N, C) or (1, C), of x's dtype and device.
        scale: as shift.
        eps: added to the variance.

    Returns:
        (N, C, H, W) in channels_last memory. Statistics and arithmetic in float32 (float64 for float64).

    Raises:
        ValueError: a wrong rank, size, dtype or device, naming the argument.
        ImportError: the extension was not built.
        RuntimeError: a CUDA error, or a CUDA tensor with an extension built without CUDA.
    """
    module = extension()
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected (N, C, H, W) with C, H, W > 0")
    if x.dtype not in _DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        raise ValueError(f"x has dtype {x.dtype}: expected {names}")
    shift, shift_stride = _condition("shift", shift, x)
    scale, scale_stride = _condition("scale", scale, x)
    rows = _rows(x)
    y = torch.empty_like(rows)
    n, c, h, w = x.shape
    pointers = (rows.data_ptr(), shift.data_ptr(), scale.data_ptr(), y.data_ptr())
    args = (_DTYPES[x.dtype], *pointers, n, h * w, c, shift_stride, scale_stride, eps)
    if x.device.type == "cpu":
        module.adaln_modulate_cpu(*args, torch.get_num_threads())
    elif x.device.type == "cuda":
        if not with_cuda():
            raise RuntimeError(f"x is on {x.device}, but the extension has no CUDA code: {build()['cuda']}")
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream(x.device).cuda_stream
            module.adaln_modulate_cuda(*args, x.device.index, stream)
    else:
        raise ValueError(f"x is on {x.device}: expected a cpu or cuda device")
    return y


def build() -> dict[str, Any]:
    """What the extension says of its own build: version, compiler, openmp, cuda, with_cuda."""
    return dict(extension().build())
