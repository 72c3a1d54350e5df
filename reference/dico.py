"""DiCo (arXiv 2505.11196, NeurIPS 2025): a U-shaped convolutional diffusion model with compact channel attention.

Architecture and parameter names are the published ones, so published checkpoints load; the code is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from . import functional as F
from .base import UShaped, check_depth, downsample, inner_width, upsample, whole_number
from .embed import (
    SharedDropLabelEmbedder,
    TimestepEmbedder,
    initialise,
    initialise_flattened,
    silu_linear,
    zero,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "DiCo-S": {"hidden_size": 128, "depth": (5, 4, 4, 4, 4), "mlp_ratio": 2},
    "DiCo-B": {"hidden_size": 256, "depth": (5, 4, 4, 4, 4), "mlp_ratio": 2},
    "DiCo-L": {"hidden_size": 352, "depth": (9, 8, 9, 8, 9), "mlp_ratio": 2},
    "DiCo-XL": {"hidden_size": 416, "depth": (9, 9, 10, 9, 9), "mlp_ratio": 2},
    "DiCo-H": {"hidden_size": 416, "depth": (14, 12, 10, 12, 14), "mlp_ratio": 4},
}


class DiCoBlock(nn.Module):
    """Convolution branch, then feed-forward branch, each under adaLN with a gate.

    h = CCA(GELU(dw3x3(conv1(adaLN(x))))), x = x + gate1 * conv3(h);
    x = x + gate2 * conv5(GELU(conv4(adaLN(x)))).

    Args:
        hidden_size: channels C.
        mlp_ratio: width of the feed-forward over C.

    Shape: x (N, C, H, W), c (N, C) or (1, C) -> (N, C, H, W).
    """

    def __init__(self, hidden_size: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        c, ffn = hidden_size, inner_width(hidden_size, mlp_ratio)
        self.conv1 = nn.Conv2d(c, c, 1)
        self.conv2 = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.conv3 = nn.Conv2d(c, c, 1)
        self.ca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.Sigmoid())
        self.conv4 = nn.Conv2d(c, ffn, 1)
        self.conv5 = nn.Conv2d(ffn, c, 1)
        self.adaLN_modulation = silu_linear(c, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Apply the block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        h = F.gelu(self.conv2(self.conv1(F.adaln_modulate(x, shift1, scale1))))
        x = F.gated_residual(x, self.conv3(h * self.ca(h)), gate1)
        h = F.gelu(self.conv4(F.adaln_modulate(x, shift2, scale2)))
        return F.gated_residual(x, self.conv5(h), gate2)


class PatchEmbed(nn.Module):
    """3x3 convolution to the model's width, at full resolution (there are no patches; the name is the published)."""

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, hidden_size, H, W)."""
        return self.proj(x)


class FinalLayer(nn.Module):
    """adaLN, then a 3x3 convolution to the output channels."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.out_proj = nn.Conv2d(hidden_size, out_channels, 3, padding=1)
        self.adaLN_modulation = silu_linear(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """X (N, C, H, W), c (N, C) -> (N, out_channels, H, W)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.out_proj(F.adaln_modulate(x, shift, scale))


class DiCo(UShaped):
    """DiCo.

    Args:
        in_channels: channels of the latent.
        hidden_size: D; the levels are D, 2D, 4D, 2D, 2D wide.
        depth: blocks in (enc1, enc2, mid, dec2, dec1).
        mlp_ratio: width of each block's feed-forward over its channels.
        class_dropout_prob: probability of training with the null label.
        num_classes: number of labels.
        learn_sigma: also predict the variance (doubles the output channels).

    Shape: x (N, in_channels, H, W), H and W multiples of 4; t (N,) or (1,), float or integer; y (N,) or (1,), integer
    -> (N, out_channels, H, W).

    Raises:
        ValueError: an input of another shape, dtype or label range.
    """

    def __init__(
        self,
        in_channels: int = 4,
        hidden_size: int = 128,
        depth: Sequence[int] = (5, 4, 4, 4, 4),
        mlp_ratio: float = 2,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__(in_channels, num_classes, learn_sigma, class_dropout_prob)
        enc1, enc2, mid, dec2, dec1 = check_depth(depth)
        # D/2 channels are unshuffled into 2D, 2D/2 into 4D.
        d = whole_number("hidden_size", hidden_size, multiple=2)

        def stage(width: int, blocks: int) -> nn.ModuleList:
            return nn.ModuleList(DiCoBlock(width, mlp_ratio) for _ in range(blocks))

        self.x_embedder = PatchEmbed(in_channels, d)
        self.t_embedder_1 = TimestepEmbedder(d)
        self.y_embedder = SharedDropLabelEmbedder(num_classes, (d, 2 * d, 4 * d), class_dropout_prob)
        self.t_embedder_2 = TimestepEmbedder(2 * d)
        self.t_embedder_3 = TimestepEmbedder(4 * d)
        self.encoder_level_1 = stage(d, enc1)
        self.down1_2 = downsample(d, "body")
        self.encoder_level_2 = stage(2 * d, enc2)
        self.down2_3 = downsample(2 * d, "body")
        self.latent = stage(4 * d, mid)
        self.up3_2 = upsample(4 * d, "body")
        self.reduce_chan_level2 = nn.Conv2d(4 * d, 2 * d, 1)
        self.decoder_level_2 = stage(2 * d, dec2)
        self.up2_1 = upsample(2 * d, "body")
        self.reduce_chan_level1 = nn.Conv2d(2 * d, 2 * d, 1)
        self.decoder_level_1 = stage(2 * d, dec1)
        self.final_layer = FinalLayer(2 * d, self.out_channels)
        self.initialise_weights()

    def initialise_weights(self) -> None:
        """The published initialisation; the output at init is exactly zero."""
        initialise(self)
        initialise_flattened(self.x_embedder.proj)
        zero(self.final_layer.out_proj)
        for m in self.modules():
            if isinstance(m, (DiCoBlock, FinalLayer)):
                zero(m.adaLN_modulation)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (and variance) in x at timestep t under label y."""
        self.check_inputs(x, t, y)
        y1, y2, y3 = self.y_embedder(y)
        c1 = self.t_embedder_1(t) + y1
        c2 = self.t_embedder_2(t) + y2
        c3 = self.t_embedder_3(t) + y3

        x = self.x_embedder(x)
        for block in self.encoder_level_1:
            x = block(x, c1)
        skip1, x = x, self.down(self.down1_2, x)
        for block in self.encoder_level_2:
            x = block(x, c2)
        skip2, x = x, self.down(self.down2_3, x)
        for block in self.latent:
            x = block(x, c3)
        x = self.join(self.up3_2, self.reduce_chan_level2, x, skip2)
        for block in self.decoder_level_2:
            x = block(x, c2)
        x = self.join(self.up2_1, self.reduce_chan_level1, x, skip1)
        for block in self.decoder_level_1:
            x = block(x, c2)
        return self.final_layer(x, c2)
