"""DiT (Peebles and Xie, ICCV 2023), patch size 2: the attention model that DiCo and FCDM are compared with.

Architecture and parameter names are the published ones; attention runs through scaled_dot_product_attention, so the
comparison is against the best attention kernel torch has. The code is our own.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Denoiser, inner_width, whole_number
from .embed import (
    LabelEmbedder,
    TimestepEmbedder,
    initialise,
    initialise_flattened,
    silu_linear,
    sincos_position_embedding,
    zero,
)
from .functional import LN_EPS

VARIANTS: dict[str, dict[str, Any]] = {
    "DiT-S/2": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "DiT-B/2": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "DiT-L/2": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "DiT-XL/2": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


def adaln_tokens(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN on tokens (N, T, D): LayerNorm without affine, * (1 + scale) + shift."""
    return F.layer_norm(x, (x.shape[-1],), eps=LN_EPS) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention, (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % whole_number("num_heads", num_heads):
            raise ValueError(f"num_heads={num_heads}: expected a divisor of the width, {width}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over all tokens."""
        q, k, v = rearrange(self.qkv(x), "n t (s h d) -> s n h t d", s=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "n h t d -> n t (h d)"))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """Attention, then MLP, each under adaLN with a gate. x (N, T, D), c (N, D) -> (N, T, D)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads)
        self.mlp = Mlp(width, inner_width(width, mlp_ratio))
        self.adaLN_modulation = silu_linear(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Apply the block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(adaln_tokens(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(adaln_tokens(x, shift2, scale2))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, row by row: (N, C, H, W) -> (N, HW / p^2, D)."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches."""
        return rearrange(self.proj(x), "n d h w -> n (h w) d")


class FinalLayer(nn.Module):
    """adaLN, then Linear to the pixels of each patch."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaLN_modulation = silu_linear(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """X (N, T, D), c (N, D) -> (N, T, p * p * out_channels)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(adaln_tokens(x, shift, scale))


class DiT(Denoiser):
    """DiT.

    Args:
        input_size: H = W of the latent; 32 for 256-pixel images, 64 for 512. The fixed position table has its size.
        in_channels, class_dropout_prob, num_classes, learn_sigma: as DiCo's.
        hidden_size: D, a multiple of num_heads and of 4.
        depth: number of blocks.
        num_heads: attention heads.
        patch_size: pixels along a token's side.
        mlp_ratio: width of each MLP over D.

    Shape: x (N, in_channels, input_size, input_size); t, y (N,) or (1,) -> (N, out_channels, input_size, input_size).

    Raises:
        ValueError: an input of another shape, dtype or label range.
    """

    def __init__(
        self,
        input_size: int = 32,
        in_channels: int = 4,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 2,
        mlp_ratio: float = 4,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__(in_channels, num_classes, learn_sigma, class_dropout_prob)
        whole_number("hidden_size", hidden_size, multiple=4)
        whole_number("depth", depth, least=0)
        whole_number("input_size", input_size, multiple=whole_number("patch_size", patch_size))
        self.input_size, self.patch_size = input_size, patch_size
        self.spatial_multiple = patch_size
        side = input_size // patch_size
        self.pos_embed = nn.Parameter(
            torch.empty(1, side * side, hidden_size), requires_grad=False
        )  # fixed, yet a parameter: published checkpoints hold it
        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialise_weights()

    def initialise_weights(self) -> None:
        """The published initialisation; the output at init is exactly zero."""
        initialise(self)
        initialise_flattened(self.x_embedder.proj)
        zero(self.final_layer.linear)
        for m in self.modules():
            if isinstance(m, (DiTBlock, FinalLayer)):
                zero(m.adaLN_modulation)
        side = self.input_size // self.patch_size
        with torch.no_grad():
            self.pos_embed.copy_(sincos_position_embedding(self.pos_embed.shape[-1], side, side))

    def check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """As the base's, and the resolution the position table was made for."""
        super().check_inputs(x, t, y)
        size = self.input_size
        if x.shape[2] != size or x.shape[3] != size:
            raise ValueError(
                f"x is {x.shape[2]}x{x.shape[3]}: this DiT was made with input_size={size}; "
                f"expected {size}x{size}, or make one with another input_size"
            )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise (and variance) in x at timestep t under label y."""
        self.check_inputs(x, t, y)
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        p = self.patch_size
        return rearrange(
            self.final_layer(x, c),
            "n (h w) (p q c) -> n c (h p) (w q)",
            h=self.input_size // p,
            p=p,
            q=p,
        )
