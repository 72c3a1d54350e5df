"""Compact channel attention on its op."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from dico_kernels import ops
from dico_kernels.nn._fused import hooked


class CompactChannelAttention(nn.Sequential):
    """Compact channel attention (DiCo): x * sigmoid(W mean_HW(x) + b).

    Keys are those of the published ``ca``: ``1.weight`` (C, C, 1, 1) and ``1.bias`` (C,). That one returns the gate
    alone and leaves the product to the block; this one returns the product, so it replaces ``h * ca(h)``.

    Args:
        channels: C.

    Shape: (N, C, H, W) -> same, channels_last.

    Where a layer was replaced or has a hook, the layers run as they are.

    Raises:
        ValueError: an x the op does not accept.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Gate x."""
        if [*map(type, self)] != [nn.AdaptiveAvgPool2d, nn.Conv2d, nn.Sigmoid] or any(map(hooked, self)):
            return x * cast(Tensor, super().forward(x))  # type: ignore[no-untyped-call]
        conv = cast(nn.Conv2d, self[1])
        return ops.cca_gate(x, conv.weight, conv.bias)


__all__ = ["CompactChannelAttention"]
