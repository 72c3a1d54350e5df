"""What fuse must leave alone, before and after: each case would give wrong numbers if it did not."""

from __future__ import annotations

import contextlib
import copy
import math
import re

import pytest
import torch
from foreign import GRN, BareNorm, Block, FCDMBlock, HiddenEps, LayerNorm2d, RMSNorm2d, Unconditioned, WideNorm
from support import rel_rms
from torch import nn
from torch.nn.utils import parametrizations, prune

import dico_kernels as dk
from dico_kernels.reference import DiCoBlock
from dico_kernels.reference import FCDMBlock as ReferenceFCDMBlock
from dico_kernels.reference.dico import FinalLayer
from dico_kernels.reference.weights import fill_

C = 16


def inputs(n=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, C, 5, 6, generator=generator), torch.randn(n, C, generator=generator)


class GRNWithAnotherEps(GRN):
    def forward(self, x):
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        return self.gamma * (x * (size / (size.mean(1, keepdim=True) + 1e-5))) + self.beta + x


class HalfInTraining(Block):
    def forward(self, x, c):
        return super().forward(x, c) * (0.5 if self.training else 1.0)


class ActivatedCondition(Block):
    """Changes the condition before the modulation sees it."""

    def forward(self, x, c):
        return super().forward(x, c.tanh())


class TwoOutputs(Block):
    def forward(self, x, c):
        return super().forward(x, c), c


class Squeezed(nn.Module):
    """Channel attention with a bottleneck."""

    def __init__(self, c):
        super().__init__()
        self.gate = nn.Sequential(nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, c, 1), nn.Sigmoid())

    def forward(self, x):
        return self.gate(x.mean((2, 3), keepdim=True))


class LoRAConv(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.rank = base, 2
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class LoRASubclass(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 1.5


def with_ca(block, ca):
    block.ca = ca
    return block


def replaced(block, name, make):
    setattr(block, name, make(getattr(block, name)))
    return block


def hooked(block):
    block.conv1.register_forward_hook(lambda m, args, out: out * 2)
    return block


def backward_hooked(block):
    block.norm1.register_full_backward_hook(lambda m, gi, go: (gi[0] * 2,))
    return block


def as_subclass(conv):
    other = LoRASubclass(conv.in_channels, conv.out_channels, 1)
    other.load_state_dict(conv.state_dict())
    return other


def patched(block):
    original = block.forward
    block.forward = lambda x, c: original(x, c) * 2
    return block


def buffered(block):
    block.register_buffer("mean", torch.ones(C, 1, 1))
    return block


# name: (block, what the reason must say, whether the probe has to run)
CASES = {
    "tanh GELU": (lambda: Block(C, approximate="tanh"), "the probe found", True),
    "LayerNorm eps": (lambda: Block(C, norm=HiddenEps), r"the probe found the output \(tiny inputs\)", True),
    "shift and scale swapped": (lambda: Block(C, order=(1, 0, 2, 3, 4, 5)), "the probe found", True),
    "second shift and scale swapped": (lambda: Block(C, order=(0, 1, 2, 4, 3, 5)), "the probe found", True),
    "gate first": (lambda: Block(C, order=(1, 2, 0, 3, 4, 5)), "the probe found", True),
    "scale without 1": (lambda: Block(C, one=0), "the probe found", True),
    "dropout": (lambda: Block(C, dropout=0.2), "the probe found", True),
    "training differs": (lambda: HalfInTraining(C), "the probe found", True),
    "gradient stopped": (lambda: Block(C, detach=True), "the probe found the gradient", True),
    "condition changed": (lambda: ActivatedCondition(C), "the probe found", True),
    "two outputs": (lambda: TwoOutputs(C), "could not run it: TypeError: it returns tuple", True),
    "kernel size": (lambda: Block(C, kernel=5), r"conv2 has .*\(5, 5\)", False),
    "dilation": (lambda: Block(C, dilation=2), r"conv2 has .*dilation \(2, 2\)", False),
    "dilation, padded the same": (
        lambda: replaced(Block(C), "conv2", lambda _: nn.Conv2d(C, C, 3, padding="same", dilation=2, groups=C)),
        r"conv2 has .*dilation \(2, 2\)",
        False,
    ),
    "reflected padding": (
        lambda: replaced(Block(C), "conv2", lambda _: nn.Conv2d(C, C, 3, padding=1, groups=C, padding_mode="reflect")),
        "conv2 pads with 'reflect'",
        False,
    ),
    "another attention": (lambda: with_ca(Block(C), Squeezed(C)), "ca is a Squeezed", False),
    "max pooling": (
        lambda: with_ca(Block(C), nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Conv2d(C, C, 1), nn.Sigmoid())),
        "AdaptiveMaxPool2d",
        False,
    ),
    "forward hook within": (lambda: hooked(Block(C)), "conv1 has forward hooks", False),
    "backward hook within": (lambda: backward_hooked(Block(C)), "norm1 has backward hooks", False),
    "spectral norm": (
        lambda: replaced(Block(C), "conv3", parametrizations.spectral_norm),
        "conv3 is a ParametrizedConv2d",
        False,
    ),
    "weight norm": (lambda: replaced(Block(C), "conv3", parametrizations.weight_norm), "Parametrized", False),
    "old weight norm": (lambda: replaced(Block(C), "conv3", nn.utils.weight_norm), "conv3 has forward hooks", False),
    "pruning": (
        lambda: replaced(Block(C), "conv3", lambda m: prune.random_unstructured(m, "weight", amount=0.5)),
        "conv3 has forward hooks",
        False,
    ),
    "LoRA around": (lambda: replaced(Block(C), "conv4", LoRAConv), "conv4 is a LoRAConv", False),
    "LoRA by inheritance": (lambda: replaced(Block(C), "conv4", as_subclass), "conv4 is a LoRASubclass", False),
    "patched instance": (lambda: patched(Block(C)), "forward of its own on the instance", False),
    "a buffer": (lambda: buffered(Block(C)), "mean is a tensor that the fused form does not know", False),
    "affine and conditioned": (
        lambda: Block(C, norm=lambda c: LayerNorm2d(c, affine=True)),
        "norm1.weight is a tensor that the fused form does not know",
        False,
    ),
    "unconditioned, tanh GELU": (lambda: Unconditioned(C, approximate="tanh"), "the probe found", True),
    "FCDM: tanh GELU": (lambda: FCDMBlock(C, approximate="tanh"), "the probe found", True),
    "FCDM: LayerNorm eps": (lambda: FCDMBlock(C, norm=HiddenEps), "the probe found the output", True),
    "FCDM: GRN eps": (lambda: FCDMBlock(C, grn=GRNWithAnotherEps), "the probe found the output", True),
    "FCDM: kernel size": (lambda: FCDMBlock(C, kernel=5), r"dwconv has .*\(5, 5\)", False),
}


@pytest.mark.parametrize("name", CASES)
def test_left_alone_and_said_why(name):
    torch.manual_seed(0)
    make, reason, probed = CASES[name]
    block = make()
    x, c = inputs()
    given = (x,) if isinstance(block, Unconditioned) else (x, c)
    seed = torch.get_rng_state()
    before = block(*given)
    classes = [type(m) for m in block.modules() if not isinstance(m, GRN)]
    with pytest.warns(RuntimeWarning, match="left unfused: model: "):
        dk.fuse(block)
    assert [type(m) for m in block.modules() if not isinstance(m, GRN)] == classes
    torch.set_rng_state(seed)
    after = block(*given)
    if torch.is_tensor(before):
        assert rel_rms(after, before) < 1e-6
    verdict = dk.explain(block).modules[0]
    assert not verdict.fused
    assert re.search(reason, verdict.reason), verdict.reason
    if probed:
        assert math.isnan(verdict.figure) or verdict.figure > 1e-4
    else:
        assert verdict.figure is None
    assert verdict.reason in str(dk.explain(block))


def test_an_eps_that_a_norm_carries_is_passed_on():
    block = fill_(Block(C, norm=lambda c: LayerNorm2d(c, eps=1e-3)))
    fcdm = fill_(FCDMBlock(C, norm=lambda c: LayerNorm2d(c, eps=1e-3), grn=lambda c: GRN(c, eps=1e-2)))
    x, c = inputs()
    for module in (block, fcdm):
        before = module(x * 1e-2, c)
        dk.fuse(module)
        assert dk.explain(module).modules[0].fused
        assert rel_rms(module(x * 1e-2, c), before) < 1e-5


def test_two_settings_of_one_class_are_two_proofs():
    """The first one's proof must not speak for the second."""
    blocks = [Block(C), Block(C, approximate="tanh"), Block(C)]
    with pytest.warns(RuntimeWarning):
        dk.fuse(nn.ModuleList(blocks))
    assert [isinstance(b, dk.nn._fused.Fused) for b in blocks] == [True, False, True]


def test_one_width_does_not_speak_for_another():
    class Moody(Block):
        def forward(self, x, c):
            return super().forward(x, c) * (1.0 if x.shape[1] == 16 else 2.0)

    blocks = [Moody(16), Moody(32)]
    with pytest.warns(RuntimeWarning):
        dk.fuse(nn.ModuleList(blocks))
    assert [isinstance(b, dk.nn._fused.Fused) for b in blocks] == [True, False]


def test_a_class_patched_later_is_proven_again():
    class Patched(Block):
        pass

    dk.fuse(Patched(C))
    Patched.forward = lambda self, hidden, cond: hidden
    with pytest.warns(RuntimeWarning):
        assert type(dk.fuse(Patched(C))) is Patched


def lora(block):
    block.conv4 = LoRAConv(block.conv4)


def hook(block):
    block.conv1.register_forward_hook(lambda m, args, out: out * 2)


def pre_hook(block):
    block.ca.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def parametrize(block):
    parametrizations.spectral_norm(block.conv3)


def other_pool(block):
    block.ca[0] = nn.AdaptiveMaxPool2d(1)


def dilated(block):
    block.conv2 = nn.Conv2d(C, C, 3, padding=2, dilation=2, groups=C)


def own_forward(block):
    original = block.conv5.forward
    block.conv5.forward = lambda x: original(x) * 2


def assign(block):
    block.load_state_dict({k: torch.full_like(v, 0.1) for k, v in block.state_dict().items()}, assign=True)


def other_weights(block):
    block.conv1.weight = nn.Parameter(block.conv1.weight * 2)


def other_modulation(block):
    block.adaLN_modulation = nn.Linear(C, 6 * C)


def hooked_modulation(block):
    block.adaLN_modulation.register_forward_hook(lambda m, args, out: out * 2)


def lora_modulation(block):
    head = block.adaLN_modulation
    head[1] = nn.Sequential(head[1], nn.Tanh())


CHANGES = [
    (lora, "conv4 is now a LoRAConv"),
    (hook, "conv1 has forward hooks"),
    (pre_hook, "ca has forward hooks"),
    (parametrize, "conv3 is now a ParametrizedConv2d"),
    (dilated, "conv2.padding is now (2, 2), and was (1, 1); conv2.dilation is now (2, 2), and was (1, 1)"),
    (other_pool, "ca.0 is now a AdaptiveMaxPool2d"),
    (own_forward, "conv5 has a forward of its own"),
    (assign, ""),
    (other_weights, ""),
    (other_modulation, ""),
    (hooked_modulation, ""),
    (lora_modulation, ""),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=lambda v: getattr(v, "__name__", None))
def test_changed_after_fuse(change, reason, compiled):
    """The fused module computes what the original would, with the same change made to it."""
    torch._dynamo.reset()
    plain = fill_(DiCoBlock(C)).eval()
    fused = dk.fuse(copy.deepcopy(plain))
    x, c = inputs()
    run = torch.compile(fused, backend="eager", fullgraph=True) if compiled else fused
    run(x, c)
    before = fused(x, c)
    for block in (plain, fused):
        torch.manual_seed(3)
        change(block)
    plain.eval(), fused.eval()
    with torch.no_grad():
        assert rel_rms(run(x, c), plain(x, c)) < 1e-5
        assert rel_rms(plain(x, c), before) > 1e-2
    verdict = dk.explain(fused).modules[0]
    assert verdict.fused is (reason == "")
    assert reason in verdict.reason
    dk.unfuse(fused)
    assert torch.equal(fused(x, c), plain(x, c))


def test_a_norms_eps_changed_after_fuse():
    block = fill_(Block(C))
    x, c = inputs()
    before = dk.fuse(block)(x * 1e-2, c)
    block.norm1.eps = 1e-3
    assert dk.explain(block).modules[0].reason == "norm1.eps is now 0.001, and was 1e-06"
    after = block(x * 1e-2, c)
    assert rel_rms(after, before) > 1e-3
    assert torch.equal(after, dk.unfuse(block)(x * 1e-2, c))


def test_a_setting_of_somebodys_own_layer_changed_after_fuse():
    """As a schedule of drop-path rates does."""

    class DropPath(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop_prob, self.calls = 0.0, []

        def forward(self, x):
            return x * (1 - self.drop_prob)

    class Dropping(Block):
        def __init__(self, c):
            super().__init__(c)
            self.drop_path = DropPath()

        def forward(self, x, c):
            return x + self.drop_path(super().forward(x, c) - x)

    block = fill_(dk.fuse(Dropping(C)))
    x, c = inputs()
    assert dk.explain(block).modules[0].fused
    for grad in (True, False):
        block.drop_path.drop_prob = 0.0
        with torch.set_grad_enabled(grad):
            before = block(x, c)
            block.drop_path.drop_prob = 1.0
            assert rel_rms(block(x, c), x) < 1e-6 < rel_rms(before, x)
    assert dk.explain(block).modules[0].reason == "drop_path.drop_prob is now 1.0, and was 0.0"


def test_labels_on_inner_layers_change_nothing():
    """As tools that name or count modules leave them, before fuse and after."""

    def label(model, prefix):
        for i, (name, m) in enumerate(model.named_modules()):
            m.layer_name, m.layer_index = prefix + name, i

    model = nn.Sequential(Unconditioned(C), Unconditioned(C))
    dk.fuse(model)
    label(model, "new.")
    assert [v.fused for v in dk.explain(model).modules] == [True, True]
    blocks = nn.Sequential(Unconditioned(C), Unconditioned(C))
    for name, m in blocks.named_modules():
        m.layer_name = name
    first, second = dk.fuse(blocks)
    assert type(first) is type(second)


@pytest.mark.parametrize("now", [torch.ones(C), [2], None])
def test_a_setting_that_is_no_number_any_more(now):
    block = Block(C)
    block.norm1.own = 1
    x, c = inputs()
    expected = fill_(block)(x, c)
    with torch.no_grad():
        dk.fuse(block)(x, c)
        block.norm1.own = now
        assert rel_rms(block(x, c), expected) < 1e-5
        assert dk.explain(block).modules[0].reason.startswith("norm1.own is now ")
        del block.norm1.own
        block.norm1.other = 1
        assert rel_rms(block(x, c), expected) < 1e-5
    assert dk.explain(block).modules[0].reason == "norm1.own is now gone, and was 1"


def test_a_forward_taken_before_unfuse():
    block = fill_(DiCoBlock(C))
    x, c = inputs()
    expected = block(x, c)
    forward = dk.fuse(block).forward
    dk.unfuse(block)
    assert torch.equal(forward(x, c), expected)


@pytest.mark.parametrize(("norm", "fits"), [(RMSNorm2d, False), (WideNorm, True), (BareNorm, True)])
def test_unconditioned_blocks_with_other_norms(norm, fits):
    """None of them keeps its neighbours from being fused."""

    class Own(Unconditioned):
        def __init__(self):
            super().__init__(C)
            self.norm1, self.norm2 = norm(C), norm(C)

    model = fill_(nn.Sequential(Unconditioned(C), Own(), Unconditioned(C)))
    x = inputs()[0]
    before = model(x)
    with contextlib.nullcontext() if fits else pytest.warns(RuntimeWarning, match="left unfused: 1: "):
        dk.fuse(model)
    assert [isinstance(m, dk.nn._fused.Fused) for m in model] == [True, fits, True]
    assert rel_rms(model(x), before) < 1e-5


@pytest.mark.parametrize("make", [DiCoBlock, ReferenceFCDMBlock, lambda c: FinalLayer(c, 4)])
def test_one_image_under_many_conditions(make):
    module = fill_(make(C))
    x, c = inputs()
    x, c = x[:1], torch.randn(3, C)
    expected = module(x, c)
    assert rel_rms(dk.fuse(module)(x, c), expected) < 1e-5


def test_other_dtypes_after_fuse():
    x, c = inputs()
    for make in (DiCoBlock, ReferenceFCDMBlock):
        plain = fill_(make(C))
        fused = dk.fuse(copy.deepcopy(plain))
        truth = copy.deepcopy(plain).double()
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            eager = copy.deepcopy(plain).to(dtype)(x.to(dtype), c.to(dtype))
            fused.float().load_state_dict(plain.state_dict())
            ours = fused.to(dtype)(x.to(dtype), c.to(dtype))
            exact = truth(x.double(), c.double())
            assert ours.dtype == dtype
            assert rel_rms(ours, exact) <= 2 * rel_rms(eager, exact) + torch.finfo(dtype).eps


def test_a_modulation_in_another_dtype_promotes_as_it_did():
    plain = fill_(DiCoBlock(C))
    plain.adaLN_modulation.bfloat16()
    x, c = inputs()
    expected = plain(x, c.bfloat16())
    actual = dk.fuse(plain)(x, c.bfloat16())
    assert actual.dtype == expected.dtype == torch.float32
    # eager rounds 1 + scale to bfloat16 first
    assert rel_rms(actual, expected) < torch.finfo(torch.bfloat16).eps / 2
