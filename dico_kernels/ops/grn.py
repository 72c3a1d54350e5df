"""Global response normalisation (ConvNeXt V2, FCDM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.ops import _checks as check
from dico_kernels.ops._backends import note_optional, optional, select
from dico_kernels.ops._library import only_needed, register
from dico_kernels.ops._sums import gradients, total


def check_parameter(name: str, p: Tensor, c: int, x: Tensor) -> None:
    """C elements in any of the published shapes, of x's dtype and device."""
    if tuple(p.shape) not in ((1, c, 1, 1), (1, 1, 1, c), (c,)):
        raise ValueError(f"{name} has shape {tuple(p.shape)}: expected (1, {c}, 1, 1), (1, 1, 1, {c}) or ({c},)")
    check.same_kind(name, p, x)


def _check(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> None:
    check.image("x", x)
    check_parameter("gamma", gamma, x.shape[1], x)
    check_parameter("beta", beta, x.shape[1], x)
    check.positive("eps", eps)


def _row(p: Tensor, like: Tensor) -> Tensor:
    """A parameter as (1, C) in the accumulation dtype."""
    return p.reshape(1, -1).to(accumulation_dtype(like.dtype)).contiguous()


def scale_of(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """1 + gamma * Nx: what GRN multiplies x by, (N, C), given the norms over pixels; gamma as modules have it."""
    kernel = optional("grn_rescale", norm)
    if kernel is not None:
        found: Tensor = kernel(norm, gamma.contiguous().reshape(-1), eps)
        return found
    return 1 + _row(gamma, norm) * (norm / (norm.mean(1, keepdim=True) + eps))


def norm_and_scale(squares: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm, scale_of(norm, ...)) of the sums of squares over pixels, finished or in parts."""
    kernel = optional("grn_scale", squares)
    if kernel is not None:
        note_optional("grn_scale", squares, kernel, gamma.dtype)
        found: tuple[Tensor, Tensor] = kernel(squares, gamma.contiguous().reshape(-1), eps)
        return found
    norm = total(squares).sqrt()
    return norm, scale_of(norm, gamma, eps)


def scale_gradients(dscale: Tensor, norm: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of scale_of: dgamma a sample, and what multiplies x in its gradient through the norms, (N, C) each.

    dscale may be in parts.
    """
    kernel = optional("grn_scale_backward", norm)
    if kernel is not None:
        found: tuple[Tensor, Tensor] = kernel(dscale, norm, gamma.contiguous().reshape(-1), eps)
        return found
    dscale, mean = total(dscale), norm.mean(1, keepdim=True) + eps
    dresponse = _row(gamma, norm) * dscale
    dnorm = dresponse / mean - (dresponse * norm).mean(1, keepdim=True) / mean.square()
    # d|x| / dx = x / |x|; a channel that is zero everywhere gets zero, as torch's norm gives it.
    through = torch.where(norm > 0, dnorm / norm, torch.zeros_like(norm))
    return dscale * norm / mean, through


def _grn(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, gamma, beta, eps)
    if x.shape[0] == 0:
        return _fake(x, gamma, beta, eps)
    x = check.channels_last(x)
    norm, s = norm_and_scale(select("channel_dots", x)(x, x), gamma, eps)
    y: Tensor = select("channel_affine", x)(x, s, shift=_row(beta, x))
    return y, norm


def _fake(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, gamma, beta, eps)
    return check.empty_image(x), x.new_empty(tuple(x.shape[:2]), dtype=accumulation_dtype(x.dtype))


def _backward(
    dy: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0:
        empty, *zeros = _backward_fake(dy, x, gamma, beta, norm, eps)
        return empty, zeros[0].zero_(), zeros[1].zero_()
    dy, x = check.channels_last(dy), check.channels_last(x)
    dots: Tensor = select("channel_dots", x)(dy, x)
    dgamma, through = scale_gradients(dots, norm, gamma, eps)
    dx: Tensor = select("channel_affine", x)(dy, scale_of(norm, gamma, eps), z=x, r=through)
    dbeta = select("channel_sums", x)(dy)
    return dx, *gradients(x.dtype, (dgamma, gamma.shape), (dbeta, beta.shape))  # type: ignore[return-value]


def _backward_fake(
    dy: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, norm: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return check.empty_image(x), x.new_empty(tuple(gamma.shape)), x.new_empty(tuple(beta.shape))


_BACKWARD = register(
    "grn_backward(Tensor dy, Tensor x, Tensor gamma, Tensor beta, Tensor norm, float eps) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gamma, beta, eps = inputs
    norm = output[1]
    ctx.mark_non_differentiable(norm)
    ctx.eps = eps
    ctx.save_for_backward(x, gamma, beta, norm)


def _gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return only_needed(ctx, (*_BACKWARD(dy, *ctx.saved_tensors, ctx.eps), None))


_GRN = register(
    "grn(Tensor x, Tensor gamma, Tensor beta, float eps) -> (Tensor, Tensor)",
    _grn,
    _fake,
    setup_context=_setup,
    backward=_gradient,
    autocast="activation",
)


def grn(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """Global response normalisation: gamma * (x * Nx) + beta + x (ConvNeXt V2, FCDM).

    Nx = G / (mean over channels of G + eps), G the L2 norm over (H, W) of each sample and channel.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16.
        gamma: C elements as (1, C, 1, 1), (1, 1, 1, C) or (C,); x's dtype and device.
        beta: as gamma.
        eps: added to the mean norm.

    Returns:
        (N, C, H, W), channels_last. Norms in float32 (float64 for float64). Differentiable once.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    y: Tensor = _GRN(x, gamma, beta, eps)[0]
    return y


__all__ = ["grn"]
