"""What the three model families share: their inputs, their checks and classifier-free guidance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Published samplers guide these channels of the noise and leave the rest as the conditional pass gave it.
GUIDED_CHANNELS = 3
LEVELS = ("enc1", "enc2", "mid", "dec2", "dec1")


def whole_number(name: str, value: object, least: int = 1, multiple: int = 1) -> int:
    """An integer, or a ValueError naming the argument, what was given and what is accepted."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value % multiple:
        of = f", a multiple of {multiple}" if multiple > 1 else ""
        raise ValueError(f"{name}={value!r}: expected an integer >= {least}{of}")
    return value


def check_depth(depth: Sequence[int]) -> tuple[int, ...]:
    """Depths of the five stages, or a ValueError that says what is accepted."""
    if not isinstance(depth, Sequence) or len(depth) != len(LEVELS):
        raise ValueError(f"depth={depth!r}: expected {len(LEVELS)} integers >= 0, for {', '.join(LEVELS)}")
    return tuple(whole_number(f"depth[{i}]", d, least=0) for i, d in enumerate(depth))


def inner_width(width: int, mlp_ratio: float) -> int:
    """Width of a feed-forward, or a ValueError where the ratio leaves none."""
    if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, (int, float)) or int(width * mlp_ratio) < 1:
        raise ValueError(f"mlp_ratio={mlp_ratio!r}: expected a number that leaves at least one of {width} channels")
    return int(width * mlp_ratio)


def downsample(channels: int, name: str) -> nn.Sequential:
    """3x3 convolution to C/2, PixelUnshuffle(2): (N, C, H, W) -> (N, 2C, H/2, W/2).

    ``name`` is what the published state_dict calls the pair: its only weight is ``{name}.0.weight``.
    """
    conv = nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict({name: nn.Sequential(conv, nn.PixelUnshuffle(2))}))


def upsample(channels: int, name: str) -> nn.Sequential:
    """3x3 convolution to 2C, PixelShuffle(2): (N, C, H, W) -> (N, C/2, 2H, 2W); ``name`` as for downsample."""
    conv = nn.Conv2d(channels, channels * 2, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict({name: nn.Sequential(conv, nn.PixelShuffle(2))}))


def values_are_readable(t: Tensor) -> bool:
    """Whether looking at values is free: a plain CPU tensor, outside compilation.

    On a GPU it would wait for the device and break graph capture, so there an out-of-range label fails in the
    embedding itself.
    """
    return not torch.compiler.is_compiling() and type(t) is Tensor and t.device.type == "cpu"


class Denoiser(nn.Module):
    """Base of the reference models: (x, t, y) -> noise (and variance) of x's shape.

    Attributes:
        in_channels: channels of x.
        out_channels: in_channels, or twice that when the variance is learned.
        num_classes: labels are 0..num_classes - 1; ``num_classes`` is the null label of classifier-free guidance.
        spatial_multiple: what H and W of x must be multiples of.
    """

    spatial_multiple = 4

    def __init__(self, in_channels: int, num_classes: int, learn_sigma: bool, class_dropout_prob: float) -> None:
        super().__init__()
        whole_number("in_channels", in_channels)
        whole_number("num_classes", num_classes)
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob={class_dropout_prob}: expected a probability, 0 to 1")
        self.in_channels, self.num_classes, self.learn_sigma = in_channels, num_classes, learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.label_count = num_classes + (class_dropout_prob > 0)

    def check_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Raise ValueError naming the argument, what was given and what is accepted."""
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[0] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected (N, {self.in_channels}, H, W), N > 0")
        m = self.spatial_multiple
        h, w = x.shape[2], x.shape[3]
        if h == 0 or w == 0 or h % m or w % m:
            raise ValueError(f"x is {h}x{w}: H and W must be positive multiples of {m}")
        for name, v in (("t", t), ("y", y)):
            if v.ndim != 1 or (v.shape[0] != x.shape[0] and v.shape[0] != 1):
                raise ValueError(
                    f"{name} has shape {tuple(v.shape)}: expected ({x.shape[0]},), one a sample, or (1,) for all"
                )
        if t.is_complex() or t.dtype == torch.bool:
            raise ValueError(f"t has dtype {t.dtype}: expected a floating or integer dtype")
        if y.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"y has dtype {y.dtype}: expected torch.int64 or torch.int32 (class labels)")
        if values_are_readable(y) and y.numel() and not 0 <= int(y.min()) <= int(y.max()) < self.label_count:
            null = f" ({self.num_classes} is the null label)" if self.label_count > self.num_classes else ""
            raise ValueError(
                f"y holds labels {int(y.min())} to {int(y.max())}: expected 0 to {self.label_count - 1}{null}"
            )

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Classifier-free guidance on a batch of [conditional half, unconditional half].

        The first half of x is used for both. The noise is guided on its first three channels only, as the published
        samplers do; the other channels stay what each half gave.

        Args:
            x: (2B, C, H, W); the second half is ignored.
            t: (2B,) or (1,).
            y: (2B,): B labels, then B null labels.
            cfg_scale: guided = unconditional + cfg_scale * (conditional - unconditional).

        Returns:
            (2B, out_channels, H, W); both halves carry the same guided noise.
        """
        if x.ndim != 4 or x.shape[0] % 2:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: expected (2B, C, H, W), conditional and unconditional halves"
            )
        half = x[: x.shape[0] // 2]
        out = self(torch.cat([half, half]), t, y)
        channels = min(GUIDED_CHANNELS, self.in_channels)  # never the variance
        noise, rest = out[:, :channels], out[:, channels:]
        conditional, unconditional = noise.chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class UShaped(Denoiser):
    """Base of DiCo and FCDM: what they do the same way between their levels."""

    def convolve(self, layer: nn.Module, x: Tensor) -> Tensor:
        """A 3x3 convolution outside of the blocks."""
        y: Tensor = layer(x)
        return y

    def down(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Go down one level, by what ``downsample`` makes."""
        y: Tensor = layer(x)
        return y

    def join(self, up: nn.Module, reduce: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        """Go up one level: the 1x1 convolution ``reduce`` of cat[up(x), skip].

        Args:
            up: what upsample makes.
            reduce: a 1x1 convolution.
            x: (N, C, H, W).
            skip: (N, S, 2H, 2W).
        """
        joined: Tensor = reduce(torch.cat([up(x), skip], 1))
        return joined
