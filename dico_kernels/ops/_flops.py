"""What torch.utils.flop_counter counts for the fused ops: the products that they stand for, two FLOPs each."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

# Weights that meet one vector an image, and not every pixel.
_OF_THE_MEAN = {("cca_gate", "weight"), ("conv_half", "ca_weight")}
_OPS = (
    *("cca_gate", "conv_half", "convolution", "depthwise_adaln", "fcdm_block", "ffn_half", "pixel_shuffle_skip"),
    "pointwise_depthwise_gelu",
)


def _formula(name: str, packet: Any, factor: int) -> Callable[..., int]:
    arguments = [a.name for a in packet.default._schema.arguments]

    def flops(*shapes: Any, out_shape: Any = None, **others: Any) -> int:
        given = {**dict(zip(arguments, shapes, strict=False)), **others}
        n, _, h, w = given["skip"] if "skip" in given else given["x"]
        weights = ((key, shape) for key, shape in given.items() if key.endswith("weight"))
        return 2 * factor * n * sum(prod(s) * (1 if (name, key) in _OF_THE_MEAN else h * w) for key, s in weights)

    return flops


def register_formulas() -> None:
    """Have FlopCounterMode count the ops as it counts the layers they replace, and their backward as twice that."""
    for name in _OPS:
        for suffix, factor in (("", 1), ("_backward", 2)):
            packet = getattr(torch.ops.dico_kernels, name + suffix)
            register_flop_formula(packet)(_formula(name, packet, factor))
