"""One residual block, ready to be called: as published in either memory layout, compiled, and fused."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

import dico_kernels as dk
from dico_kernels.reference.dico import DiCoBlock
from dico_kernels.reference.fcdm import FCDMBlock
from dico_kernels.reference.macs import count_macs_by_op
from dico_kernels.reference.weights import fill_

from .contenders import DTYPES, compiled, frozen, precision, timed
from .harness import Contender, relative_error
from .limits import block_bytes
from .presets import OpArena


@functools.lru_cache(maxsize=2)
def _block(op: str, channels: int) -> nn.Module:
    """A block with hard weights, float32, on the CPU."""
    block = DiCoBlock(channels, 2) if op == "dico_block" else FCDMBlock(channels)
    fill_(block)
    return block.eval()


def block_contender(arena: OpArena, op: str, how: str, device: torch.device) -> Contender:
    """A block at a shape: forward, or forward and backward of its input, conditioning and parameters."""
    source, dtype = _block(op, arena.channels), DTYPES[arena.dtype]
    layout = torch.contiguous_format if how == "eager" else torch.channels_last
    block: Any = copy.deepcopy(source).to(device, dtype).to(memory_format=layout)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    shape = (arena.batch, arena.channels, arena.side, arena.side)
    exact = torch.randn(shape, generator=generator), torch.randn(shape[:2], generator=generator)
    x = exact[0].to(device, dtype, memory_format=layout).requires_grad_(arena.backward)
    c = exact[1].to(device, dtype).requires_grad_(arena.backward)
    dy = torch.randn(shape, generator=generator).to(device, dtype, memory_format=layout)
    if how in ("fused", "packed"):
        dk.fuse(block)
    if how == "packed":
        dk.pack(block)
    block.requires_grad_(arena.backward)
    parameters = list(block.parameters())
    forward = compiled(block, device) if how == "compile" else block

    def run(i: int) -> Tensor:
        del i
        with precision(arena.dtype), frozen(how == "compile" and not arena.backward):
            if not arena.backward:
                with torch.no_grad():
                    out: Tensor = forward(x, c)
                return out
            out = forward(x, c)
            torch.autograd.grad(out, [x, c, *parameters], dy)
            return out.detach()

    first = timed(lambda: run(0), device)
    with torch.no_grad():
        truth = copy.deepcopy(source).double()(exact[0][:1].double(), exact[1][:1].double())
    error = relative_error(run(0)[:1].cpu(), truth)
    macs = sum(count_macs_by_op(source, *exact).values()) * (3 if arena.backward else 1)
    moved = block_bytes(op, arena.batch, arena.channels, arena.side, arena.backward, dtype.itemsize)
    return Contender(run, compile_s=first if how == "compile" else None, error=error, macs=macs, moved=moved)
