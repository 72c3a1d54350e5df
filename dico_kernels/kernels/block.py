"""The residual branches of DiCo's and FCDM's blocks, from kernels that fuse all that is not a product into products.

Images (N, C, H, W) with channels_last memory; shift, scale and gate (N, C) or (1, C); weights as the modules have
them. Each function returns the branch's result and what its backward wants; with `more` also Partials of the result,
where a next branch's LayerNorm can use them: given to the next call as `partials` they save it a pass over its
input, at the price of an epilogue that counts more instructions than that pass.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.kernels.channel import channel_sums
from dico_kernels.kernels.depthwise import depthwise
from dico_kernels.kernels.gemm import Partials, Statistics, modulation_terms, pointwise, project, row_statistics
from dico_kernels.kernels.grn import grn_scale
from dico_kernels.kernels.sums import add_up
from dico_kernels.kernels.vectors import channel_attention


class ConvHalf(NamedTuple):
    """statistics of x; y1 the first 1x1's result; pooled, attention (N, C) in the accumulation type."""

    out: Tensor
    partials: Partials | None
    statistics: Statistics
    y1: Tensor
    pooled: Tensor
    attention: Tensor


class FfnHalf(NamedTuple):
    """statistics of x; h the first 1x1's result, before GELU, or None."""

    out: Tensor
    partials: Partials | None
    statistics: Statistics
    h: Tensor | None


class FcdmBlock(NamedTuple):
    """y1 the depthwise result, and its statistics; h before GELU, or None; norm GRN's, (N, C)."""

    out: Tensor
    y1: Tensor
    statistics: Statistics
    h: Tensor | None
    norm: Tensor


def conv_half_forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    pw1_weight: Tensor,
    pw1_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    ca_weight: Tensor,
    ca_bias: Tensor | None,
    pw2_weight: Tensor,
    pw2_bias: Tensor | None,
    eps: float = 1e-6,
    partials: Partials | None = None,
    more: bool = False,
) -> ConvHalf:
    """x + gate * pw2(CCA(GELU(dw(pw1(adaLN(x)))))); more: return partials."""
    first = pointwise(
        x,
        pw1_weight,
        modulation=modulation_terms(pw1_weight, pw1_bias, shift, scale),
        statistics=row_statistics(x, eps) if partials is None else partials,
        eps=eps,
    )
    y2 = depthwise(first.y, dw_weight, dw_bias, gelu=True)
    (sums,) = add_up([channel_sums(y2)], accumulation_dtype(x.dtype))
    pooled, attention = channel_attention(sums, x.shape[2] * x.shape[3], ca_weight, ca_bias)
    second = pointwise(y2, pw2_weight, pw2_bias, scale=attention, gate=gate, residual=x, partials=more)
    assert first.statistics is not None
    return ConvHalf(second.y, second.partials, first.statistics, first.y, pooled, attention)


def ffn_half_forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float = 1e-6,
    partials: Partials | None = None,
    keep: bool = True,
    more: bool = False,
) -> FfnHalf:
    """x + gate * fc2(GELU(fc1(adaLN(x)))); keep: return h for backward; more: return partials."""
    first = pointwise(
        x,
        fc1_weight,
        modulation=modulation_terms(fc1_weight, fc1_bias, shift, scale),
        statistics=row_statistics(x, eps) if partials is None else partials,
        eps=eps,
        gelu=True,
        keep=keep,
    )
    second = pointwise(first.y, fc2_weight, fc2_bias, gate=gate, residual=x, partials=more)
    assert first.statistics is not None
    return FfnHalf(second.y, second.partials, first.statistics, first.before_gelu)


def fcdm_block_forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw1_weight: Tensor,
    pw1_bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    pw2_weight: Tensor,
    pw2_bias: Tensor | None,
    ln_eps: float = 1e-6,
    grn_eps: float = 1e-6,
    keep: bool = True,
) -> FcdmBlock:
    """x + gate * pw2(GRN(GELU(pw1(adaLN(dw(x)))))); keep: return h for backward.

    GRN is a * s + beta with s = 1 + gamma * response: s is a scale in front of pw2, and beta moves into its bias.
    """
    y1 = depthwise(x, dw_weight, dw_bias, gelu=False)
    statistics = row_statistics(y1, ln_eps)
    first = pointwise(
        y1,
        pw1_weight,
        modulation=modulation_terms(pw1_weight, pw1_bias, shift, scale),
        statistics=statistics,
        gelu=True,
        keep=keep,
        channel="squares",
    )
    assert first.sums is not None
    norm, s = grn_scale(first.sums, gamma, grn_eps)
    bias = project(beta.reshape(1, -1), pw2_weight)[0]
    second = pointwise(
        first.y,
        pw2_weight,
        bias if pw2_bias is None else bias + pw2_bias,
        scale=s,
        gate=gate,
        residual=x,
    )
    return FcdmBlock(second.y, y1, statistics, first.before_gelu, norm)
