"""Dense convolution of few pixels with many weights, as where a U-shaped model goes up from its lowest level.

Not among the public ops: elsewhere, and on GPUs, the library's convolution is the faster one, and is what runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.ops import _checks as check
from dico_kernels.ops._backends import multiplies_natively, note_optional, optional
from dico_kernels.ops._library import autocasting, only_needed, register


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the op is there for a convolution of x without bias, and it or its gradient is faster than the library's.

    weight: (K, C, k, k); what has groups, or lies in other memory than such weights usually do, is the library's.
    """
    if optional("convolution", x) is None or x.ndim != 4 or weight.shape[1] != x.shape[1] or not weight.is_contiguous():
        return False
    if x.dtype != weight.dtype and not autocasting(x):
        return False
    return 0 < _pixels(x) <= weight.shape[0]


def _pixels(x: Tensor) -> int:
    n, _, h, w = x.shape
    return n * h * w


def _check(x: Tensor, weight: Tensor) -> None:
    check.image("x", x)
    k = weight.shape[-1] if weight.ndim else 0
    if tuple(weight.shape[1:]) != (x.shape[1], k, k) or not weight.numel():
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (K, {x.shape[1]}, k, k)")
    if k % 2 == 0 or k > check.MAX_KERNEL:
        raise ValueError(f"weight has a {k}x{k} kernel: expected an odd size, 1 to {check.MAX_KERNEL}")
    check.same_kind("weight", weight, x)


def _own(entry: str, x: Tensor) -> Callable[..., Tensor] | None:
    found = optional(entry, x)
    if found is not None:
        note_optional(entry, x, found)
    return found


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    x, weight = check.channels_last(x), weight.contiguous()
    # Fewer than in backward: the library packs a weight faster than it unpacks a gradient.
    few = 0 < 4 * _pixels(x) <= weight.shape[0] and multiplies_natively(weight, x)
    if few and (own := _own("convolution", x)) is not None:
        return own(x, weight)
    return check.channels_last(F.conv2d(x, weight, padding=weight.shape[-1] // 2))


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    _check(x, weight)
    return check.empty_image(x, weight.shape[0])


def _backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dy, x, weight = check.channels_last(dy), check.channels_last(x), weight.contiguous()
    few = 0 < _pixels(x) <= weight.shape[0] and multiplies_natively(weight, x)
    # Of 16-bit types ours would round what each tap adds to dx, and the library rounds their sum.
    own_dx = _own("convolution_gradient", x) if few and x.dtype == accumulation_dtype(x.dtype) else None
    own_dweight = _own("convolution_weight_gradient", x) if few else None
    half, one, left = [weight.shape[-1] // 2] * 2, [1, 1], [own_dx is None, own_dweight is None, False]
    dx, dweight, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, one, half, one, False, [0, 0], 1, left)
    if own_dx is not None:
        dx = own_dx(dy, weight)
    if own_dweight is not None:
        dweight = own_dweight(dy, x, weight)
    return check.channels_last(dx), dweight.contiguous()


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return check.empty_image(x), weight.new_empty(tuple(weight.shape))


_BACKWARD = register(
    "convolution_backward(Tensor dy, Tensor x, Tensor weight) -> (Tensor, Tensor)", _backward, _backward_fake
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return only_needed(ctx, _BACKWARD(dy, *ctx.saved_tensors))


_CONVOLUTION = register(
    "convolution(Tensor x, Tensor weight) -> Tensor",
    _forward,
    _fake,
    setup_context=_setup,
    backward=_gradient,
    autocast="lower",
)


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution with zeros around and stride 1: F.conv2d(x, weight, padding=k // 2).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        weight: (K, C, k, k), k odd, of x's dtype and device.

    Returns:
        (N, K, H, W), channels_last. Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    y: Tensor = _CONVOLUTION(x, weight)
    return y


__all__ = ["convolution", "pays"]
