"""Every op in plain PyTorch: the definition that the fused ops are tested against.

Written to be read, in the order of the formulas of the papers: DiCo (arXiv 2505.11196) and FCDM (CVPR 2026). Tensors
are logical (N, C, H, W) in any memory format, any floating dtype from bfloat16 to float64; every function is
differentiable by autograd. Conditioning vectors (shift, scale, gate) are (N, C), or (1, C) and broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LN_EPS = 1e-6
GRN_EPS = 1e-6


def per_channel(v: Tensor) -> Tensor:
    """(N, C) as (N, C, 1, 1), to broadcast over an image."""
    return v[:, :, None, None]


def layer_norm(x: Tensor, eps: float = LN_EPS) -> Tensor:
    """LayerNorm over channels at each pixel, biased variance, no affine. (N, C, H, W) -> same."""
    return F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), eps=eps).permute(0, 3, 1, 2)


def gelu(x: Tensor) -> Tensor:
    """GELU in its exact form, x * Phi(x) with the error function."""
    return F.gelu(x)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift, per sample and channel (DiT's convention: scale 0 is the identity)."""
    return x * (1 + per_channel(scale)) + per_channel(shift)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = LN_EPS) -> Tensor:
    """adaLN: LayerNorm over channels without affine, then modulate."""
    return modulate(layer_norm(x, eps), shift, scale)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch."""
    return x + per_channel(gate) * branch


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = LN_EPS
) -> tuple[Tensor, Tensor]:
    """The seam between two residual branches: (y, adaLN(y)) with y = x + gate * branch."""
    y = gated_residual(x, branch, gate)
    return y, adaln_modulate(y, shift, scale, eps)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution; weight (K, C, 1, 1), bias (K,) or None."""
    return F.conv2d(x, weight, bias)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise k x k convolution, k odd, zero padding k // 2; weight (C, 1, k, k), bias (C,) or None."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def pointwise_depthwise_gelu(
    x: Tensor, pw_weight: Tensor, pw_bias: Tensor | None, dw_weight: Tensor, dw_bias: Tensor | None
) -> Tensor:
    """DiCo's convolution: GELU(depthwise(pointwise(x))). The zero padding is around the 1x1's output."""
    return gelu(depthwise(pointwise(x, pw_weight, pw_bias), dw_weight, dw_bias))


def cca_gate(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compact channel attention (DiCo): x * sigmoid(W mean_HW(x) + b); weight (C, C, 1, 1), bias (C,)."""
    return x * torch.sigmoid(pointwise(x.mean((2, 3), keepdim=True), weight, bias))


def grn(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = GRN_EPS) -> Tensor:
    """Global response normalisation (ConvNeXt V2, FCDM): gamma * (x * Nx) + beta + x.

    Nx = G / (mean over channels of G + eps), with G the L2 norm over (H, W) of each sample and channel. gamma and beta
    have C elements in any of the published shapes: (1, C, 1, 1), (1, 1, 1, C) or (C,).
    """
    norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    response = norm / (norm.mean(dim=1, keepdim=True) + eps)
    return gamma.reshape(1, -1, 1, 1) * (x * response) + beta.reshape(1, -1, 1, 1) + x


def depthwise_adaln(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor, scale: Tensor, eps: float = LN_EPS
) -> Tensor:
    """FCDM's entry: depthwise convolution (7x7), then adaLN."""
    return adaln_modulate(depthwise(x, weight, bias), shift, scale, eps)


def pixel_shuffle_skip(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Decoder entry: 1x1 convolution of cat[PixelShuffle(2)(up), skip].

    Args:
        up: (N, 4C, H, W), the up convolution's output before shuffling.
        skip: (N, S, 2H, 2W).
        weight: (K, C + S, 1, 1); its first C input channels meet the shuffled tensor.
        bias: (K,) or None.
    """
    return pointwise(torch.cat([F.pixel_shuffle(up, 2), skip], 1), weight, bias)


def dynamic_depthwise(x: Tensor, kernels: Tensor) -> Tensor:
    """Depthwise convolution with a kernel per sample and channel; kernels (N, C, k, k), k odd, zero padding k // 2."""
    n, c, h, w = x.shape
    k = kernels.shape[-1]
    out = F.conv2d(x.reshape(1, n * c, h, w), kernels.reshape(n * c, 1, k, k), padding=k // 2, groups=n * c)
    return out.reshape(n, c, h, w)


def conv_half(
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
    eps: float = LN_EPS,
) -> Tensor:
    """First residual branch of a DiCo block: x + gate * pw2(CCA(GELU(dw(pw1(adaLN(x))))))."""
    h = adaln_modulate(x, shift, scale, eps)
    h = pointwise_depthwise_gelu(h, pw1_weight, pw1_bias, dw_weight, dw_bias)
    h = cca_gate(h, ca_weight, ca_bias)
    return gated_residual(x, pointwise(h, pw2_weight, pw2_bias), gate)


def ffn_half(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float = LN_EPS,
) -> Tensor:
    """Second residual branch of a DiCo block: x + gate * fc2(GELU(fc1(adaLN(x)))), both 1x1 convolutions."""
    h = gelu(pointwise(adaln_modulate(x, shift, scale, eps), fc1_weight, fc1_bias))
    return gated_residual(x, pointwise(h, fc2_weight, fc2_bias), gate)


def fcdm_block(
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
    ln_eps: float = LN_EPS,
    grn_eps: float = GRN_EPS,
) -> Tensor:
    """FCDM's block: x + gate * pw2(GRN(GELU(pw1(adaLN(dw(x))))))."""
    h = depthwise_adaln(x, dw_weight, dw_bias, shift, scale, ln_eps)
    h = grn(gelu(pointwise(h, pw1_weight, pw1_bias)), gamma, beta, grn_eps)
    return gated_residual(x, pointwise(h, pw2_weight, pw2_bias), gate)
