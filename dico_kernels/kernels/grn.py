"""What global response normalisation multiplies by, from sums over pixels: a program a sample, all its channels."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from dico_kernels.kernels.common import acc_triton, empty_acc, kernel, launch, load, row_offset, store, summed_parts
from dico_kernels.kernels.tiles import pow2


@kernel
def _grn_scale_fwd_kernel(
    norm_at, squares, gamma, s,
    C, count,
    SQUARES: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """s = 1 + gamma * norm / (its mean + eps); the norm is read, or SQUARES: added up and stored."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, COLS).to(tl.int64)
    mask = c < C
    at = row_offset(n, C) + c
    if SQUARES:
        norm = tl.sqrt(summed_parts(squares, n, count, C, c, PARTS, ACC))
        store(norm_at + at, norm, mask)
    else:
        norm = load(norm_at + at, mask, ACC)
    mean = tl.sum(norm) / C + EPS
    store(s + at, 1.0 + load(gamma + c, mask, ACC) * (norm / mean), mask)


@kernel
def _grn_scale_bwd_kernel(
    ds, norm_in, gamma, dgamma, through,
    C, count,
    EPS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, COLS).to(tl.int64)
    mask = c < C
    at = row_offset(n, C) + c
    d = summed_parts(ds, n, count, C, c, PARTS, ACC)
    norm = load(norm_in + at, mask, ACC)
    mean = tl.sum(norm) / C + EPS
    store(dgamma + at, d * norm / mean, mask)
    d *= load(gamma + c, mask, ACC)
    dnorm = d / mean - tl.sum(d * norm) / C / (mean * mean)
    # d|x| / dx = x / |x|; a channel that is zero everywhere gets zero, as torch's norm gives it
    store(through + at, tl.where(norm > 0.0, dnorm / tl.where(norm > 0.0, norm, 1.0), 0.0), mask)


def _tile(c: int) -> tuple[int, int, int]:
    """(columns, parts at a time, warps): up to 32 elements a thread."""
    cols = pow2(c)
    parts = min(max(16384 // cols, 1), 16)
    return cols, parts, min(max(cols * parts // 1024, 1), 16)


def _scale(squares: Tensor | None, norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    (n, c), count = norm.shape, 1 if squares is None else squares.shape[1]
    s = empty_acc(n, c, like=norm)
    cols, parts, warps = _tile(c)
    launch(
        _grn_scale_fwd_kernel, n, norm, squares, gamma, s, c, count,
        SQUARES=squares is not None, EPS=eps, PARTS=parts, COLS=cols, ACC=acc_triton(norm.dtype), num_warps=warps,
    )  # fmt: skip
    return s


def grn_scale(squares: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm, 1 + gamma * norm / (its mean over channels + eps)), both (N, C).

    Args:
        squares: (N, parts, C), accumulation type: to be added up over parts, norm's square.
        gamma: (C,), contiguous, any type.
        eps: added to the mean.
    """
    norm = empty_acc(squares.shape[0], squares.shape[2], like=squares)
    return norm, _scale(squares, norm, gamma, eps)


def grn_rescale(norm: Tensor, gamma: Tensor, eps: float) -> Tensor:
    """grn_scale's second result anew, from its first."""
    return _scale(None, norm, gamma, eps)


def grn_scale_backward(dscale: Tensor, norm: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of grn_scale's second result: dgamma a sample, and what multiplies x in its gradient through norm; (N, C) each.

    dscale is (N, parts, C).
    """
    n, c = norm.shape
    dgamma, through = empty_acc(n, c, like=norm), empty_acc(n, c, like=norm)
    cols, parts, warps = _tile(c)
    launch(
        _grn_scale_bwd_kernel, n, dscale, norm, gamma, dgamma, through, c, dscale.shape[1],
        EPS=eps, PARTS=parts, COLS=cols, ACC=acc_triton(norm.dtype), num_warps=warps,
    )  # fmt: skip
    return dgamma, through
