"""Depthwise convolutions fused with what follows them: GELU (DiCo) or adaLN (FCDM)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.ops import _checks as check
from dico_kernels.ops._backends import select
from dico_kernels.ops._library import only_needed, reduce_to, register
from dico_kernels.ops._recorded import recorded
from dico_kernels.ops._sums import gradients, of_samples
from dico_kernels.ops.pointwise import input_gradient, plain_product, weight_gradient

# ---- pointwise_depthwise_gelu ----


def _check_pdg(x: Tensor, pw_weight: Tensor, pw_bias: Tensor | None, dw_weight: Tensor, dw_bias: Tensor | None) -> None:
    check.image("x", x)
    check.pointwise("pw_weight", pw_weight, x.shape[1], x)
    check.vector("pw_bias", pw_bias, pw_weight.shape[0], x)
    check.depthwise("dw_weight", dw_weight, pw_weight.shape[0], x)
    check.vector("dw_bias", dw_bias, pw_weight.shape[0], x)


def _pdg(
    x: Tensor, pw_weight: Tensor, pw_bias: Tensor | None, dw_weight: Tensor, dw_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_pdg(x, pw_weight, pw_bias, dw_weight, dw_bias)
    if x.shape[0] == 0:
        return _pdg_fake(x, pw_weight, pw_bias, dw_weight, dw_bias)
    hidden = plain_product(check.channels_last(x), check.matrix(pw_weight), check.dense(pw_bias))
    y: Tensor = select("depthwise", x)(hidden, dw_weight.contiguous(), check.dense(dw_bias), True)
    return y, hidden


def _pdg_fake(
    x: Tensor, pw_weight: Tensor, pw_bias: Tensor | None, dw_weight: Tensor, dw_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_pdg(x, pw_weight, pw_bias, dw_weight, dw_bias)
    k = pw_weight.shape[0]
    return check.empty_image(x, k), check.empty_image(x, k)


def _pdg_backward(
    dy: Tensor, x: Tensor, hidden: Tensor, pw_weight: Tensor, dw_weight: Tensor, dw_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        dx, *zeros = _pdg_backward_fake(dy, x, hidden, pw_weight, dw_weight, dw_bias)
        return dx, *(z.zero_() for z in zeros)  # type: ignore[return-value]
    dhidden, ddw, ddb = select("depthwise_backward", x)(
        check.channels_last(dy), check.channels_last(hidden), dw_weight.contiguous(), check.dense(dw_bias), True
    )
    dx = input_gradient(dhidden, check.matrix(pw_weight))
    dpw = weight_gradient(dhidden, check.channels_last(x)).reshape(pw_weight.shape)
    sums = select("channel_sums", x)(dhidden)
    k = pw_weight.shape[:1]
    return dx, dpw, *gradients(x.dtype, (sums, k), (ddw, dw_weight.shape), (ddb, k))  # type: ignore[return-value]


def _pdg_backward_fake(
    dy: Tensor, x: Tensor, hidden: Tensor, pw_weight: Tensor, dw_weight: Tensor, dw_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k = pw_weight.shape[0]
    parameters = [x.new_empty(tuple(shape)) for shape in (pw_weight.shape, (k,), dw_weight.shape, (k,))]
    return check.empty_image(x), *parameters  # type: ignore[return-value]


_PDG_BACKWARD = register(
    "pointwise_depthwise_gelu_backward(Tensor dy, Tensor x, Tensor hidden, Tensor pw_weight, Tensor dw_weight, "
    "Tensor? dw_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    recorded("pointwise_depthwise_gelu_backward", _pdg_backward, weight=3),
    _pdg_backward_fake,
)


def _pdg_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, pw_weight, _, dw_weight, dw_bias = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(x, hidden, pw_weight, dw_weight, dw_bias)


def _pdg_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return only_needed(ctx, _PDG_BACKWARD(dy, *ctx.saved_tensors))


_PDG = register(
    "pointwise_depthwise_gelu(Tensor x, Tensor pw_weight, Tensor? pw_bias, Tensor dw_weight, Tensor? dw_bias) -> "
    "(Tensor, Tensor)",
    _pdg,
    _pdg_fake,
    setup_context=_pdg_setup,
    backward=_pdg_gradient,
    autocast="lower",
)


def pointwise_depthwise_gelu(
    x: Tensor, pw_weight: Tensor, pw_bias: Tensor | None, dw_weight: Tensor, dw_bias: Tensor | None
) -> Tensor:
    """DiCo's convolution: GELU(depthwise(pointwise(x))), GELU in its exact (erf) form.

    The 1x1 is a matrix product on the channels_last rows; depthwise, bias and GELU are one kernel. The
    zero padding surrounds the 1x1's output, bias included.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        pw_weight: (K, C, 1, 1) or (K, C).
        pw_bias: (K,) or None.
        dw_weight: (K, 1, k, k), k odd, 1 to 9; padding k // 2.
        dw_bias: (K,) or None.

    Returns:
        (N, K, H, W), channels_last. Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    y: Tensor = _PDG(x, pw_weight, pw_bias, dw_weight, dw_bias)[0]
    return y


# ---- depthwise_adaln ----


def _check_da(x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float) -> None:
    check.image("x", x)
    check.depthwise("weight", weight, x.shape[1], x)
    check.vector("bias", bias, x.shape[1], x)
    check.condition("shift", shift, x)
    check.condition("scale", scale, x)
    check.positive("eps", eps)


def _da(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_da(x, weight, bias, shift, scale, eps)
    if x.shape[0] == 0:
        return _da_fake(x, weight, bias, shift, scale, eps)
    z = select("depthwise", x)(check.channels_last(x), weight.contiguous(), check.dense(bias), False)
    result: tuple[Tensor, Tensor, Tensor] = select("adaln_modulate", x)(
        z, check.dense_rows(shift), check.dense_rows(scale), eps
    )
    return result


def _da_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    _check_da(x, weight, bias, shift, scale, eps)
    shape, dtype = (x.shape[0], x.shape[2], x.shape[3]), accumulation_dtype(x.dtype)
    return check.empty_image(x), x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _da_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        dx, *zeros = _da_backward_fake(dy, x, weight, bias, scale, mean, rstd)
        return dx, *(z.zero_() for z in zeros)  # type: ignore[return-value]
    x, weight = check.channels_last(x), weight.contiguous()
    z = select("depthwise", x)(x, weight, check.dense(bias), False)  # recomputed: cheaper than keeping an activation
    dz, dshift, dscale = select("adaln_modulate_backward", x)(
        check.channels_last(dy), z, check.dense_rows(scale), mean, rstd
    )
    dx, dweight, dbias = select("depthwise_backward", x)(dz, x, weight, None, False)
    parameters = gradients(x.dtype, (dweight, weight.shape), (dbias, weight.shape[:1]))
    return dx, *parameters, *of_samples(x, dshift, dscale)


def _da_backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    per_sample, dtype = tuple(x.shape[:2]), accumulation_dtype(x.dtype)
    return (
        check.empty_image(x),
        x.new_empty(tuple(weight.shape)),
        x.new_empty((x.shape[1],)),
        x.new_empty(per_sample, dtype=dtype),
        x.new_empty(per_sample, dtype=dtype),
    )


_DA_BACKWARD = register(
    "depthwise_adaln_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor scale, Tensor mean, "
    "Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _da_backward,
    _da_backward_fake,
)


def _da_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, shift, scale, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, shift, scale, mean, rstd)


def _da_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, bias, shift, scale, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias, dshift, dscale = _DA_BACKWARD(dy, x, weight, bias, scale, mean, rstd)
    return only_needed(ctx, (dx, dweight, dbias, reduce_to(dshift, shift), reduce_to(dscale, scale), None))


_DA = register(
    "depthwise_adaln(Tensor x, Tensor weight, Tensor? bias, Tensor shift, Tensor scale, float eps) -> "
    "(Tensor, Tensor, Tensor)",
    _da,
    _da_fake,
    setup_context=_da_setup,
    backward=_da_gradient,
    autocast="lower",
)


def depthwise_adaln(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> Tensor:
    """FCDM's entry: depthwise convolution, LayerNorm over channels without affine, then * (1 + scale) + shift.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        weight: (C, 1, k, k), k odd, 1 to 9 (FCDM: 7); padding k // 2.
        bias: (C,) or None.
        shift: (N, C), or (1, C) and broadcast; x's dtype and device.
        scale: as shift.
        eps: added to the variance.

    Returns:
        (N, C, H, W), channels_last. Backward recomputes the convolution. Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    y: Tensor = _DA(x, weight, bias, shift, scale, eps)[0]
    return y


__all__ = ["depthwise_adaln", "pointwise_depthwise_gelu"]
