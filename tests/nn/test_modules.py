"""The drop-in modules: constructors, keys and numbers of what they replace."""

from __future__ import annotations

import copy

import pytest
import torch
from support import rel_rms
from torch import nn

import dico_kernels as dk
from dico_kernels.reference import base, dico, embed, fcdm
from dico_kernels.reference import functional as R
from dico_kernels.reference.weights import fill_, named_input

C, N = 12, 3
EPS = torch.finfo(torch.float32).eps


def image(c=C, h=4, w=6):
    return torch.randn(N, c, h, w)


class Gated(nn.Sequential):
    """The published use of the published ``ca``."""

    def forward(self, x):
        return x * super().forward(x)


class SkipUp(nn.Module):
    def __init__(self, channels, skip, out, name):
        super().__init__()
        self.up = base.upsample(channels, name)
        self.reduce = nn.Conv2d(channels // 2 + skip, out, 1)

    def forward(self, x, skip):
        return self.reduce(torch.cat([self.up(x), skip], 1))


def grn(shape, names, last):
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

        def forward(self, x):
            x = x.permute(0, 3, 1, 2) if last else x
            y = R.grn(x, *(getattr(self, name) for name in names))
            return y.permute(0, 2, 3, 1) if last else y

    return Norm()


# name: (ours, what it replaces, inputs)
CASES = {
    "DiCoBlock": (lambda: dk.nn.DiCoBlock(C, 3), lambda: dico.DiCoBlock(C, 3), lambda: (image(), torch.randn(N, C))),
    "FCDMBlock": (lambda: dk.nn.FCDMBlock(C), lambda: fcdm.FCDMBlock(C), lambda: (image(), torch.randn(N, C))),
    "FinalLayer": (lambda: dk.nn.FinalLayer(C, 5), lambda: dico.FinalLayer(C, 5), lambda: (image(), torch.randn(N, C))),
    "FCDMFinalLayer": (
        lambda: dk.nn.FCDMFinalLayer(C, 5),
        lambda: fcdm.FinalLayer(C, 5),
        lambda: (image(), torch.randn(1, C)),
    ),
    "GRN": (lambda: dk.nn.GlobalResponseNorm(C), lambda: fcdm.GlobalResponseNorm(C), lambda: (image(),)),
    "GRN, ConvNeXt": (
        lambda: dk.nn.GlobalResponseNorm(C, "convnext"),
        lambda: grn((1, 1, 1, C), ("gamma", "beta"), True),
        lambda: (image(4, 6, C),),
    ),
    "GRN, timm": (
        lambda: dk.nn.GlobalResponseNorm(C, "timm"),
        lambda: grn((C,), ("weight", "bias"), True),
        lambda: (image(4, 6, C),),
    ),
    "CompactChannelAttention": (
        lambda: dk.nn.CompactChannelAttention(C),
        lambda: Gated(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.Sigmoid()),
        lambda: (image(),),
    ),
    "AdaLNModulation": (
        lambda: dk.nn.AdaLNModulation(C, 6),
        lambda: embed.silu_linear(C, 6),
        lambda: (torch.randn(N, C),),
    ),
    "Downsample": (lambda: dk.nn.Downsample(C, "conv"), lambda: base.downsample(C, "conv"), lambda: (image(),)),
    "SkipUpsample": (
        lambda: dk.nn.SkipUpsample(C),
        lambda: SkipUp(C, C // 2, C // 2, "body"),
        lambda: (image(), image(C // 2, 8, 12)),
    ),
    "SkipUpsample, other widths": (
        lambda: dk.nn.SkipUpsample(C, 5, 7, "conv"),
        lambda: SkipUp(C, 5, 7, "conv"),
        lambda: (image(), image(5, 8, 12)),
    ),
}


def run(module, inputs):
    leaves = [v.clone().requires_grad_() for v in inputs]
    out = module(*leaves)
    (out * named_input(tuple(out.shape), "gradient")).sum().backward()
    return {"output": out.detach(), **{str(i): v.grad for i, v in enumerate(leaves)}} | {
        n: p.grad for n, p in module.named_parameters()
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_same_keys_and_numbers(name, compiled):
    make, make_other, make_inputs = CASES[name]
    ours, other, inputs = make(), fill_(make_other()), make_inputs()
    with torch.no_grad():
        for key, p in other.named_parameters():
            if p.ndim != 2 and "grn" not in key and max(p.shape) == p.numel():
                p.normal_(std=0.3)  # GRN by itself is named by no rule of fill_
    assert list(ours.state_dict()) == list(other.state_dict())
    assert [v.shape for v in ours.state_dict().values()] == [v.shape for v in other.state_dict().values()]
    ours.load_state_dict(other.state_dict())
    truth = run(copy.deepcopy(other).double(), [v.double() for v in inputs])
    eager = run(other, inputs)
    torch._dynamo.reset()
    actual = run(torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours, inputs)
    actual = {k.removeprefix("_orig_mod."): v for k, v in actual.items()}
    assert actual.keys() == truth.keys()
    for key, value in truth.items():
        assert actual[key].shape == value.shape
        assert rel_rms(actual[key], value) <= 2 * rel_rms(eager[key], value) + 4 * EPS, key


def test_initialisation_is_the_references():
    for ours, other in ((dk.nn.DiCoBlock, dico.DiCoBlock), (dk.nn.FCDMBlock, fcdm.FCDMBlock)):
        torch.manual_seed(1)
        mine = ours(C).state_dict()
        torch.manual_seed(1)
        theirs = other(C).state_dict()
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_blocks_are_reference_blocks_and_already_fused():
    block = dk.nn.DiCoBlock(C)
    assert isinstance(block, dico.DiCoBlock)
    assert type(dk.fuse(block)) is dk.nn.DiCoBlock
    assert type(dk.unfuse(block)) is dk.nn.DiCoBlock
    assert dk.explain(block).modules[0].fused


@pytest.mark.parametrize("make", [lambda: dk.nn.DiCoBlock(C), lambda: dk.nn.FCDMBlock(C)])
def test_an_inner_layer_replaced(make):
    block = fill_(make())
    name = "conv4" if hasattr(block, "conv4") else "pwconv1"
    other = copy.deepcopy(block)
    x, c = image(), torch.randn(N, C)
    setattr(block, name, nn.Sequential(getattr(block, name), nn.Tanh()))
    getattr(other, name).register_forward_hook(lambda m, args, out: out.tanh())
    assert torch.equal(block(x, c), other(x, c))
    setattr(other, name, copy.deepcopy(block.get_submodule(name))[0])
    assert rel_rms(block(x, c), other(x, c)) > 1e-3


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="layout='torch': expected one of fcdm, convnext, timm"):
        dk.nn.GlobalResponseNorm(C, "torch")
    with pytest.raises(ValueError, match="skip has shape"):
        dk.nn.SkipUpsample(C)(image(), image(C // 2, 4, 6))
    with pytest.raises(ValueError, match="mlp_ratio=0"):
        dk.nn.DiCoBlock(C, 0)


def test_pixel_shuffle_is_not_stored_twice():
    """One op, and no concatenation."""
    up = dk.nn.SkipUpsample(C)
    rows = dk.explain(up, image(), image(C // 2, 8, 12))
    assert [r.choice.entry for r in rows] == ["pixel_shuffle_skip"]


def doubled(module, args, out):
    return 2 * out


@pytest.mark.parametrize("change", ["hook", "replaced", "extended"])
def test_channel_attention_of_changed_layers(change):
    torch.manual_seed(0)
    module, x = dk.nn.CompactChannelAttention(6), torch.randn(2, 6, 5, 5)
    if change == "hook":
        module[1].register_forward_hook(doubled)
    elif change == "replaced":
        module[2] = nn.Hardsigmoid()
    else:
        module.append(nn.Hardtanh(0.4, 0.6))
    gate = x
    for layer in module:
        gate = layer(gate)
    assert rel_rms(module(x), x * gate) < 1e-6


@pytest.mark.parametrize("change", ["hook", "up's hook", "wrapped", "strided"])
def test_way_up_of_changed_layers(change):
    torch.manual_seed(0)
    module = dk.nn.SkipUpsample(16)
    x, skip = torch.randn(2, 16, 4, 4), torch.randn(2, 8, 8, 8)
    if change == "hook":
        module.reduce.register_forward_hook(doubled)
    elif change == "up's hook":
        module.up.register_forward_hook(doubled)
    elif change == "wrapped":
        module.reduce = nn.Sequential(module.reduce, nn.Tanh())
    else:
        module.reduce.stride = (2, 2)
    assert rel_rms(module(x, skip), module.reduce(torch.cat([module.up(x), skip], 1))) < 1e-6


@pytest.mark.parametrize("layout", ["fcdm", "convnext", "timm"])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_grn_promotes_as_pytorch_does(layout, dtypes):
    torch.manual_seed(0)
    module = fill_(dk.nn.GlobalResponseNorm(6, layout)).to(dtypes[1])
    x = torch.randn(2, 6, 4, 3) if layout == "fcdm" else torch.randn(2, 4, 3, 6)
    y = module(x.to(dtypes[0]))
    assert y.dtype == torch.float32
    wide = copy.deepcopy(module).double()
    assert rel_rms(y, wide(x.to(dtypes[0]).double())) < 1e-6


def test_grn_without_data():
    y = dk.nn.GlobalResponseNorm(8).to("meta")(torch.empty(2, 8, 4, 4, device="meta"))
    assert (y.shape, y.device.type) == ((2, 8, 4, 4), "meta")
