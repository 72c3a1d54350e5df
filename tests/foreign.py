"""Models as other people write them: the published attribute names, their own forward code.

Written from the papers and from the names and shapes in the published checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dico_kernels.reference import FCDM, DiCo


class LayerNorm2d(nn.Module):
    """LayerNorm over channels by hand; affine if told so."""

    def __init__(self, channels: int, eps: float = 1e-6, affine: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + self.eps).sqrt()
        if self.weight is not None:
            x = x * self.weight[:, None, None] + self.bias[:, None, None]
        return x.contiguous()


def affine(channels: int) -> LayerNorm2d:
    return LayerNorm2d(channels, affine=True)


class HiddenEps(LayerNorm2d):
    """Its eps is in the code."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=1e-5).movedim(-1, 1)


class RMSNorm2d(nn.RMSNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class WideNorm(LayerNorm2d):
    """Its weight and bias as (C, 1, 1)."""

    def __init__(self, c):
        super().__init__(c, affine=True)
        for name in ("weight", "bias"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach().reshape(c, 1, 1)))

    def forward(self, x):
        return torch.nn.functional.layer_norm(
            x.permute(0, 2, 3, 1), (x.shape[1],), self.weight.flatten(), self.bias.flatten(), 1e-6
        ).permute(0, 3, 1, 2)


class BareNorm(nn.Module):
    """A norm without any."""

    def __init__(self, c):
        super().__init__()
        self.shape = (c,)

    def forward(self, x):
        return torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), self.shape, eps=1e-6).permute(0, 3, 1, 2)


class Block(nn.Module):
    """DiCo's block as a stranger writes it, with a deviation on request."""

    def __init__(self, c: int, mlp_ratio: float = 2, **deviation) -> None:
        super().__init__()
        inner, self.order = int(c * mlp_ratio), deviation.get("order", (0, 1, 2, 3, 4, 5))
        self.one, self.detach = deviation.get("one", 1), deviation.get("detach", False)
        kernel, dilation = deviation.get("kernel", 3), deviation.get("dilation", 1)
        self.conv1 = nn.Conv2d(c, c, 1)
        self.conv2 = nn.Conv2d(c, c, kernel, padding=kernel // 2 * dilation, dilation=dilation, groups=c)
        self.conv3 = nn.Conv2d(c, c, 1)
        self.ca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1), nn.Sigmoid())
        self.conv4 = nn.Conv2d(c, inner, 1)
        self.conv5 = nn.Conv2d(inner, c, 1)
        self.act = nn.GELU(approximate=deviation.get("approximate", "none"))
        norm = deviation.get("norm", LayerNorm2d)
        self.norm1, self.norm2 = norm(c), norm(c)
        self.drop = nn.Dropout(deviation.get("dropout", 0.0))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c, 6 * c))

    def forward(self, hidden: Tensor, cond: Tensor) -> Tensor:
        wide = self.adaLN_modulation(cond)[:, :, None, None]
        parts = wide.chunk(6, 1)
        shift_a, scale_a, gate_a, shift_b, scale_b, gate_b = (parts[i] for i in self.order)
        y = self.norm1(hidden) * (self.one + scale_a) + shift_a
        y = self.act(self.conv2(self.conv1(y)))
        y = self.drop(self.conv3(y * self.ca(y.detach() if self.detach else y)))
        hidden = hidden + gate_a * y
        y = self.norm2(hidden) * (self.one + scale_b) + shift_b
        return hidden + gate_b * self.conv5(self.act(self.conv4(y)))


class Unconditioned(Block):
    """The encoder's variant: affine LayerNorms, no adaLN."""

    def __init__(self, c: int, mlp_ratio: float = 2, **deviation) -> None:
        super().__init__(c, mlp_ratio, norm=affine, **deviation)
        del self.adaLN_modulation

    def forward(self, hidden: Tensor) -> Tensor:
        y = self.act(self.conv2(self.conv1(self.norm1(hidden))))
        hidden = hidden + self.conv3(y * self.ca(y))
        return hidden + self.conv5(self.act(self.conv4(self.norm2(hidden))))


class Constant(nn.Module):
    """An adaLN_modulation that ignores what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, width))

    def forward(self, c: Tensor | None) -> Tensor:
        del c
        return self.table


class Codec(nn.Module):
    """A codec of isotropic blocks, some conditioned by a constant and called without a condition."""

    def __init__(self, width: int = 48, ratio: float = 4, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, width, 1)
        self.encoder = nn.ModuleList(Unconditioned(width, ratio) for _ in range(depth))
        self.decoder = nn.ModuleList(Block(width, ratio) for _ in range(depth))
        for block in self.decoder:
            block.adaLN_modulation = Constant(6 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.encoder:
            x = block(x)
        for block in self.decoder:
            x = block(x, None)
        return x


class GRN(nn.Module):
    """GRN in the three published layouts."""

    def __init__(self, c: int, layout: str = "fcdm", eps: float | None = None) -> None:
        super().__init__()
        shape = {"fcdm": (1, c, 1, 1), "convnext": (1, 1, 1, c), "timm": (c,)}[layout]
        self.names = ("weight", "bias") if layout == "timm" else ("gamma", "beta")
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.space, self.channel_dim = ((2, 3), 1) if layout == "fcdm" else ((1, 2), -1)
        if eps is not None:
            self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        size = torch.norm(x, p=2, dim=self.space, keepdim=True)
        ratio = size / (size.mean(self.channel_dim, keepdim=True) + getattr(self, "eps", 1e-6))
        gain, offset = (getattr(self, name) for name in self.names)
        return gain * (x * ratio) + offset + x


class FCDMBlock(nn.Module):
    """FCDM's block as a stranger writes it."""

    def __init__(self, c: int, ratio: int = 3, **deviation) -> None:
        super().__init__()
        kernel = deviation.get("kernel", 7)
        self.dwconv = nn.Conv2d(c, c, kernel, padding=kernel // 2, groups=c)
        self.norm = deviation.get("norm", LayerNorm2d)(c)
        self.pwconv1 = nn.Conv2d(c, ratio * c, 1)
        self.act = nn.GELU(approximate=deviation.get("approximate", "none"))
        self.grn = deviation.get("grn", GRN)(ratio * c)
        self.pwconv2 = nn.Conv2d(ratio * c, c, 1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c, 3 * c))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c)[..., None, None].chunk(3, dim=1)
        y = self.norm(self.dwconv(x)) * (1 + scale) + shift
        return x + gate * self.pwconv2(self.grn(self.act(self.pwconv1(y))))


class FinalLayer(nn.Module):
    """A final layer under either published name of its convolution."""

    def __init__(self, c: int, outputs: int, name: str) -> None:
        super().__init__()
        self.norm_final = LayerNorm2d(c)
        self.name = name
        if name == "out_proj":
            self.out_proj = nn.Conv2d(c, outputs, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(c, 2 * c))
        if name == "conv":
            self.conv = nn.Conv2d(c, outputs, 3, padding=1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[..., None, None].chunk(2, dim=1)
        return getattr(self, self.name)(self.norm_final(x) * (1 + scale) + shift)


STAGES = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")


class _Published(nn.Module):
    """The attributes of a reference model, with foreign blocks and a forward that spells everything out."""

    def __init__(self, model: nn.Module, block: type[nn.Module], ratio: float, final: str) -> None:
        super().__init__()
        for name, child in model.named_children():
            if name in STAGES:
                width = {0: 1, 1: 2, 2: 4, 3: 2, 4: 2 if block is Block else 1}[STAGES.index(name)]
                child = nn.ModuleList(block(width * model.x_width, ratio) for _ in child)
            elif name == "final_layer":
                conv = getattr(child, final)
                child = FinalLayer(conv.in_channels, conv.out_channels, final)
            self.add_module(name, child)


class PublishedDiCo(_Published):
    def __init__(self, hidden_size: int = 24, depth=(1, 2, 1, 1, 1), mlp_ratio: int = 2) -> None:
        model = DiCo(hidden_size=hidden_size, depth=depth, mlp_ratio=mlp_ratio)
        model.x_width = hidden_size
        super().__init__(model, Block, mlp_ratio, "out_proj")

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x)
        labels = self.y_embedder(y)
        c1, c2, c3 = (getattr(self, f"t_embedder_{i + 1}")(t) + labels[i] for i in range(3))
        for block in self.encoder_level_1:
            x = block(x, c1)
        level1 = x
        x = self.down1_2(x)
        for block in self.encoder_level_2:
            x = block(x, c2)
        level2 = x
        x = self.down2_3(x)
        for block in self.latent:
            x = block(x, c3)
        x = self.up3_2(x)
        x = torch.cat([x, level2], 1)
        x = self.reduce_chan_level2(x)
        for block in self.decoder_level_2:
            x = block(x, c2)
        x = self.up2_1(x)
        x = torch.cat([x, level1], 1)
        x = self.reduce_chan_level1(x)
        for block in self.decoder_level_1:
            x = block(x, c2)
        return self.final_layer(x, c2)


class PublishedFCDM(_Published):
    def __init__(self, hidden_size: int = 16, depth=(1, 1, 2, 1, 1)) -> None:
        model = FCDM(hidden_size=hidden_size, depth=depth)
        model.x_width = hidden_size
        super().__init__(model, FCDMBlock, 3, "conv")

    @staticmethod
    def wrapped(module):
        def call(*inputs):
            return module(*inputs)

        return call

    def run(self, blocks, x: Tensor, c: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(self.wrapped(block), x, c, use_reentrant=False)
        return x

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c1, c2, c3 = (getattr(self, f"t_embedder_{i}")(t) + getattr(self, f"y_embedder_{i}")(y) for i in (1, 2, 3))
        level1 = self.run(self.encoder_level_1, self.x_embedder(x), c1)
        level2 = self.run(self.encoder_level_2, self.down1_2(level1), c2)
        x = self.run(self.latent, self.down2_3(level2), c3)
        x = self.reduce_chans_2(torch.cat([self.up3_2(x), level2], 1))
        x = self.run(self.decoder_level_2, x, c2)
        x = self.reduce_chans_1(torch.cat([self.up2_1(x), level1], 1))
        x = self.run(self.decoder_level_1, x, c1)
        return self.final_layer(self.output_layer(x), c1)
