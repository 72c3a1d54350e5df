"""adaLN: the conditioning head, and the final layer on its op."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn

from dico_kernels.nn._fused import Fused, choose, promoted
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
        if self.why_unfused() is not None:
            return super().forward(x, c)
        return self.compute(None, x, c)

    def compute(self, library: ModuleType | None, *inputs: Any) -> Tensor:
        """See Fused."""
        x, c = inputs
        x, conditioning = promoted(x, self.adaLN_modulation(c))
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
