"""Single ops, ready to be called: the definition in either memory layout, and the fused op on a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
_MAX_SETS = 64
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


def _last_images(arena: OpArena, arguments: list[Tensor]) -> list[Tensor]:
    """Arguments for the last images alone, of which errors are measured: what depends on the batch, shortened."""
    shapes = _SHAPES[arena.op]
    one, two = (shapes(n, arena.channels, arena.side) for n in (1, 2))
    return [a if x == y else a[-_CHECKED_IMAGES:] for a, x, y in zip(arguments, one, two, strict=True)]


def _worst(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of several tensors' last images; NaN if one is."""
    errors = [relative_error(f[-e.shape[0] :], e) for f, e in zip(found, exact, strict=True)]
    return float(torch.tensor(errors, dtype=torch.float64).max())


def _error(arena: OpArena, fn: Callable[..., Any], arguments: list[Tensor]) -> float:
    """The worst relative error of outputs and, backward, of gradients, against the definition in float64.

    Of the last images, where offsets are largest; the others' outputs are given no gradient, so that the weights' are
    of the same images.
    """
    definition = getattr(reference, arena.op)
    exact = [a.detach().double().requires_grad_(arena.backward) for a in _last_images(arena, arguments)]
    with torch.set_grad_enabled(arena.backward):
        truth, found = _outputs(definition(*exact)), _outputs(fn(*arguments))
    worst = _worst([f.detach() for f in found], [t.detach() for t in truth])
    if not arena.backward:
        return worst
    cotangents = [torch.zeros_like(f) for f in found]
    for c in cotangents:
        c[-_CHECKED_IMAGES:].normal_(generator=torch.Generator(c.device).manual_seed(1))
    gradients = torch.autograd.grad(found, arguments, cotangents)
    true = torch.autograd.grad(truth, exact, [c[-_CHECKED_IMAGES:].double() for c in cotangents])
    return float(torch.tensor([worst, _worst(gradients, true)], dtype=torch.float64).max())


def _input_sets(arguments: list[Tensor], device: torch.device) -> list[list[Tensor]]:
    """Copies of the arguments that together are several times a GPU's second-level cache; on a CPU the arguments.

    In a model the ops between two calls fill the cache with other things.
    """
    count = 1
    if device.type == "cuda":
        bytes_once = sum(a.nbytes for a in arguments)
        count = min(_MAX_SETS, -(-4 * torch.cuda.get_device_properties(device).L2_cache_size // bytes_once))
    return [
        arguments,
        *([a.detach().clone().requires_grad_(a.requires_grad) for a in arguments] for _ in range(count - 1)),
    ]


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
    with precision(arena.dtype), dk.backend(*chosen):
        error = _error(arena, fn, arguments)
        with torch.no_grad():
            cotangents = [torch.randn_like(o) for o in _outputs(fn(*arguments))] if arena.backward else []
    sets = _input_sets(arguments, device)

    def run(i: int) -> None:
        inputs = sets[i % len(sets)]
        with precision(arena.dtype), dk.backend(*chosen):
            if not arena.backward:
                with torch.no_grad():
                    fn(*inputs)
            else:
                torch.autograd.grad(_outputs(fn(*inputs)), inputs, cotangents)

    macs, moved = op_work(op, arena.batch, arena.channels, arena.side, arena.backward, dtype.itemsize)
    return Contender(run, error=error, macs=macs, moved=moved)
