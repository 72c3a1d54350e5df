"""Global response normalisation on its op, in the three published parameter layouts."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from dico_kernels.nn._fused import Fused, choose, promoted
from dico_kernels.ops._library import autocasting
from dico_kernels.reference import fcdm
from dico_kernels.reference.functional import GRN_EPS

# name: (names of gamma and beta, their shape for C channels, whether x is (N, H, W, C))
LAYOUTS: dict[str, tuple[tuple[str, str], tuple[int, ...], bool]] = {
    "fcdm": (("gamma", "beta"), (1, -1, 1, 1), False),
    "convnext": (("gamma", "beta"), (1, 1, 1, -1), True),
    "timm": (("weight", "bias"), (-1,), True),
}


def affine(module: nn.Module, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """gamma and beta by their names in the module."""
    return getattr(module, names[0]), getattr(module, names[1])


class FusedGlobalResponseNorm(Fused):
    """GRN as one op.

    Attributes:
        fused_eps: added to the mean norm.
        fused_affine: names of gamma and beta.
        fused_channels_last: whether x is (N, H, W, C), and not (N, C, H, W).
    """

    fused_family: ClassVar[str] = "GRN"
    fused_arity: ClassVar[int] = 1
    fused_eps: ClassVar[float] = GRN_EPS
    fused_affine: ClassVar[tuple[str, str]] = ("gamma", "beta")
    fused_channels_last: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """gamma * (x * Nx) + beta + x, of x's shape."""
        if self.fused_weights() is None:
            return super().forward(x)
        return self.compute(None, x)

    def compute(self, library: ModuleType | None, *inputs: Any) -> Tensor:
        """See Fused."""
        (x,) = inputs
        gamma, beta = affine(self, self.fused_affine)
        if x.ndim != 4:
            return cast(Tensor, super().forward(x))
        f = choose(library, x)
        if not autocasting(x):
            x, gamma = promoted(x, gamma)
            x, beta = promoted(x, beta)
            gamma = gamma.to(x.dtype)
        image = x.permute(0, 3, 1, 2) if self.fused_channels_last else x
        y: Tensor = f.grn(image, gamma, beta, self.fused_eps)
        return y.permute(0, 2, 3, 1) if self.fused_channels_last else y


class GlobalResponseNorm(FusedGlobalResponseNorm, fcdm.GlobalResponseNorm):
    """GRN (ConvNeXt V2, FCDM), the identity at initialisation.

    Args:
        channels: C.
        layout: "fcdm": gamma, beta (1, C, 1, 1), x (N, C, H, W); "convnext": gamma, beta (1, 1, 1, C), x (N, H, W, C);
            "timm": weight, bias (C,), x (N, H, W, C).

    Shape: x -> same.

    Raises:
        ValueError: an unknown layout, or an x the op does not accept, naming the argument.
    """

    def __init__(self, channels: int, layout: str = "fcdm") -> None:
        super().__init__(channels)
        if layout not in LAYOUTS:
            raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
        names, shape, self.fused_channels_last = LAYOUTS[layout]
        if layout != "fcdm":
            del self.gamma, self.beta
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.zeros(channels).reshape(shape)))
        self.fused_affine = names  # type: ignore[misc]


__all__ = ["LAYOUTS", "FusedGlobalResponseNorm", "GlobalResponseNorm"]
