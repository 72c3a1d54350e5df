"""Deterministic weights that make errors visible.

At initialisation these models output exactly zero, and with small weights whole modules can be deleted unnoticed
(channel attention moves DiCo-S by 2.5e-5 when all weights are N(0, 0.02)). Numerics are therefore compared with *hard*
weights, where every path carries signal, and with *small* ones, where normalisation amplifies.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

Regime = Literal["hard", "small"]
SMALL_STD = 0.02


def named_normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float64 values that depend on the name and shape alone, on any machine."""
    return np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode()))).standard_normal(shape)


def _factor(name: str, shape: tuple[int, ...], regime: Regime) -> float:
    if regime == "small":
        return SMALL_STD
    if "embedding_table" in name:
        return 1.0
    if ".grn." in name:
        return 0.5
    if len(shape) >= 2:
        return 1 / math.sqrt(math.prod(shape[1:]))
    return 0.5 if "adaLN_modulation" in name else 0.1


@torch.no_grad()
def fill_(
    model: nn.Module,
    regime: Regime = "hard",
    normal: Callable[[str, tuple[int, ...]], np.ndarray | Tensor] = named_normal,
) -> nn.Module:
    """Overwrite every trainable parameter by name; returns the model.

    Args:
        model: any module; frozen parameters (DiT's position table) keep their values.
        regime: "hard" (unit-gain layers, the weights of tests/golden) or "small" (all N(0, 0.02)).
        normal: (name, shape) -> standard normal values: others than those of tests/golden, where their speed matters.
    """
    if regime not in ("hard", "small"):
        raise ValueError(f"regime={regime!r}: expected 'hard' or 'small'")
    for name, p in model.named_parameters():
        if p.requires_grad:
            shape = tuple(p.shape)
            values = torch.as_tensor(normal(name, shape)) * _factor(name, shape, regime)
            # Through float32, the precision of the golden weights, also for a float64 model.
            p.copy_(values.float())
    return model


def named_input(shape: tuple[int, ...], name: str = "input.x") -> Tensor:
    """A float32 standard normal tensor that depends on the name and shape alone."""
    return torch.from_numpy(named_normal(name, shape).astype(np.float32))
