"""Multiply-accumulates of a model: what the papers call FLOPs."""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch.utils.flop_counter import FlopCounterMode

from .base import Denoiser


def count_macs(model: Denoiser, height: int, width: int, batch: int = 1) -> int:
    """MACs of the convolutions, linears and attention of one forward pass.

    Counted by torch's own counter on the meta device: no memory is touched, and the model is left as it is.

    Args:
        model: a reference model.
        height: H of the latent (32 for 256-pixel images).
        width: W of the latent.
        batch: samples; t and y have one entry each.
    """
    return sum(count_macs_by_op(model, height, width, batch).values())


def count_macs_by_op(model: Denoiser, height: int, width: int, batch: int = 1) -> dict[str, int]:
    """As count_macs, split by torch operator: {"convolution": ..., "addmm": ...}."""
    shadow = copy.deepcopy(model).to("meta").eval()
    x = torch.empty(batch, model.in_channels, height, width, device="meta")
    t = torch.zeros(batch, device="meta")
    y = torch.zeros(batch, dtype=torch.long, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        shadow(x, t, y)
    macs: dict[str, int] = defaultdict(int)
    for op, flops in counter.get_flop_counts()["Global"].items():
        macs[str(op).removeprefix("aten.")] += flops // 2
    return dict(macs)
