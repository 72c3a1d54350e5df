"""Multiply-accumulates: what the papers call FLOPs."""

from __future__ import annotations

import copy
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .base import Denoiser


def count_macs(model: Denoiser, height: int, width: int, batch: int = 1) -> int:
    """MACs of the convolutions, linears and attention of one forward pass.

    Args:
        model: a reference model; it is left as it is.
        height: H of the latent (32 for 256-pixel images).
        width: W of the latent.
        batch: samples; t and y have one entry each.
    """
    x = torch.empty(batch, model.in_channels, height, width, device="meta")
    t = torch.zeros(batch, device="meta")
    y = torch.zeros(batch, dtype=torch.long, device="meta")
    return sum(count_macs_by_op(model, x, t, y).values())


def count_macs_by_op(module: nn.Module, *args: Tensor) -> dict[str, int]:
    """MACs of module(*args) by torch operator: {"convolution": ..., "addmm": ..., "bmm": ...}.

    Counted by torch's own counter on the meta device, where attention is plain products and no memory is touched.
    """
    # A copy whose parameters were on the meta device from the start: a large model's would take seconds to copy.
    memo = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    shadow = copy.deepcopy(module, memo).to("meta").eval()
    for m in shadow.modules():
        # The counter does not see into a fused op; the class that a fused module came from does the same work.
        m.__class__ = getattr(type(m), "fused_original", None) or type(m)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        shadow(*(a.to("meta") for a in args))
    macs: dict[str, int] = defaultdict(int)
    for op, flops in counter.get_flop_counts()["Global"].items():
        macs[str(op).removeprefix("aten.")] += flops // 2
    return dict(macs)
