"""Single ops, ready to be called: the definition in either memory layout, and the fused op on a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dico_kernels as dk
from dico_kernels.reference import functional as reference

from .contenders import DTYPES, precision
from .harness import Contender, relative_error
from .presets import OpArena

Shapes = dict[str, Callable[[int, int, int], list[tuple[int, ...]]]]

# Arguments by (batch, channels, side); weights have their fan-in behind the first dimension.
_SHAPES: Shapes = {
    "adaln_modulate": lambda n, c, s: [(n, c, s, s), (n, c), (n, c)],
    "gated_residual": lambda n, c, s: [(n, c, s, s), (n, c, s, s), (n, c)],
    "gated_residual_adaln": lambda n, c, s: [(n, c, s, s), (n, c, s, s), (n, c), (n, c), (n, c)],
    "pointwise_depthwise_gelu": lambda n, c, s: [(n, c, s, s), (c, c, 1, 1), (c,), (c, 1, 3, 3), (c,)],
    "cca_gate": lambda n, c, s: [(n, c, s, s), (c, c, 1, 1), (c,)],
    "depthwise_adaln": lambda n, c, s: [(n, c, s, s), (c, 1, 7, 7), (c,), (n, c), (n, c)],
    "grn": lambda n, c, s: [(n, c, s, s), (1, c, 1, 1), (1, c, 1, 1)],
    "pixel_shuffle_skip": lambda n, c, s: [(n, 2 * c, s // 2, s // 2), (n, c // 2, s, s), (c, c, 1, 1), (c,)],
}
_IMAGES = {"gated_residual": 2, "gated_residual_adaln": 2, "pixel_shuffle_skip": 2}


def _arguments(arena: OpArena) -> list[Tensor]:
    """float64 arguments: standard normal images, weights of unit gain."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index, shape in enumerate(_SHAPES[arena.op](arena.batch, arena.channels, arena.side)):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if index >= _IMAGES.get(arena.op, 1):
            fan_in = max(1, values[0].numel()) if len(shape) == 4 and arena.op != "grn" else 4
            values = values / fan_in**0.5
        found.append(values)
    return found


def _outputs(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def op_contender(arena: OpArena, op: str, how: str, device: torch.device) -> Contender:
    """An op at a shape, ready to run forward, or forward and backward of every argument."""
    dtype = DTYPES[arena.dtype]
    exact = _arguments(arena)
    arguments = [a.to(device, dtype) for a in exact]
    if how != "eager":
        arguments = [a.contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a for a in arguments]
    arguments = [a.requires_grad_(arena.backward) for a in arguments]
    fused = how not in ("eager", "channels_last")
    fn: Callable[..., Any] = getattr(dk.ops if fused else reference, op)
    with torch.no_grad():
        truth = _outputs(getattr(reference, op)(*(a.detach().double().cpu() for a in arguments)))
        like = _outputs(fn(*arguments))
    cotangents = [torch.randn_like(o) for o in like] if arena.backward else []

    def call() -> tuple[Tensor, ...]:
        return _outputs(fn(*arguments))

    def run(i: int) -> None:
        del i
        with precision(arena.dtype), dk.backend(how if fused else "auto", strict=fused):
            if not arena.backward:
                with torch.no_grad():
                    call()
            else:
                torch.autograd.grad(call(), arguments, cotangents)

    error = max(relative_error(o.cpu(), t) for o, t in zip(like, truth, strict=True))
    return Contender(run, error=error)
