"""Compact channel attention (DiCo): a gate for each channel from the image's mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dico_kernels._vectors import FEW
from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.ops import _checks as check
from dico_kernels.ops._backends import note_optional, optional, select
from dico_kernels.ops._library import only_needed, register
from dico_kernels.ops._sums import gradients, total


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check.image("x", x)
    check.pointwise("weight", weight, x.shape[1], x)
    if weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected as many outputs as x has channels")
    check.vector("bias", bias, x.shape[1], x)


# Images up to which a kernel of our own is faster than a product and the small steps around it: measured on AVX-512
# cores; on a GPU some four tiles, which read the weights again from its cache.
_FEW_IMAGES = {"cpu": FEW, "cuda": 64}


def attention_of(sums: Tensor, pixels: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(pooled, sigmoid(W pooled + b)) of pooled = sums / pixels; (N, C) in sums' dtype, the accumulation's.

    sums may be in parts, see _sums.
    """
    few = sums.shape[0] <= _FEW_IMAGES[sums.device.type]
    kernel, sums = optional("channel_attention", sums) if few else None, total(sums)
    if kernel is not None:
        note_optional("channel_attention", sums, kernel, weight.dtype)
        result: tuple[Tensor, Tensor] = kernel(sums, pixels, check.matrix(weight), check.dense(bias))
        return result
    pooled = sums / pixels
    # In the weights' dtype: widening a C x C matrix each call would cost more than the product.
    logits = F.linear(pooled.to(weight.dtype), check.matrix(weight), check.dense(bias))
    return pooled, torch.sigmoid(logits.to(pooled.dtype))


def attention_gradients(
    dattention: Tensor, attention: Tensor, pooled: Tensor, pixels: int, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of attention_of by sums, weight and bias: (dsums (N, C), dweight as weight, and dbias a sample, (N, C)).

    dattention may be in parts. dsums and dbias are in the accumulation dtype, or dsums in one that the backend's
    channel_affine takes for it.
    """
    matrix, kernel = check.matrix(weight), optional("channel_attention_backward", attention)
    found = None if kernel is None else kernel(dattention, attention, pooled, pixels, matrix)
    if found is not None:
        dsums, dweight, dbias = found
        return dsums, dweight.reshape(weight.shape), dbias
    dlogits = total(dattention) * attention * (1 - attention)
    narrow = dlogits.to(weight.dtype)
    dweight = (narrow.t() @ pooled.to(weight.dtype)).reshape(weight.shape)
    return (narrow @ matrix).to(pooled.dtype) / pixels, dweight, dlogits


def _cca(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias)
    if x.shape[0] == 0:
        return _fake(x, weight, bias)
    x = check.channels_last(x)
    kernel = optional("cca_gate", x) if x.shape[0] <= _FEW_IMAGES[x.device.type] else None
    if kernel is not None:
        note_optional("cca_gate", x, kernel)
        result: tuple[Tensor, Tensor, Tensor] = kernel(x, check.matrix(weight), check.dense(bias))
        return result
    pooled, attention = attention_of(select("channel_sums", x)(x), x.shape[2] * x.shape[3], weight, bias)
    return select("channel_affine", x)(x, attention), pooled, attention


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias)
    shape, dtype = tuple(x.shape[:2]), accumulation_dtype(x.dtype)
    return check.empty_image(x), x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, pooled: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        empty, *zeros = _backward_fake(dy, x, weight, pooled, attention)
        return empty, zeros[0].zero_(), zeros[1].zero_()
    dy, x = check.channels_last(dy), check.channels_last(x)
    dots = select("channel_dots", x)(dy, x)
    dsums, dweight, dbias = attention_gradients(dots, attention, pooled, x.shape[2] * x.shape[3], weight)
    dx: Tensor = select("channel_affine", x)(dy, attention, shift=dsums)
    (dbias,) = gradients(x.dtype, (dbias, x.shape[1:2]))
    return dx, dweight, dbias


def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, pooled: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return check.empty_image(x), x.new_empty(tuple(weight.shape)), x.new_empty((x.shape[1],))


_BACKWARD = register(
    "cca_gate_backward(Tensor dy, Tensor x, Tensor weight, Tensor pooled, Tensor attention) -> "
    "(Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _ = inputs
    _, pooled, attention = output
    ctx.mark_non_differentiable(pooled, attention)
    ctx.save_for_backward(x, weight, pooled, attention)


def _gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return only_needed(ctx, _BACKWARD(dy, *ctx.saved_tensors))


_CCA = register(
    "cca_gate(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    _cca,
    _fake,
    setup_context=_setup,
    backward=_gradient,
    autocast="lower",
)


def cca_gate(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compact channel attention: x * sigmoid(W mean_HW(x) + b) (DiCo).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        weight: (C, C, 1, 1) or (C, C).
        bias: (C,) or None.

    Returns:
        (N, C, H, W), channels_last. The mean is summed in float32 (float64 for float64). Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    y: Tensor = _CCA(x, weight, bias)[0]
    return y


__all__ = ["cca_gate"]
