"""Conditioning: timestep and label embedders, as all three model families use them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

FREQUENCIES = 256
MAX_PERIOD = 10_000


def timestep_sinusoids(t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N,) timesteps -> (N, 256): cos, then sin, of t * exp(-ln(10000) i / 128), i = 0..127.

    Computed in float32 at least (float64 when ``dtype`` is), since t reaches 999, then cast to ``dtype``.
    """
    compute = torch.promote_types(dtype, torch.float32)
    half = FREQUENCIES // 2
    exponent = torch.arange(half, dtype=compute, device=t.device) / half
    angles = t[:, None].to(compute) * torch.exp(-math.log(MAX_PERIOD) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)


class TimestepEmbedder(nn.Module):
    """Sinusoids, Linear, SiLU, Linear: (N,) float or integer timesteps -> (N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed t, (N,), as (N, width)."""
        # Not by parameters(): in a replica (nn.DataParallel) weights are plain attributes, and it has none.
        first: Any = self.mlp[0]
        return self.mlp(timestep_sinusoids(t, first.weight.dtype))


def drop_labels(y: Tensor, null_label: int, probability: float) -> Tensor:
    """Labels with each replaced by ``null_label`` with the given probability (classifier-free guidance training)."""
    drop = torch.rand(y.shape[0], device=y.device) < probability
    return torch.where(drop, null_label, y)


class LabelEmbedder(nn.Module):
    """A table of label vectors; the last row, ``num_classes``, is the null label when labels are ever dropped.

    Shape: (N,) integer -> (N, width).
    """

    def __init__(self, num_classes: int, width: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), width)

    def forward(self, y: Tensor) -> Tensor:
        """Embed y, dropping labels in training mode."""
        if self.training and self.dropout_prob > 0:
            y = drop_labels(y, self.num_classes, self.dropout_prob)
        return self.embedding_table(y)


class SharedDropLabelEmbedder(nn.Module):
    """DiCo's label tables, one a level, under one dropout mask for all of them.

    Shape: (N,) integer -> one (N, width) for each of ``widths``.
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...], dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.dropout_prob, self.levels = num_classes, dropout_prob, len(widths)
        for level, width in enumerate(widths):
            self.add_module(f"embedding_table_{level}", nn.Embedding(num_classes + (dropout_prob > 0), width))

    def forward(self, y: Tensor) -> list[Tensor]:
        """Embed y once a level, dropping labels in training mode."""
        if self.training and self.dropout_prob > 0:
            y = drop_labels(y, self.num_classes, self.dropout_prob)
        return [self.get_submodule(f"embedding_table_{level}")(y) for level in range(self.levels)]


def sincos_position_embedding(width: int, rows: int, columns: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, (1, rows * columns, width), float32; the first half encodes the column.

    For each axis: sin, then cos, of position * 10000^(-i / (width / 4)), i = 0..width/4-1, computed in float64.
    """
    if width % 4:
        raise ValueError(f"width={width}: the position embedding needs a multiple of 4")
    quarter = width // 4
    omega = 1.0 / MAX_PERIOD ** (torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)

    def axis(n: int) -> Tensor:
        angles = torch.arange(n, dtype=torch.float64, device="cpu")[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    half = width // 2
    across = axis(columns)[None].expand(rows, columns, half)
    down = axis(rows)[:, None].expand(rows, columns, half)
    return torch.cat([across, down], dim=2).reshape(1, rows * columns, width).float()


def initialise(module: nn.Module) -> None:
    """Zero biases; Xavier-uniform for Linear and Conv2d; N(0, 0.02) for embeddings and timestep Linears.

    What each model zeroes (adaLN, output) it zeroes after this.
    """
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.Embedding):
            nn.init.normal_(m.weight, std=0.02)
    for m in module.modules():
        if isinstance(m, TimestepEmbedder):
            for name, p in m.named_parameters():
                if name.endswith("weight"):
                    nn.init.normal_(p, std=0.02)


def initialise_flattened(conv: nn.Conv2d) -> None:
    """Xavier-uniform with the kernel flattened, as for a Linear over patches (the input convolution)."""
    nn.init.xavier_uniform_(conv.weight.detach().flatten(1))


def zero(*layers: nn.Module) -> None:
    """Set every parameter of the layers to zero."""
    for layer in layers:
        for p in layer.parameters():
            nn.init.zeros_(p)


def silu_linear(width: int, chunks: int) -> nn.Sequential:
    """The conditioning head of adaLN: Linear(SiLU(c)), (N, width) -> (N, chunks * width)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))
