"""1x1 convolutions as matrix products on channels_last rows, by the library.

On a GPU that is cuBLAS; on the CPU oneDNN where torch has it, which at the shapes of these models takes some 0.8 of the
time of the BLAS that ``F.linear`` calls in float32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes


def rows(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels_last memory as its (N*H*W, C) matrix, without a copy."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def from_rows(matrix: Tensor, like: Tensor) -> Tensor:
    """A fresh (N*H*W, K) matrix as the (N, K, H, W) channels_last image it is in memory.

    Not as a view: an op may return it, and of an output that is a view autograd allows no change in place.
    """
    n, _, h, w = like.shape
    k = matrix.shape[1]
    image = matrix.new_empty(0)
    image.set_(matrix.untyped_storage(), matrix.storage_offset(), (n, k, h, w), (h * w * k, 1, w * k, k))
    return image


@functools.cache
def _onednn(dtype: torch.dtype) -> bool:
    """Whether this torch's oneDNN multiplies matrices of a dtype: asked once, by doing it."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        with _disable_current_modes():  # the answer is kept: fake tensors have none
            one = torch.ones(1, 1, dtype=dtype, device="cpu")  # whatever the default device is
            return float(torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")) == 1
    except (AttributeError, RuntimeError):
        return False


def onednn_multiplies(x: Tensor) -> bool:
    """Whether oneDNN is what multiplies by x."""
    return bool(x.is_cpu and torch.backends.mkldnn.enabled and _onednn(x.dtype))


def _float16() -> bool:
    """Whether this torch's oneDNN multiplies matrices of float16: with AVX-512's arithmetic of it, and with AMX's."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def loops(dtype: torch.dtype) -> bool:
    """Whether PyTorch multiplies and convolves in a 16-bit dtype on this CPU without oneDNN, by loops of its own.

    They convert elements on the way: with AVX2 a tenth of float32's rate.
    """
    return (dtype == torch.bfloat16 and not _onednn(dtype)) or (dtype == torch.float16 and not _float16())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; x (M, C) rows, weight (K, C) in any strides or packed, bias (K,)."""
    if onednn_multiplies(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)
