"""Sums and affine maps per channel, and GRN's scale: csrc/cpu/channel.h as functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from dico_kernels._extension import call
from dico_kernels._memory import DTYPES, dense, image, like, reduced, row_blocks, vector
from dico_kernels.dtypes import accumulation_dtype


def channel_sums(x: Tensor) -> Tensor:
    """The sum over (H, W), (N, C) in the accumulation dtype."""
    image("x", x)
    *sizes, blocks = row_blocks(x)
    out, partial = reduced(x, *x.shape[:2]), reduced(x, blocks, x.shape[1])
    call("channel_sums", x, *sizes, x, out, partial)
    return out


def channel_dots(a: Tensor, b: Tensor) -> Tensor:
    """The sum over (H, W) of a * b, (N, C) in the accumulation dtype."""
    image("a", a)
    image("b", b, a)
    *sizes, blocks = row_blocks(a)
    out, partial = reduced(a, *a.shape[:2]), reduced(a, blocks, a.shape[1])
    call("channel_dots", a, *sizes, a, b, out, partial)
    return out


def channel_affine(
    x: Tensor,
    s: Tensor,
    shift: Tensor | None = None,
    z: Tensor | None = None,
    r: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """x * s + z * r + shift; s, shift and r (N, C) or (1, C) in the accumulation dtype, z and r together or neither.

    With overwrite the result may take x's memory.
    """
    image("x", x)
    if (z is None) != (r is None):
        raise ValueError("z and r belong together: expected both or neither")
    if z is not None:
        image("z", z, x)
    vectors = (("s", s), ("shift", shift), ("r", r))
    strides = [0 if v is None else vector(k, v, x, accumulation_dtype(x.dtype)) for k, v in vectors]
    y = x if overwrite else like(x)
    call("channel_affine", x, *row_blocks(x)[:4], x, s, shift, z, r, y, *strides)
    return y


def grn_scale(squares: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of global response normalisation: (norm, 1 + gamma * norm / (mean over channels of norm + eps)).

    squares, the sums over (H, W) of x * x, and both results are (N, C) in the accumulation dtype; gamma is (C,) of x's.
    """
    n, c = squares.shape
    if gamma.dtype not in DTYPES:
        raise ValueError(f"gamma has dtype {gamma.dtype}: expected a floating dtype")
    dense("squares", squares, (n, c), accumulation_dtype(gamma.dtype), squares.device)
    dense("gamma", gamma, (c,), gamma.dtype, squares.device)
    norm, s = torch.empty_like(squares), torch.empty_like(squares)
    call("grn_scale", squares, squares, gamma, norm, s, n, c, eps, dtype=gamma.dtype)
    return norm, s


def grn_rescale(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """What grn_scale gives beside the norm, (N, C), given that."""
    n, c = norm.shape
    _norm_and_gamma(norm, gamma)
    s = torch.empty_like(norm)
    call("grn_scale", norm, None, gamma, norm, s, n, c, eps, dtype=gamma.dtype)
    return s


def grn_scale_backward(dscale: Tensor, norm: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of grn_rescale by gamma, a sample, and what multiplies x in its gradient through the norms; each (N, C)."""
    n, c = norm.shape
    _norm_and_gamma(norm, gamma)
    dense("dscale", dscale, (n, c), norm.dtype, norm.device)
    dgamma, through = torch.empty_like(norm), torch.empty_like(norm)
    call("grn_scale_backward", norm, dscale, norm, gamma, dgamma, through, n, c, eps, dtype=gamma.dtype)
    return dgamma, through


def _norm_and_gamma(norm: Tensor, gamma: Tensor) -> None:
    if gamma.dtype not in DTYPES:
        raise ValueError(f"gamma has dtype {gamma.dtype}: expected a floating dtype")
    dense("norm", norm, tuple(norm.shape), accumulation_dtype(gamma.dtype), norm.device)
    dense("gamma", gamma, (norm.shape[1],), gamma.dtype, norm.device)
