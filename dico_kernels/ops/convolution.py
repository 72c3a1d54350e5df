"""Dense convolutions, as between the levels of a U-shaped model, where native ones are faster than the library's.

Of few pixels with many weights; 3x3 of more in float32; and of any in 16-bit dtypes on a CPU whose library has no
convolution of them but slow loops. Not among the public ops: elsewhere, and on GPUs, the library's convolution is the
faster one, and is what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dico_kernels import _winograd
from dico_kernels._linear import loops
from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.ops import _checks as check
from dico_kernels.ops._backends import multiplies_natively, note_optional, optional
from dico_kernels.ops._library import autocasting, only_needed, register


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the op is there for a convolution of x, and it or its gradient is faster than the library's.

    weight: (K, C, k, k). What has groups is the library's; so is, where that has more than loops, a weight in unusual
    memory.
    """
    if x.ndim != 4 or not x.numel() or weight.shape[1] != x.shape[1]:
        return False
    gradients, lowered = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad), autocasting(x)
    if x.dtype != weight.dtype and not lowered:
        return False
    dtype = torch.get_autocast_dtype(x.device.type) if lowered and x.dtype != torch.float64 else x.dtype
    if not x.is_cpu or not loops(dtype):
        few = _are_few(x, weight, gradients) and weight.is_contiguous()
        if lowered and not gradients:
            few = False  # PyTorch keeps a cast weight for the next call
        if not few and not _is_for_winograd(x, weight, dtype):
            return False
    return multiplies_natively(weight if weight.dtype == dtype else weight.new_empty(0, dtype=dtype), x)


def _are_few(x: Tensor, weight: Tensor, backward: bool = False) -> bool:
    """Whether x's pixels are: fewer forward than backward, as the library packs a weight faster than it unpacks dW."""
    n, _, h, w = x.shape
    return 0 < n * h * w * (1 if backward else 4) <= weight.shape[0]


def _is_for_winograd(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    n, _, h, w = x.shape
    return _winograd.pays_unpacked(n, h, w, weight, dtype)


def _is_own(x: Tensor, weight: Tensor, backward: bool = False) -> bool:
    """Whether native's is the one to convolve, or to form the gradients."""
    if not x.numel() or not multiplies_natively(weight, x):
        return False
    return loops(x.dtype) or _are_few(x, weight, backward) or _is_for_winograd(x, weight, x.dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    check.image("x", x)
    k = weight.shape[-1] if weight.ndim else 0
    if tuple(weight.shape[1:]) != (x.shape[1], k, k) or not weight.numel():
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (K, {x.shape[1]}, k, k)")
    check.kernel_size("weight", weight)
    check.same_kind("weight", weight, x)
    check.vector("bias", bias, weight.shape[0], x)


def _own(entry: str, x: Tensor) -> Callable[..., Tensor] | None:
    found = optional(entry, x)
    if found is not None:
        note_optional(entry, x, found)
    return found


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    x = check.channels_last(x)
    if _is_own(x, weight) and (own := _own("convolution", x)) is not None:
        return own(x, weight, check.dense(bias))
    return _image(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    _check(x, weight, bias)
    return check.empty_image(x, weight.shape[0])


def _image(t: Tensor) -> Tensor:
    """In channels_last memory, with the strides that such an image has where dimensions of 1 leave them open, too."""
    n, c, h, w = t.shape
    return check.channels_last(t).as_strided((n, c, h, w), (h * w * c, 1, w * c, c))


def _backward(dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    check.like_image("dy", dy, _fake(x, weight))
    dy, x = check.channels_last(dy), check.channels_last(x)
    ours = _is_own(x, weight, backward=True)
    # Of a 16-bit dtype ours is formed in float32, or each tap's would be rounded: no match for a product of that dtype.
    fast = x.dtype == accumulation_dtype(x.dtype) or loops(x.dtype)
    own_dx = _own("convolution_gradient", x) if of_x and ours and fast else None
    own_dweight = _own("convolution_weight_gradient", x) if of_weight and ours else None
    half, one = [weight.shape[-1] // 2] * 2, [1, 1]
    left = [of_x and own_dx is None, of_weight and own_dweight is None, False]
    dx = dweight = None
    if any(left):
        options = (None, one, half, one, False, [0, 0], 1)
        dx, dweight, _ = torch.ops.aten.convolution_backward(dy, x, weight.contiguous(), *options, left)
    if own_dx is not None:
        dx = own_dx(dy, weight)
    if own_dweight is not None:
        dweight = own_dweight(dy, x, weight)
    empty = x.new_empty(0)
    # Anew from its elements: dimensions of 1 leave strides open here, too.
    return empty if dx is None else _image(dx), empty if dweight is None else dweight.reshape(-1).view(weight.shape)


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    check.like_image("dy", dy, _fake(x, weight))
    dweight = weight.new_empty(tuple(weight.shape) if of_weight else (0,))
    return check.empty_image(x) if of_x else x.new_empty(0), dweight


_BACKWARD = register(
    "convolution_backward(Tensor dy, Tensor x, Tensor weight, bool of_x, bool of_weight) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    of_x, of_weight, of_bias = ctx.needs_input_grad
    found = _BACKWARD(dy, *ctx.saved_tensors, of_x, of_weight) if of_x or of_weight else (None, None)
    return only_needed(ctx, (*found, dy.sum((0, 2, 3)) if of_bias else None))


_CONVOLUTION = register(
    "convolution(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward,
    _fake,
    setup_context=_setup,
    backward=_gradient,
    autocast="lower",
)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution with zeros around and stride 1: F.conv2d(x, weight, bias, padding=k // 2).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        weight: (K, C, k, k), k odd, of x's dtype and device.
        bias: (K,), as weight, or None.

    Returns:
        (N, K, H, W), channels_last. Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    y: Tensor = _CONVOLUTION(x, weight, bias)
    return y


__all__ = ["convolution", "pays"]
