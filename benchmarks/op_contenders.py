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
from .limits import op_work
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
    "conv_half": lambda n, c, s: [
        *[(n, c, s, s), *[(n, c)] * 3, (c, c, 1, 1), (c,), (c, 1, 3, 3), (c,), (c, c, 1, 1), (c,), (c, c, 1, 1), (c,)]
    ],
    "ffn_half": lambda n, c, s: [*[(n, c, s, s), *[(n, c)] * 3, (2 * c, c, 1, 1), (2 * c,), (c, 2 * c, 1, 1), (c,)]],
    "fcdm_block": lambda n, c, s: [
        *[(n, c, s, s), *[(n, c)] * 3, (c, 1, 7, 7), (c,), (3 * c, c, 1, 1), (3 * c,)],
        *[(1, 3 * c, 1, 1), (1, 3 * c, 1, 1), (c, 3 * c, 1, 1), (c,)],
    ],
}
_CHECKED_IMAGES = 2
_IMAGES = {"gated_residual": 2, "gated_residual_adaln": 2, "pixel_shuffle_skip": 2}


def _arguments(arena: OpArena, device: torch.device) -> list[Tensor]:
    """float64 arguments: standard normal images, weights of unit gain."""
    generator = torch.Generator(device).manual_seed(0)
    found = []
    for index, shape in enumerate(_SHAPES[arena.op](arena.batch, arena.channels, arena.side)):
        values = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        if index >= _IMAGES.get(arena.op, 1):
            fan_in = max(1, values[0].numel()) if len(shape) == 4 and shape[0] > 1 else 4
            values = values / fan_in**0.5
        found.append(values)
    return found


def _outputs(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _first_images(arena: OpArena, arguments: list[Tensor]) -> list[Tensor]:
    """Arguments for the first images alone, of which errors are measured: what depends on the batch, shortened."""
    count = min(arena.batch, _CHECKED_IMAGES)
    shapes = _SHAPES[arena.op]
    one, two = (shapes(n, arena.channels, arena.side) for n in (1, 2))
    return [a if x == y else a[:count] for a, x, y in zip(arguments, one, two, strict=True)]


def op_contender(arena: OpArena, op: str, how: str, device: torch.device) -> Contender:
    """An op at a shape, ready to run forward, or forward and backward of every argument.

    ``how``: eager, channels_last, or a backend of ``dk.backend``, with ``/library`` or ``/fused`` for its products.
    """
    dtype = DTYPES[arena.dtype]
    arguments = [a.to(dtype) for a in _arguments(arena, device)]
    if how != "eager":
        arguments = [a.contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a for a in arguments]
    arguments = [a.requires_grad_(arena.backward) for a in arguments]
    fused = how not in ("eager", "channels_last")
    backend, _, products = how.partition("/")
    chosen = (backend, True, products or "auto") if fused else ("auto", False, "auto")
    fn: Callable[..., Any] = getattr(dk.ops if fused else reference, op)
    with torch.no_grad(), precision(arena.dtype), dk.backend(*chosen):
        truth = _outputs(getattr(reference, op)(*(a.double() for a in _first_images(arena, arguments))))
        like = _outputs(fn(*arguments))
    cotangents = [torch.randn_like(o) for o in like] if arena.backward else []

    def call() -> tuple[Tensor, ...]:
        return _outputs(fn(*arguments))

    def run(i: int) -> None:
        del i
        with precision(arena.dtype), dk.backend(*chosen):
            if not arena.backward:
                with torch.no_grad():
                    call()
            else:
                torch.autograd.grad(call(), arguments, cotangents)

    error = max(relative_error(o[: t.shape[0]], t) for o, t in zip(like, truth, strict=True))
    macs, moved = op_work(op, arena.batch, arena.channels, arena.side, arena.backward, dtype.itemsize)
    return Contender(run, error=error, macs=macs, moved=moved)
