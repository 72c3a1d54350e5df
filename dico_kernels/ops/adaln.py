"""adaLN, gated residual, and the two fused across the seam between residual branches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.ops import _checks as check
from dico_kernels.ops._backends import select
from dico_kernels.ops._library import only_needed, reduce_to, register
from dico_kernels.ops._sums import of_samples


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (mean, rstd), (N, H, W) each."""
    shape = (x.shape[0], x.shape[2], x.shape[3])
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _per_sample(x: Tensor, count: int) -> list[Tensor]:
    """Zeros, (N, C) each, in the accumulation dtype: also the right gradients of an empty batch."""
    return [x.new_zeros(tuple(x.shape[:2]), dtype=accumulation_dtype(x.dtype)) for _ in range(count)]


# ---- adaln_modulate ----


def _check_adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    check.image("x", x)
    check.condition("shift", shift, x)
    check.condition("scale", scale, x)
    check.positive("eps", eps)


def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check_adaln(x, shift, scale, eps)
    if x.shape[0] == 0:
        return _adaln_fake(x, shift, scale, eps)
    result: tuple[Tensor, Tensor, Tensor] = select("adaln_modulate", x)(
        check.channels_last(x), check.dense_rows(shift), check.dense_rows(scale), eps
    )
    return result


def _adaln_fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    _check_adaln(x, shift, scale, eps)
    return check.empty_image(x), *_statistics(x)


def _adaln_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        return _adaln_backward_fake(dy, x, scale, mean, rstd)
    dx, *sums = select("adaln_modulate_backward", x)(
        check.channels_last(dy), check.channels_last(x), check.dense_rows(scale), mean, rstd
    )
    return dx, *of_samples(x, *sums)


def _adaln_backward_fake(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dshift, dscale = _per_sample(x, 2)
    return check.empty_image(x), dshift, dscale


_ADALN_BACKWARD = register(
    "adaln_modulate_backward(Tensor dy, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _adaln_backward,
    _adaln_backward_fake,
)


def _adaln_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, shift, scale, mean, rstd)


def _adaln_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, shift, scale, mean, rstd = ctx.saved_tensors
    dx, dshift, dscale = _ADALN_BACKWARD(dy, x, scale, mean, rstd)
    return only_needed(ctx, (dx, reduce_to(dshift, shift), reduce_to(dscale, scale), None))


_ADALN = register(
    "adaln_modulate(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor, Tensor)",
    _adaln,
    _adaln_fake,
    setup_context=_adaln_setup,
    backward=_adaln_gradient,
    autocast="activation",
)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """adaLN: LayerNorm over channels without affine, then * (1 + scale) + shift (DiT, DiCo, FCDM).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16. channels_last is the fast path; others are converted.
        shift: (N, C), or (1, C) and broadcast; x's dtype and device.
        scale: as shift.
        eps: added to the variance.

    Returns:
        (N, C, H, W), channels_last. Statistics in float32 (float64 for float64). Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    y: Tensor = _ADALN(x, shift, scale, eps)[0]
    return y


# ---- gated_residual ----


def _check_gated(x: Tensor, branch: Tensor, gate: Tensor) -> None:
    check.image("x", x)
    check.like_image("branch", branch, x)
    check.condition("gate", gate, x)


def _gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    _check_gated(x, branch, gate)
    if x.shape[0] == 0:
        return check.empty_image(x)
    y: Tensor = select("gated_residual", x)(check.channels_last(x), check.channels_last(branch), check.dense_rows(gate))
    return y


def _gated_fake(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    _check_gated(x, branch, gate)
    return check.empty_image(x)


def _gated_backward(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    if dy.shape[0] == 0:
        return _gated_backward_fake(dy, branch, gate)
    dbranch, dgate = select("gated_residual_backward", dy)(
        check.channels_last(dy), check.channels_last(branch), check.dense_rows(gate)
    )
    return dbranch, *of_samples(dy, dgate)


def _gated_backward_fake(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    return check.empty_image(dy), _per_sample(dy, 1)[0]


_GATED_BACKWARD = register(
    "gated_residual_backward(Tensor dy, Tensor branch, Tensor gate) -> (Tensor, Tensor)",
    _gated_backward,
    _gated_backward_fake,
)


def _gated_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, branch, gate = inputs
    ctx.save_for_backward(branch, gate)


def _gated_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    branch, gate = ctx.saved_tensors
    if not any(ctx.needs_input_grad[1:]):
        return dy, None, None
    dbranch, dgate = _GATED_BACKWARD(dy, branch, gate)
    return only_needed(ctx, (dy, dbranch, reduce_to(dgate, gate)))


_GATED = register(
    "gated_residual(Tensor x, Tensor branch, Tensor gate) -> Tensor",
    _gated,
    _gated_fake,
    setup_context=_gated_setup,
    backward=_gated_gradient,
    autocast="activation",
)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """X + gate * branch.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        branch: as x.
        gate: (N, C), or (1, C) and broadcast; x's dtype and device.

    Returns:
        (N, C, H, W), channels_last. Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    y: Tensor = _GATED(x, branch, gate)
    return y


# ---- gated_residual_adaln ----


def _check_seam(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    _check_gated(x, branch, gate)
    _check_adaln(x, shift, scale, eps)


def _seam(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_seam(x, branch, gate, shift, scale, eps)
    if x.shape[0] == 0:
        return _seam_fake(x, branch, gate, shift, scale, eps)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = select("gated_residual_adaln", x)(
        check.channels_last(x),
        check.channels_last(branch),
        check.dense_rows(gate),
        check.dense_rows(shift),
        check.dense_rows(scale),
        eps,
    )
    return result


def _seam_fake(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_seam(x, branch, gate, shift, scale, eps)
    return check.empty_image(x), check.empty_image(x), *_statistics(x)


def _seam_backward(
    dy: Tensor, dh: Tensor, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if y.shape[0] == 0:
        return _seam_backward_fake(dy, dh, y, branch, gate, scale, mean, rstd)
    images = [check.channels_last(v) for v in (dy, dh, y, branch)]
    dx, dbranch, *sums = select("gated_residual_adaln_backward", y)(
        *images, check.dense_rows(gate), check.dense_rows(scale), mean, rstd
    )
    return dx, dbranch, *of_samples(y, *sums)


def _seam_backward_fake(
    dy: Tensor, dh: Tensor, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dgate, dshift, dscale = _per_sample(y, 3)
    return check.empty_image(y), check.empty_image(y), dgate, dshift, dscale


_SEAM_BACKWARD = register(
    "gated_residual_adaln_backward(Tensor dy, Tensor dh, Tensor y, Tensor branch, Tensor gate, Tensor scale, "
    "Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _seam_backward,
    _seam_backward_fake,
)


def _seam_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, branch, gate, shift, scale, _ = inputs
    y, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(True)  # y or h may be all that is used
    ctx.save_for_backward(y, branch, gate, shift, scale, mean, rstd)


def _seam_gradient(ctx: Any, dy: Tensor, dh: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    y, branch, gate, shift, scale, mean, rstd = ctx.saved_tensors
    dx, dbranch, dgate, dshift, dscale = _SEAM_BACKWARD(dy, dh, y, branch, gate, scale, mean, rstd)
    vectors = (reduce_to(dgate, gate), reduce_to(dshift, shift), reduce_to(dscale, scale))
    return only_needed(ctx, (dx, dbranch, *vectors, None))


_SEAM = register(
    "gated_residual_adaln(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, float eps) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _seam,
    _seam_fake,
    setup_context=_seam_setup,
    backward=_seam_gradient,
    autocast="activation",
)


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The seam between two residual branches in one pass: y = x + gate * branch, and adaLN of y.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        branch: as x.
        gate: (N, C), or (1, C) and broadcast; x's dtype and device.
        shift: as gate.
        scale: as gate.
        eps: added to the variance.

    Returns:
        (y, adaln_modulate(y, shift, scale, eps)), both (N, C, H, W), channels_last. Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    y, h = _SEAM(x, branch, gate, shift, scale, eps)[:2]
    return y, h


__all__ = ["adaln_modulate", "gated_residual", "gated_residual_adaln"]
