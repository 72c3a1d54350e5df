"""Down and up between the levels; the way up with its skip connection is one op behind the convolution."""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar, TypeGuard, cast

import torch
from torch import Tensor, nn

from dico_kernels import ops
from dico_kernels.nn._fused import Fused, hooked, plain_convolution, settings, unreadable
from dico_kernels.nn.adaln import conditioned
from dico_kernels.ops._library import autocasting
from dico_kernels.ops.convolution import convolution, pays
from dico_kernels.reference import base


class Downsample(nn.Sequential):
    """3x3 convolution to C/2 without bias, PixelUnshuffle(2).

    Args:
        channels: C, even.
        name: what the published state_dict calls the pair: "body" (DiCo) or "conv" (FCDM); key ``{name}.0.weight``.

    Shape: (N, C, H, W), H and W even -> (N, 2C, H/2, W/2).
    """

    def __init__(self, channels: int, name: str = "body") -> None:
        super().__init__(OrderedDict(base.downsample(channels, name).named_children()))


class SkipUpsample(nn.Module):
    """3x3 convolution to 2C without bias, PixelShuffle(2), concatenation [up, skip] and a 1x1 convolution.

    Args:
        channels: C of x, even.
        skip_channels: S of the skip connection; default C/2, as in DiCo and FCDM at the middle level.
        out_channels: K; default C/2.
        name: what the published state_dict calls the up convolution: "body" (DiCo) or "conv" (FCDM).

    Keys: ``up.{name}.0.weight``, ``reduce.weight``, ``reduce.bias``; in the published models, which have no module of
    the whole, ``up3_2.{name}.0.weight`` and ``reduce_chan_level2.*``.

    Shape: x (N, C, H, W), skip (N, S, 2H, 2W) -> (N, K, 2H, 2W), channels_last.

    Where a layer was replaced or has a hook, the layers run as they are.

    Raises:
        ValueError: a shape or dtype the op does not accept, naming the argument.
    """

    def __init__(
        self, channels: int, skip_channels: int | None = None, out_channels: int | None = None, name: str = "body"
    ) -> None:
        super().__init__()
        skip = channels // 2 if skip_channels is None else skip_channels
        self.up = base.upsample(channels, name)
        self.reduce = nn.Conv2d(channels // 2 + skip, channels // 2 if out_channels is None else out_channels, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Go up one level."""
        if separable(self.up, self.reduce):
            return joined(self.up, self.reduce, x, skip)
        y: Tensor = self.reduce(torch.cat([self.up(x), skip], 1))
        return y


class FusedUShape(Fused):
    """A whole reference model: x is made channels_last once, each way up with its skip is one op, and the conditioning
    of a level's blocks is computed at once where a backend does that (for few images without gradients).
    """

    fused_family: ClassVar[str] = "model"
    fused_arity: ClassVar[int] = 3
    fused_joined: ClassVar[tuple[str, ...]] = (
        *("up3_2", "up2_1", "reduce_chan_level2", "reduce_chan_level1", "reduce_chans_2", "reduce_chans_1"),
    )
    fused_products: ClassVar[tuple[str, ...]] = fused_joined[2:]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """See reference.DiCo and reference.FCDM; the output is channels_last."""
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        if torch.compiler.is_compiling():
            return super().forward(x, t, y)
        with conditioned(m for m in self._modules.values() if isinstance(m, nn.ModuleList)):
            return super().forward(x, t, y)

    def convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        """See reference.base.UShaped."""
        return _convolved(layer, x)

    def down(self, layer: nn.Module, x: Tensor) -> Tensor:
        """See reference.base.UShaped."""
        pair = _pair(layer)
        if pair is None or type(pair[1]) is not nn.PixelUnshuffle:
            return super().down(layer, x)  # type: ignore[misc]
        y: Tensor = pair[1](_convolved(pair[0], x))
        return y

    def join(self, up: nn.Module, reduce: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        """See reference.base.UShaped."""
        if separable(up, reduce):
            return joined(up, cast(nn.Conv2d, reduce), x, skip)
        return super().join(up, reduce, x, skip)  # type: ignore[misc]


def separable(up: nn.Module, reduce: nn.Module) -> bool:
    """Whether up's shuffle and the 1x1 may be run as one, without calling them: both as built, and nobody listens."""
    pair = _pair(up)
    if pair is None or type(reduce) is not nn.Conv2d or settings(reduce) != plain_convolution(1):
        return False
    shuffle = pair[1]
    if type(shuffle) is not nn.PixelShuffle or shuffle.upscale_factor != 2:
        return False
    return not any(hooked(m) or unreadable(m) for m in (shuffle, reduce))


def _pair(module: nn.Module) -> nn.Sequential | None:
    """A convolution and the shuffle behind it, as reference.base's up- and downsample hold them; None if not so."""
    pair = module[0] if type(module) is nn.Sequential and len(module) == 1 else None
    if type(pair) is not nn.Sequential or len(pair) != 2:
        return None
    return None if any(hooked(m) or unreadable(m) for m in (module, pair)) else pair


def joined(up: nn.Module, reduce: nn.Conv2d, x: Tensor, skip: Tensor) -> Tensor:
    """1x1 of cat[up(x), skip] as one op behind up's convolution; ``up`` as reference.base.upsample makes it."""
    y = _convolved(up[0][0], x)  # type: ignore[index]
    if skip.dtype != y.dtype and not autocasting(x):
        dtype = torch.promote_types(y.dtype, skip.dtype)  # as torch.cat does
        y, skip = y.to(dtype), skip.to(dtype)
    return ops.pixel_shuffle_skip(y, skip, reduce.weight, reduce.bias)


def _convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), as an op where that is the faster way."""
    if not torch.compiler.is_compiling() and _separate(conv):
        by_packed = getattr(type(conv), "forward_packed", None)  # of one that pack() found
        y: Tensor | None = None if by_packed is None else by_packed(conv, x)
        if y is not None:
            return y
        if pays(x, conv.weight):
            return convolution(x, conv.weight, conv.bias)
    y = conv(x)
    return y


def _separate(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether all that a convolution does may be done without calling it."""
    if getattr(type(conv), "plain_class", type(conv)) is not nn.Conv2d or hooked(conv) or unreadable(conv):
        return False
    return settings(conv) == plain_convolution(3)


__all__ = ["Downsample", "FusedUShape", "SkipUpsample"]
