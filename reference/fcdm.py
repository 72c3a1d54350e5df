"""FCDM (CVPR 2026): a U-shaped diffusion model of ConvNeXt V2 blocks under adaLN.

Architecture and parameter names are the published ones, so checkpoints load; the code is our own, and without the
activation checkpointing that the published forward always applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from .base import UShaped, check_depth, downsample, inner_width, upsample, whole_number
from .embed import LabelEmbedder, TimestepEmbedder, initialise, initialise_flattened, silu_linear, zero

VARIANTS: dict[str, dict[str, Any]] = {
    "FCDM-S": {"hidden_size": 128, "depth": (2, 4, 8, 4, 2)},
    "FCDM-B": {"hidden_size": 256, "depth": (2, 4, 8, 4, 2)},
    "FCDM-L": {"hidden_size": 512, "depth": (2, 4, 8, 4, 2)},
    "FCDM-XL": {"hidden_size": 512, "depth": (3, 6, 12, 6, 3)},
}


class GlobalResponseNorm(nn.Module):
    """GRN with gamma and beta of shape (1, C, 1, 1), zero at initialisation: the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> same."""
        return F.grn(x, self.gamma, self.beta)


class FCDMBlock(nn.Module):
    """x + gate * pwconv2(GRN(GELU(pwconv1(adaLN(dwconv(x)))))).

    Args:
        hidden_size: channels C.
        mlp_ratio: width between the pointwise convolutions over C.

    Shape: x (N, C, H, W), c (N, C) or (1, C) -> (N, C, H, W).
    """

    def __init__(self, hidden_size: int, mlp_ratio: float = 3) -> None:
        super().__init__()
        c, inner = hidden_size, inner_width(hidden_size, mlp_ratio)
        self.dwconv = nn.Conv2d(c, c, 7, padding=3, groups=c)
        self.pwconv1 = nn.Conv2d(c, inner, 1)
        self.grn = GlobalResponseNorm(inner)
        self.pwconv2 = nn.Conv2d(inner, c, 1)
        self.adaLN_modulation = silu_linear(c, 3)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Apply the block."""
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=1)
        h = F.adaln_modulate(self.dwconv(x), shift, scale)
        h = self.pwconv2(self.grn(F.gelu(self.pwconv1(h))))
        return F.gated_residual(x, h, gate)


class FinalLayer(nn.Module):
    """adaLN, then a 3x3 convolution to the output channels."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.adaLN_modulation = silu_linear(hidden_size, 2)
        self.conv = nn.Conv2d(hidden_size, out_channels, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """X (N, C, H, W), c (N, C) -> (N, out_channels, H, W)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.conv(F.adaln_modulate(x, shift, scale))


class FCDM(UShaped):
    """FCDM.

    Args:
        in_channels: channels of the latent.
        hidden_size: D; the levels are D, 2D, 4D, 2D, D wide.
        depth: blocks in (enc1, enc2, mid, dec2, dec1).
        mlp_ratio: width between each block's pointwise convolutions over its channels.
        class_dropout_prob: probability of training with the null label; each level draws its own mask.
        num_classes: number of labels.
        learn_sigma: also predict the variance (doubles the output channels); False for the flow-matching variant.

    Shape: x (N, in_channels, H, W), H and W multiples of 4; t (N,) or (1,), float or integer; y (N,) or (1,), integer
    -> (N, out_channels, H, W).

    Raises:
        ValueError: an input of another shape, dtype or label range.
    """

    def __init__(
        self,
        in_channels: int = 4,
        hidden_size: int = 128,
        depth: Sequence[int] = (2, 4, 8, 4, 2),
        mlp_ratio: float = 3,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__(in_channels, num_classes, learn_sigma, class_dropout_prob)
        enc1, enc2, mid, dec2, dec1 = check_depth(depth)
        d = whole_number("hidden_size", hidden_size, multiple=2)

        def stage(width: int, blocks: int) -> nn.ModuleList:
            return nn.ModuleList(FCDMBlock(width, mlp_ratio) for _ in range(blocks))

        self.t_embedder_1 = TimestepEmbedder(d)
        self.y_embedder_1 = LabelEmbedder(num_classes, d, class_dropout_prob)
        self.t_embedder_2 = TimestepEmbedder(2 * d)
        self.y_embedder_2 = LabelEmbedder(num_classes, 2 * d, class_dropout_prob)
        self.t_embedder_3 = TimestepEmbedder(4 * d)
        self.y_embedder_3 = LabelEmbedder(num_classes, 4 * d, class_dropout_prob)
        self.x_embedder = nn.Conv2d(in_channels, d, 3, padding=1)
        self.encoder_level_1 = stage(d, enc1)
        self.down1_2 = downsample(d, "conv")
        self.encoder_level_2 = stage(2 * d, enc2)
        self.down2_3 = downsample(2 * d, "conv")
        self.latent = stage(4 * d, mid)
        self.up3_2 = upsample(4 * d, "conv")
        self.reduce_chans_2 = nn.Conv2d(4 * d, 2 * d, 1)
        self.decoder_level_2 = stage(2 * d, dec2)
        self.up2_1 = upsample(2 * d, "conv")
        self.reduce_chans_1 = nn.Conv2d(2 * d, d, 1)
        self.decoder_level_1 = stage(d, dec1)
        self.output_layer = nn.Conv2d(d, d, 3, padding=1)
        self.final_layer = FinalLayer(d, self.out_channels)
        self.initialise_weights()

    def initialise_weights(self) -> None:
        """As DiCo's; GRN starts as the identity; the output at init is exactly zero."""
        initialise(self)
        initialise_flattened(self.x_embedder)
        zero(self.final_layer.conv)
        for m in self.modules():
            if isinstance(m, (FCDMBlock, FinalLayer)):
                zero(m.adaLN_modulation)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (and variance), or the velocity, in x at timestep t under label y."""
        self.check_inputs(x, t, y)
        c1 = self.t_embedder_1(t) + self.y_embedder_1(y)
        c2 = self.t_embedder_2(t) + self.y_embedder_2(y)
        c3 = self.t_embedder_3(t) + self.y_embedder_3(y)

        x = self.convolve(self.x_embedder, x)
        for block in self.encoder_level_1:
            x = block(x, c1)
        skip1, x = x, self.down(self.down1_2, x)
        for block in self.encoder_level_2:
            x = block(x, c2)
        skip2, x = x, self.down(self.down2_3, x)
        for block in self.latent:
            x = block(x, c3)
        x = self.join(self.up3_2, self.reduce_chans_2, x, skip2)
        for block in self.decoder_level_2:
            x = block(x, c2)
        x = self.join(self.up2_1, self.reduce_chans_1, x, skip1)
        for block in self.decoder_level_1:
            x = block(x, c1)
        return self.final_layer(self.convolve(self.output_layer, x), c1)
