"""The blocks of DiCo and FCDM on ops."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor, nn

from dico_kernels.nn._fused import Fused, Layout, choose, find, paired, plain_convolution, recomputing
from dico_kernels.nn._state import recorded
from dico_kernels.nn.adaln import modulation
from dico_kernels.nn.grn import affine
from dico_kernels.reference import dico, fcdm
from dico_kernels.reference.functional import GRN_EPS, LN_EPS


def _plain(kind: type[nn.Module], *path: str) -> Layout:
    return ((path, kind, ()),)


def _convolution(kernel: int, *path: str) -> Layout:
    return ((path, nn.Conv2d, plain_convolution(kernel)),)


class FusedDiCoBlock(Fused):
    """DiCo's block as two ops. Inner layers by their published names; ``adaLN_modulation`` is called.

    Attributes:
        fused_eps: of the two LayerNorms.
    """

    fused_family: ClassVar[str] = "DiCo block"
    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d
    conv4: nn.Conv2d
    conv5: nn.Conv2d
    ca: nn.Sequential
    adaLN_modulation: Any
    fused_layout: ClassVar[Layout] = (
        *_convolution(1, "conv1"),
        *_convolution(3, "conv2"),
        *_convolution(1, "conv3"),
        *_convolution(1, "conv4"),
        *_convolution(1, "conv5"),
        *_plain(nn.Sequential, "ca"),
        *_plain(nn.AdaptiveAvgPool2d, "ca", "0"),
        *_convolution(1, "ca", "1"),
        *_plain(nn.Sigmoid, "ca", "2"),
    )
    fused_products: ClassVar[tuple[str, ...]] = ("conv1", "conv3", "conv4", "conv5")
    fused_eps: ClassVar[tuple[float, float]] = (LN_EPS, LN_EPS)
    fused_recompute: bool | None = False

    def forward(self, x: Tensor, c: Any) -> Tensor:
        """Apply the block: x (N, C, H, W), c what adaLN_modulation takes -> (N, C, H, W), channels_last."""
        weights = self.fused_weights()
        if weights is None:
            return super().forward(x, c)
        if getattr(self.compute, "__func__", None) is not FusedDiCoBlock.compute:
            return self.compute(None, x, c)
        given = paired(x, modulation(self.adaLN_modulation, c))
        return recorded(self, weights, self.fused_eps, self._fused_branches, *given)

    def compute(self, library: ModuleType | None, *inputs: Any) -> Tensor:
        """See Fused."""
        x, c = inputs
        return self._fused_branches(*paired(x, modulation(self.adaLN_modulation, c)), library)

    def _fused_branches(self, x: Tensor, conditioning: Tensor, library: ModuleType | None = None) -> Tensor:
        f = choose(library, x)
        shift1, scale1, gate1, shift2, scale2, gate2 = conditioning.chunk(6, dim=1)
        x = f.conv_half(
            x, shift1, scale1, gate1, self.conv1.weight, self.conv1.bias, self.conv2.weight, self.conv2.bias,
            self.ca[1].weight, self.ca[1].bias, self.conv3.weight, self.conv3.bias, self.fused_eps[0],
        )  # fmt: skip
        y: Tensor = f.ffn_half(
            x, shift2, scale2, gate2, self.conv4.weight, self.conv4.bias, self.conv5.weight, self.conv5.bias,
            self.fused_eps[1], **recomputing(self, f),
        )  # fmt: skip
        return y


def _behind_affine(norm: Any, conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a 1x1 convolution that takes LN(x) instead of weight * LN(x) + bias.

    Folding it into adaLN as a scale of weight - 1 would lose a small weight's digits.
    """
    matrix, bias = conv.weight.flatten(1), conv.bias
    factor, plus = (norm._parameters.get(name) for name in ("weight", "bias"))
    if plus is not None:
        through = (matrix * plus.flatten()).sum(1)
        bias = through if bias is None else through + bias
    if factor is not None:
        matrix = matrix * factor.flatten()
    return matrix[:, :, None, None].to(conv.weight.dtype), None if bias is None else bias.to(conv.weight.dtype)


class FusedPlainDiCoBlock(FusedDiCoBlock):
    """DiCo's block without conditioning: affine LayerNorms, whose affine parts join the 1x1 behind, and no gates.

    Attributes:
        fused_norms: paths of the two LayerNorms.
    """

    fused_family: ClassVar[str] = "DiCo block, unconditioned"
    fused_arity: ClassVar[int] = 1
    fused_products: ClassVar[tuple[str, ...]] = ("conv3", "conv5")  # the norms' affine parts join the others
    fused_norms: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("norm1",), ("norm2",))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Apply the block: (N, C, H, W) -> same, channels_last."""
        weights = self.fused_weights()
        if weights is None:
            return super(FusedDiCoBlock, self).forward(x)
        if getattr(self.compute, "__func__", None) is not FusedPlainDiCoBlock.compute:
            return self.compute(None, x)
        settings = self.fused_eps, self.fused_norms
        return recorded(self, weights, settings, self._fused_plain, x, derive=self._fused_behind_norms)

    def compute(self, library: ModuleType | None, *inputs: Any) -> Tensor:
        """See Fused."""
        return self._fused_plain(*inputs, *self._fused_behind_norms(), library=library)

    def _fused_behind_norms(self) -> tuple[Tensor | None, ...]:
        """What _fused_plain takes beside x."""
        norm1, norm2 = (find(self, path) for path in self.fused_norms)
        weight = self.conv1.weight
        zero, one = weight.new_zeros(1, weight.shape[1]), weight.new_ones(1, weight.shape[1])
        return zero, one, *_behind_affine(norm1, self.conv1), *_behind_affine(norm2, self.conv4)

    def _fused_plain(self, x: Tensor, *behind_norms: Any, library: ModuleType | None = None) -> Tensor:
        zero, one, weight1, bias1, weight4, bias4 = behind_norms
        f = choose(library, x)
        x = f.conv_half(
            x, zero, zero, one, weight1, bias1, self.conv2.weight, self.conv2.bias,
            self.ca[1].weight, self.ca[1].bias, self.conv3.weight, self.conv3.bias, self.fused_eps[0],
        )  # fmt: skip
        y: Tensor = f.ffn_half(
            x, zero, zero, one, weight4, bias4, self.conv5.weight, self.conv5.bias, self.fused_eps[1],
            **recomputing(self, f),
        )  # fmt: skip
        return y


class FusedFCDMBlock(Fused):
    """FCDM's block as one op. Inner layers by their published names; ``adaLN_modulation`` is called.

    Attributes:
        fused_eps: of the LayerNorm and of GRN.
        fused_affine: names of GRN's two parameters.
    """

    fused_family: ClassVar[str] = "FCDM block"
    dwconv: nn.Conv2d
    pwconv1: nn.Conv2d
    grn: Any
    pwconv2: nn.Conv2d
    adaLN_modulation: Any
    fused_layout: ClassVar[Layout] = (
        *_convolution(7, "dwconv"),
        *_convolution(1, "pwconv1"),
        *_plain(fcdm.GlobalResponseNorm, "grn"),
        *_convolution(1, "pwconv2"),
    )
    fused_products: ClassVar[tuple[str, ...]] = ("pwconv1", "pwconv2")
    fused_eps: ClassVar[tuple[float, float]] = (LN_EPS, GRN_EPS)
    fused_recompute: bool | None = False
    fused_affine: ClassVar[tuple[str, str]] = ("gamma", "beta")

    def forward(self, x: Tensor, c: Any) -> Tensor:
        """Apply the block: x (N, C, H, W), c what adaLN_modulation takes -> (N, C, H, W), channels_last."""
        weights = self.fused_weights()
        if weights is None:
            return super().forward(x, c)
        if getattr(self.compute, "__func__", None) is not FusedFCDMBlock.compute:
            return self.compute(None, x, c)
        given = paired(x, modulation(self.adaLN_modulation, c))
        return recorded(self, weights, (self.fused_eps, self.fused_affine), self._fused_branch, *given)

    def compute(self, library: ModuleType | None, *inputs: Any) -> Tensor:
        """See Fused."""
        x, c = inputs
        return self._fused_branch(*paired(x, modulation(self.adaLN_modulation, c)), library)

    def _fused_branch(self, x: Tensor, conditioning: Tensor, library: ModuleType | None = None) -> Tensor:
        f = choose(library, x)
        shift, scale, gate = conditioning.chunk(3, dim=1)
        gamma, beta = affine(self.grn, self.fused_affine)
        y: Tensor = f.fcdm_block(
            x, shift, scale, gate, self.dwconv.weight, self.dwconv.bias, self.pwconv1.weight, self.pwconv1.bias,
            gamma, beta, self.pwconv2.weight, self.pwconv2.bias, *self.fused_eps, **recomputing(self, f),
        )  # fmt: skip
        return y


class DiCoBlock(FusedDiCoBlock, dico.DiCoBlock):
    """Convolution branch, then feed-forward branch, each under adaLN with a gate: two ops.

    Constructor, keys and their order are those of the published block and of ``reference.DiCoBlock``.

    Args:
        hidden_size: channels C.
        mlp_ratio: width of the feed-forward over C.

    Shape: x (N, C, H, W), c (N, C) or (1, C) -> (N, C, H, W), channels_last.

    Raises:
        ValueError: a shape, dtype or device the ops do not accept, naming the argument.
    """


class FCDMBlock(FusedFCDMBlock, fcdm.FCDMBlock):
    """Depthwise 7x7, adaLN, and an inverted bottleneck with GRN, gated: one op.

    Constructor, keys and their order are those of the published block and of ``reference.FCDMBlock``.

    Args:
        hidden_size: channels C.
        mlp_ratio: width between the pointwise convolutions over C.

    Shape: x (N, C, H, W), c (N, C) or (1, C) -> (N, C, H, W), channels_last.

    Raises:
        ValueError: a shape, dtype or device the ops do not accept, naming the argument.
    """


__all__ = ["DiCoBlock", "FCDMBlock", "FusedDiCoBlock", "FusedFCDMBlock", "FusedPlainDiCoBlock"]
