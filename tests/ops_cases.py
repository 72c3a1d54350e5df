"""Every public op with its definition, and arguments for it at any shape: what the tests in tests/ops run over."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from support import rel_rms
from torch import Tensor

import dico_kernels as dk
from dico_kernels import native
from dico_kernels.reference import functional as R

# N, C, H, W: one of everything; odd everything; a rectangle wider than a vector register; images smaller than a kernel
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 7), (3, 17, 4, 4), (1, 33, 1, 9), (2, 40, 2, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REGIMES = ["hard", "small"]

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """An op: ``shapes`` gives each argument's shape, with a gain where it is a weight.

    ``roundings``: how often a value is stored in the dtype on its way through the op and back, intermediates included.
    On a few elements eager can be exact by luck, so the budget grants each of them in full.
    """

    name: str
    roundings: int
    shapes: Callable[[int, int, int, int], list[tuple[tuple[int, ...], float]]]

    @property
    def op(self) -> Callable[..., Any]:
        return getattr(dk.ops, self.name)

    @property
    def definition(self) -> Callable[..., Any]:
        return getattr(R, self.name)

    def arguments(self, shape: Shape, regime: str = "hard", seed: int = 0) -> list[Tensor]:
        """float64 arguments; weights of unit gain ("hard") or N(0, 0.02) ("small")."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for size, gain in self.shapes(*shape):
            values = torch.randn(size, generator=generator, dtype=torch.float64)
            found.append(values * (0.02 if regime == "small" and gain != IMAGE else gain))
        return found


IMAGE = 1.0
VECTOR = 0.5  # conditioning and biases: weights, for the regimes


def _pw(c: int) -> float:
    return 1.001 / c**0.5


def _stream(n: int, c: int, h: int, w: int) -> list[tuple[tuple[int, ...], float]]:
    return [((n, c, h, w), IMAGE), *[((n, c), VECTOR)] * 3]


def conv_half(n: int, c: int, h: int, w: int, k: int) -> list[tuple[tuple[int, ...], float]]:
    return [
        *_stream(n, c, h, w),
        ((k, c, 1, 1), _pw(c)),
        ((k,), VECTOR),
        ((k, 1, 3, 3), 0.4),
        ((k,), VECTOR),
        ((k, k, 1, 1), 3 * _pw(k)),
        ((k,), VECTOR),
        ((c, k, 1, 1), _pw(k)),
        ((c,), VECTOR),
    ]


def ffn_half(n: int, c: int, h: int, w: int, k: int) -> list[tuple[tuple[int, ...], float]]:
    return [
        *_stream(n, c, h, w),
        ((k, c, 1, 1), _pw(c)),
        ((k,), VECTOR),
        ((c, k, 1, 1), _pw(k)),
        ((c,), VECTOR),
    ]


def fcdm_block(n: int, c: int, h: int, w: int, k: int) -> list[tuple[tuple[int, ...], float]]:
    return [
        *_stream(n, c, h, w),
        ((c, 1, 7, 7), 0.2),
        ((c,), VECTOR),
        ((k, c, 1, 1), _pw(c)),
        ((k,), VECTOR),
        ((1, k, 1, 1), VECTOR),
        ((1, k, 1, 1), VECTOR),
        ((c, k, 1, 1), _pw(k)),
        ((c,), VECTOR),
    ]


BRANCHES = ("conv_half", "ffn_half", "fcdm_block")

CASES = {
    c.name: c
    for c in [
        Case("adaln_modulate", 1, lambda n, c, h, w: [((n, c, h, w), IMAGE), ((n, c), VECTOR), ((n, c), VECTOR)]),
        Case("gated_residual", 1, lambda n, c, h, w: [((n, c, h, w), IMAGE), ((n, c, h, w), IMAGE), ((n, c), VECTOR)]),
        Case(
            "gated_residual_adaln",
            2,
            lambda n, c, h, w: [((n, c, h, w), IMAGE), ((n, c, h, w), IMAGE), *[((n, c), VECTOR)] * 3],
        ),
        Case(
            "pointwise_depthwise_gelu",
            3,
            lambda n, c, h, w: [
                ((n, c, h, w), IMAGE),
                ((c + 2, c, 1, 1), _pw(c)),
                ((c + 2,), VECTOR),
                ((c + 2, 1, 3, 3), 0.4),
                ((c + 2,), VECTOR),
            ],
        ),
        Case(
            "depthwise_adaln",
            3,
            lambda n, c, h, w: [
                ((n, c, h, w), IMAGE),
                ((c, 1, 7, 7), 0.2),
                ((c,), VECTOR),
                ((n, c), VECTOR),
                ((n, c), VECTOR),
            ],
        ),
        Case("cca_gate", 3, lambda n, c, h, w: [((n, c, h, w), IMAGE), ((c, c, 1, 1), 3 * _pw(c)), ((c,), VECTOR)]),
        Case("grn", 1, lambda n, c, h, w: [((n, c, h, w), IMAGE), ((1, c, 1, 1), VECTOR), ((1, c, 1, 1), VECTOR)]),
        Case("conv_half", 8, lambda n, c, h, w: conv_half(n, c, h, w, c + 2)),
        Case("ffn_half", 6, lambda n, c, h, w: ffn_half(n, c, h, w, 2 * c + 1)),
        Case("fcdm_block", 8, lambda n, c, h, w: fcdm_block(n, c, h, w, 2 * c + 1)),
        Case(
            "pixel_shuffle_skip",
            2,
            lambda n, c, h, w: [
                ((n, 4 * c, h, w), IMAGE),
                ((n, c + 1, 2 * h, 2 * w), IMAGE),
                ((c + 3, 2 * c + 1, 1, 1), _pw(2 * c)),
                ((c + 3,), VECTOR),
            ],
        ),
    ]
}


def device_of(backend: str) -> str:
    """Where a backend is tested: on the GPU if there is one, but for native."""
    return "cuda" if torch.cuda.is_available() and backend != "native" else "cpu"


def backends() -> list[str]:
    """Those that execute here."""
    found = ["reference", *(["native"] if native.available() else [])]
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        found.append("triton")
    return found


def tuple_of(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def outputs_and_gradients(fn: Callable[..., Any], arguments: list[Tensor], seed: int = 1) -> list[Tensor]:
    """fn's outputs, then the gradient of every argument for random output gradients."""
    leaves = [a.detach().requires_grad_() for a in arguments]
    outs = tuple_of(fn(*leaves))
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outs]
    torch.autograd.backward(outs, gradients)
    return [*(o.detach() for o in outs), *(leaf.grad for leaf in leaves)]  # type: ignore[misc]


def check_against_float64(
    case: Case, arguments: list[Tensor], dtype: torch.dtype, device: str, exact_floor: float = 1e-12
) -> None:
    """Every output and gradient errs at most twice as much as eager in the same dtype, plus its roundings."""
    rounded = [a.to(dtype) for a in arguments]
    truth = outputs_and_gradients(case.definition, [a.double() for a in rounded])
    eager = outputs_and_gradients(case.definition, rounded)
    ours = [v.cpu() for v in outputs_and_gradients(case.op, [a.to(device) for a in rounded])]
    band = exact_floor if dtype == torch.float64 else case.roundings * torch.finfo(dtype).eps / 2
    if arguments[0].shape[1] == 1 and ("adaln" in case.name or case.name in BRANCHES):
        # LayerNorm of one channel: everything cancels but roundings, which 1 / sqrt(eps) multiplies.
        band *= 1e3
    for index, (o, e, t) in enumerate(zip(ours, eager, truth, strict=True)):
        assert o.dtype == dtype
        assert o.shape == t.shape
        if not t.norm() > 1e-9 * t.numel() ** 0.5:
            assert o.double().abs().max() <= 2 * e.double().abs().max() + band, index
            continue
        assert rel_rms(o, t) <= 2 * rel_rms(e, t) + band, f"result {index} of {case.name}"
