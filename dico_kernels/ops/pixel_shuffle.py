"""The decoder's entry: pixel shuffle, skip concatenation and 1x1 convolution as one product over gathered operands."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from dico_kernels import native
from dico_kernels.ops import _checks as check
from dico_kernels.ops._backends import multiplies_natively, select
from dico_kernels.ops._library import only_needed, register
from dico_kernels.ops._recorded import recorded
from dico_kernels.ops._sums import gradients


def _check(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check.image("up", up)
    check.image("skip", skip)
    n, c4, h, w = up.shape
    if c4 % 4:
        raise ValueError(f"up has {c4} channels: expected a multiple of 4, PixelShuffle(2)'s input")
    if skip.shape[0] != n or skip.shape[2] != 2 * h or skip.shape[3] != 2 * w:
        raise ValueError(f"skip has shape {tuple(skip.shape)}: expected ({n}, S, {2 * h}, {2 * w}), twice up's {h}x{w}")
    check.same_kind("skip", skip, up)
    check.pointwise("weight", weight, c4 // 4 + skip.shape[1], up)
    check.vector("bias", bias, weight.shape[0], up)


def _kernel(entry: str, up: Tensor, weight: Tensor) -> Callable[..., Any]:
    kernel = select(entry, up)
    if kernel in (native.pixel_shuffle_skip, native.pixel_shuffle_skip_backward):
        return partial(kernel, own=multiplies_natively(weight, up))
    return kernel


def _forward(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(up, skip, weight, bias)
    if up.shape[0] == 0:
        return check.empty_image(up, weight.shape[0], 2)
    four = weight.contiguous() if weight.ndim == 4 else check.matrix(weight)[:, :, None, None]
    y: Tensor = _kernel("pixel_shuffle_skip", up, four)(
        check.channels_last(up), check.channels_last(skip), four, check.dense(bias)
    )
    return y


def _fake(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(up, skip, weight, bias)
    return check.empty_image(up, weight.shape[0], 2)


def _backward(dy: Tensor, up: Tensor, skip: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if up.shape[0] == 0:
        dup, dskip, dweight, dbias = _backward_fake(dy, up, skip, weight)
        return dup, dskip, dweight.zero_(), dbias.zero_()
    images = [check.channels_last(v) for v in (dy, up, skip)]
    four = check.matrix(weight)[:, :, None, None]
    dup, dskip, dweight, dbias = _kernel("pixel_shuffle_skip_backward", up, four)(*images, four)
    sums = gradients(up.dtype, (dweight, weight.shape), (dbias, weight.shape[:1]))
    return dup, dskip, *sums


def _backward_fake(dy: Tensor, up: Tensor, skip: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = up.new_empty(tuple(weight.shape)), up.new_empty((weight.shape[0],))
    return check.empty_image(up), check.empty_image(skip), *parameters


_BACKWARD = register(
    "pixel_shuffle_skip_backward(Tensor dy, Tensor up, Tensor skip, Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)",
    recorded("pixel_shuffle_skip_backward", _backward, weight=3),
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return only_needed(ctx, _BACKWARD(dy, *ctx.saved_tensors))


_SKIP = register(
    "pixel_shuffle_skip(Tensor up, Tensor skip, Tensor weight, Tensor? bias) -> Tensor",
    _forward,
    _fake,
    setup_context=_setup,
    backward=_gradient,
    autocast="lower",
)


def pixel_shuffle_skip(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution of cat[PixelShuffle(2)(up), skip]; neither the shuffled nor the joined tensor is stored.

    Args:
        up: (N, 4C, H, W), float32, float64, bfloat16 or float16: the up convolution's output before shuffling.
        skip: (N, S, 2H, 2W), of up's dtype and device.
        weight: (K, C + S, 1, 1) or (K, C + S); its first C input channels meet the shuffled tensor.
        bias: (K,) or None.

    Returns:
        (N, K, 2H, 2W), channels_last. Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    y: Tensor = _SKIP(up, skip, weight, bias)
    return y


__all__ = ["pixel_shuffle_skip"]
