"""adaLN: the conditioning head, and the final layer on its op."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dico_kernels.nn._fused import Fused, choose, hooked, paired, unreadable
from dico_kernels.ops.conditioning import at_once, conditioning
from dico_kernels.reference import dico, fcdm
from dico_kernels.reference.embed import silu_linear
from dico_kernels.reference.functional import LN_EPS


class AdaLNModulation(nn.Sequential):
    """The conditioning head of adaLN, Linear(SiLU(c)); its keys are ``1.weight`` and ``1.bias``.

    Args:
        width: of c.
        chunks: 6 for DiCo's block, 3 for FCDM's, 2 for a final layer.

    Shape: (N, width) -> (N, chunks * width).
    """

    def __init__(self, width: int, chunks: int) -> None:
        super().__init__(*silu_linear(width, chunks))


def _plain_head(head: Any) -> nn.Linear | None:
    """The linear layer of a conditioning head that is Linear(SiLU(c)), as built, and nobody listens to; else None."""
    if type(head) not in (nn.Sequential, AdaLNModulation) or len(head) != 2:
        return None
    silu, linear = head
    if type(silu) is not nn.SiLU or getattr(type(linear), "plain_class", type(linear)) is not nn.Linear:
        return None
    return None if any(hooked(m) or unreadable(m) for m in (head, silu, linear)) else linear


class _Given(threading.local):
    """What a thread knows within ``conditioned``.

    Attributes:
        level: by head the blocks of its level, until the first of their heads is asked.
        found: of the level that was computed last, by head, the c that it is of and what the head makes of it.
    """

    def __init__(self) -> None:
        self.level: dict[nn.Module, Iterable[nn.Module]] = {}
        self.found: dict[nn.Module, tuple[Tensor, Tensor]] = {}


_GIVEN = _Given()


@contextmanager
def conditioned(levels: Iterable[Iterable[nn.Module]]) -> Iterator[None]:
    """Within the context, the first head of a level that ``modulation`` asks has all of them computed, where it pays.

    Args:
        levels: lists of blocks that are given the same c. What is computed is kept until the next level's is.
    """
    before = _GIVEN.level, _GIVEN.found
    _GIVEN.level = {head: level for level in levels for block in level if (head := _head(block)) is not None}
    _GIVEN.found = {}
    try:
        yield
    finally:
        _GIVEN.level, _GIVEN.found = before


def _head(block: nn.Module) -> nn.Module | None:
    return block._modules.get("adaLN_modulation")


def _at_once(level: Iterable[nn.Module], c: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """What the heads of a level's blocks make of c, by head, with c.

    A head that is not plain is left to itself; all are, where one is not of the others' size or dtype, or a block has
    hooks or a forward of its own, which might change what is read here, or is compiled and would not look.
    """
    heads: dict[nn.Module, nn.Linear] = {}
    for block in level if at_once(c) else ():
        if hooked(block) or block._compiled_call_impl is not None:
            return {}
        head = _head(block)
        if head is not None and isinstance(block, Fused) and (linear := _plain_head(head)) is not None:
            heads[head] = linear
    found = conditioning(c, [m.weight for m in heads.values()], [m.bias for m in heads.values()]) if heads else None
    return {} if found is None else {head: (c, y) for head, y in zip(heads, found.unbind(), strict=True)}


def modulation(head: Any, c: Any) -> Tensor:
    """What a conditioning head makes of c: with the others of its level within ``conditioned``, else by calling it."""
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        if (level := _GIVEN.level.get(head)) is not None:
            _GIVEN.level = {h: blocks for h, blocks in _GIVEN.level.items() if blocks is not level}
            _GIVEN.found = _at_once(level, c)
        of, y = _GIVEN.found.get(head, (None, None))
        if of is c and y is not None:
            return y
    found: Tensor = head(c)
    return found


class FusedFinalLayer(Fused):
    """adaLN as one op, then the output convolution, which is called as it is.

    Attributes:
        fused_eps: of the LayerNorm.
        fused_output: name of the output convolution.
    """

    fused_family: ClassVar[str] = "final layer"
    adaLN_modulation: Any
    fused_eps: ClassVar[float] = LN_EPS
    fused_output: ClassVar[str] = "out_proj"

    def forward(self, x: Tensor, c: Any) -> Tensor:
        """X (N, C, H, W), c what adaLN_modulation takes -> (N, out_channels, H, W)."""
        if self.fused_weights() is None:
            return super().forward(x, c)
        return self.compute(None, x, c)

    def compute(self, library: ModuleType | None, *inputs: Any) -> Tensor:
        """See Fused."""
        x, c = inputs
        x, conditioning = paired(x, self.adaLN_modulation(c))
        shift, scale = conditioning.chunk(2, dim=1)
        h = choose(library, x).adaln_modulate(x, shift, scale, self.fused_eps)
        y: Tensor = self.get_submodule(self.fused_output)(h)
        return y


class FinalLayer(FusedFinalLayer, dico.FinalLayer):
    """DiCo's final layer: adaLN, then a 3x3 convolution ``out_proj``.

    Args:
        hidden_size: channels C.
        out_channels: of the output.

    Shape: x (N, C, H, W), c (N, C) or (1, C) -> (N, out_channels, H, W).
    """


class FCDMFinalLayer(FusedFinalLayer, fcdm.FinalLayer):
    """FCDM's final layer: as DiCo's, but the convolution is named ``conv``.

    Args:
        hidden_size: channels C.
        out_channels: of the output.

    Shape: x (N, C, H, W), c (N, C) or (1, C) -> (N, out_channels, H, W).
    """

    fused_output: ClassVar[str] = "conv"


__all__ = ["AdaLNModulation", "FCDMFinalLayer", "FinalLayer", "FusedFinalLayer"]
