"""fuse: same numbers, same object, same keys; undone exactly."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from foreign import GRN, Block, Codec, PublishedDiCo, PublishedFCDM, Unconditioned
from support import assert_within_budget, rel_rms, results
from torch import nn

import dico_kernels as dk
from dico_kernels.reference import FCDM, DiCo, DiCoBlock, FCDMBlock
from dico_kernels.reference.weights import fill_, named_input

X, T, Y = named_input((3, 4, 8, 12)), torch.tensor([999, 500, 37]), torch.tensor([207, 1000, 0])
MODELS = {
    "DiCo": (lambda: DiCo(hidden_size=24, depth=[1, 2, 1, 1, 1]), (X, T, Y)),
    "FCDM": (lambda: FCDM(hidden_size=16, depth=[1, 1, 2, 1, 1]), (X, T, Y)),
    "published DiCo": (PublishedDiCo, (X, T, Y)),
    "published FCDM": (PublishedFCDM, (X, T, Y)),
    "codec": (Codec, (X,)),
    "wide codec": (lambda: Codec(384, 4, 1), (X,)),
}
# how many blocks and final layers each holds; ours are fused as a whole, too
COUNTS = {"DiCo": 8, "FCDM": 8, "published DiCo": 7, "published FCDM": 7, "codec": 4, "wide codec": 2}


def hard(name):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    return fill_(make()).eval(), inputs


def fused_modules(model):
    return [m for m in model.modules() if isinstance(m, dk.nn._fused.Fused)]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_gradient(name):
    model, inputs = hard(name)
    eager = results(model, inputs)
    exact = copy.deepcopy(model).double()
    truth = results(exact, (inputs[0].double(), *inputs[1:]))
    assert dk.fuse(model) is model
    assert len(fused_modules(model)) == COUNTS[name]
    with dk.backend("auto"):
        ours = results(model, inputs)
    assert_within_budget(ours, eager, truth)
    assert not torch.equal(ours["output"], eager["output"])  # other code ran
    assert_within_budget(results(dk.fuse(exact), (inputs[0].double(), *inputs[1:])), truth, truth, 1e-12)


@pytest.mark.parametrize("name", ["DiCo-S", "FCDM-S"])
def test_a_published_size(name):
    model = fill_(dk.create_model(name, fused=False)).eval()
    x = named_input((1, 4, 16, 16))
    eager = results(model, (x, T[:1], Y[:1]))
    truth = results(copy.deepcopy(model).double(), (x.double(), T[:1], Y[:1]))
    fused = fill_(dk.create_model(name)).eval()
    assert len(fused_modules(fused)) == 2 + sum(len(getattr(model, s)) for s in STAGES)
    assert_within_budget(results(fused, (x, T[:1], Y[:1])), eager, truth)


STAGES = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")


@pytest.mark.parametrize("name", MODELS)
class TestNothingElseChanges:
    def test_state(self, name):
        model, _ = hard(name)
        keys = {k: v.clone() for k, v in model.state_dict().items()}
        parameters, modules = list(model.parameters()), list(model.modules())
        attributes = [set(m.__dict__) for m in modules]
        dk.fuse(model)
        assert list(model.state_dict()) == list(keys)
        assert all(torch.equal(v, keys[k]) for k, v in model.state_dict().items())
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
        assert [set(m.__dict__) for m in model.modules()] == attributes

    def test_unfuse(self, name):
        model, inputs = hard(name)
        classes = [type(m) for m in model.modules()]
        before = model(*inputs)
        dk.fuse(model)
        assert [type(m) for m in model.modules()] != classes
        assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
        assert dk.unfuse(model) is model
        assert [type(m) for m in model.modules()] == classes
        assert torch.equal(model(*inputs), before)

    def test_twice_is_once(self, name):
        model, _ = hard(name)
        classes = [type(m) for m in dk.fuse(model).modules()]
        assert [type(m) for m in dk.fuse(model).modules()] == classes

    def test_copies(self, name):
        model, inputs = hard(name)
        dk.fuse(model)
        before = model(*inputs)
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        copies = [
            copy.deepcopy(model),
            *(pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, 5)),
            torch.load(saved, weights_only=False),
        ]
        for other in copies:
            assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
            assert torch.equal(other(*inputs), before)
            assert not any(a is b for a, b in zip(other.parameters(), model.parameters(), strict=True))
            dk.unfuse(other)
            assert len(fused_modules(other)) == 0
        assert len(fused_modules(model)) == COUNTS[name]

    def test_no_class_is_patched(self, name):
        model, inputs = hard(name)
        other, _ = hard(name)
        before = other(*inputs)
        dk.fuse(model)
        assert torch.equal(other(*inputs), before)
        assert not fused_modules(other)


def test_the_random_state_stays():
    class Dropping(Block):  # of its own, so that no proof is remembered
        pass

    block = Dropping(16, dropout=0.5)
    before = torch.get_rng_state()
    with pytest.warns(RuntimeWarning):
        dk.fuse(block)
    assert torch.equal(torch.get_rng_state(), before)


def test_ways_up_are_one_op_each():
    for name in ("DiCo", "FCDM"):
        model, inputs = hard(name)
        rows = dk.explain(dk.fuse(model), *inputs)
        assert [r.module for r in rows if r.choice.entry == "pixel_shuffle_skip"] == ["", ""]


@pytest.mark.parametrize("what", ["hook", "replaced", "pool"])
def test_a_way_up_that_changed_is_called(what):
    plain, inputs = hard("DiCo")
    fused = dk.fuse(copy.deepcopy(plain))
    before = fused(*inputs)
    for model in (plain, fused):
        if what == "hook":
            model.reduce_chan_level2.register_forward_hook(lambda m, args, out: out * 2)
        elif what == "replaced":
            model.reduce_chan_level1 = nn.Sequential(model.reduce_chan_level1, nn.Tanh())
        else:
            model.up3_2.body[1].register_forward_hook(lambda m, args, out: out * 2)
    assert rel_rms(fused(*inputs), plain(*inputs)) < 1e-5
    assert rel_rms(fused(*inputs), before) > 1e-2


def test_a_subclass_of_a_model_keeps_its_forward():
    class Doubled(DiCo):
        def forward(self, x, t, y):
            return 2 * super().forward(x, t, y)

    model = fill_(Doubled(hidden_size=16, depth=[1] * 5)).eval()
    expected = model(X, T, Y)
    dk.fuse(model)
    assert type(model) is Doubled
    assert rel_rms(model(X, T, Y), expected) < 1e-5


def test_channels_last_all_the_way():
    model, inputs = hard("FCDM")
    seen = []
    for m in model.modules():
        if type(m) is FCDMBlock:
            m.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    dk.fuse(model)(*inputs)
    assert len(seen) == 6
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


def test_an_optimizer_goes_on():
    def train(fuse_after):
        model, inputs = hard("DiCo")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for step in range(4):
            if step == fuse_after:
                dk.fuse(model)
            optimizer.zero_grad()
            model(*inputs).square().mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert rel_rms(train(2), train(None)) < 1e-4
    assert rel_rms(train(0), train(None)) < 1e-4


def test_checkpoints_load_either_way():
    model, inputs = hard("DiCo")
    state = dk.fuse(model).state_dict()
    plain = MODELS["DiCo"][0]()
    plain.load_state_dict(state)
    assert rel_rms(plain.eval()(*inputs), model(*inputs)) < 1e-5
    fused = dk.fuse(MODELS["DiCo"][0]()).eval()
    fused.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    assert torch.equal(fused(*inputs), model(*inputs))


def test_ema_copy_after_fuse_follows():
    model, inputs = hard("FCDM")
    ema = copy.deepcopy(dk.fuse(model))
    with torch.no_grad():
        for mine, theirs in zip(ema.parameters(), model.parameters(), strict=True):
            theirs.mul_(0.9)
            mine.lerp_(theirs, 1.0)
    assert torch.equal(ema(*inputs), model(*inputs))


def test_on_meta_then_materialised():
    with torch.device("meta"):
        model = dk.fuse(MODELS["DiCo"][0]())
    assert len(fused_modules(model)) == COUNTS["DiCo"]
    plain, inputs = hard("DiCo")
    model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    assert rel_rms(model.eval()(*inputs), plain(*inputs)) < 1e-5


@pytest.mark.parametrize(
    "surroundings", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_the_callers_modes_do_not_matter(surroundings):
    class Fresh(Block):  # a class of its own, so that no proof is remembered
        pass

    block = Fresh(16)
    with surroundings():
        dk.fuse(block)
    assert fused_modules(block)


@pytest.mark.parametrize("name", ["DiCo", "published FCDM", "codec"])
def test_hooks_on_blocks_fire(name):
    model, inputs = hard(name)
    calls = []
    blocks = [m for m in model.modules() if isinstance(m, (DiCoBlock, Block, FCDMBlock)) or "Block" in type(m).__name__]
    assert blocks
    for block in blocks:
        block.register_forward_pre_hook(lambda m, args: calls.append("before"))
        block.register_forward_hook(lambda m, args, out: calls.append("after"))
        block.register_full_backward_hook(lambda m, gi, go: calls.append("backward"))
    dk.fuse(model)
    assert all(isinstance(b, dk.nn._fused.Fused) for b in blocks)
    model(*inputs).sum().backward()
    for event in ("before", "after", "backward"):
        assert calls.count(event) >= len(blocks)


def test_arguments_by_name():
    block = fill_(Block(16))
    x, c = torch.randn(2, 16, 4, 6), torch.randn(2, 16)
    expected = dk.fuse(block)(x, c)
    assert torch.equal(block(x, cond=c), expected)
    assert torch.equal(block(cond=c, hidden=x), expected)
    with pytest.raises(TypeError, match="temperature"):
        block(x, c, temperature=1)


def test_arguments_the_fused_form_does_not_know():
    class Optional(Block):
        def forward(self, x, c, strength=1.0):
            return x + strength * (super().forward(x, c) - x)

    block = fill_(Optional(16))
    x, c = torch.randn(2, 16, 4, 6), torch.randn(2, 16)
    expected = block(x, c), block(x, c, 0.5), block(x, c, strength=0.0)
    dk.fuse(block)
    assert fused_modules(block)
    assert rel_rms(block(x, c), expected[0]) < 1e-5
    assert rel_rms(block(x, c, 0.5), expected[1]) < 1e-5
    assert torch.equal(block(x, c, strength=0.0), expected[2])


@pytest.mark.parametrize("layout", ["fcdm", "convnext", "timm"])
def test_grn_by_itself(layout):
    norm = GRN(10, layout)
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    x = torch.randn((2, 10, 5, 6) if layout == "fcdm" else (2, 5, 6, 10))
    model = nn.Sequential(nn.Identity(), norm)
    eager = results(model, (x,))
    truth = results(copy.deepcopy(model).double(), (x.double(),))
    dk.fuse(model)
    assert fused_modules(model) == [norm]
    assert_within_budget(results(model, (x,)), eager, truth)


def test_a_broadcast_condition():
    block = fill_(Block(16))
    x, c = torch.randn(3, 16, 4, 6), torch.randn(1, 16)
    expected = results(block, (x, c))
    actual = results(dk.fuse(block), (x, c))
    for key, value in expected.items():
        assert rel_rms(actual[key], value) < 1e-5, key


def test_small_affine_weights_keep_their_digits():
    """An affine LayerNorm written as a scale of weight - 1 would lose them, in bf16 all of them."""
    block = fill_(Unconditioned(16))
    with torch.no_grad():
        for norm in (block.norm1, block.norm2):
            norm.weight.mul_(1e-3)
            norm.bias.mul_(1e-3)
    block.conv1.bias.data.zero_()
    x = torch.randn(2, 16, 4, 6)
    truth = copy.deepcopy(block).double()(x.double()) - x
    half, low = copy.deepcopy(block).bfloat16(), x.bfloat16()
    truth = copy.deepcopy(half).double()(low.double())
    eager = rel_rms(half(low), truth)
    assert rel_rms(dk.fuse(half)(low), truth) <= 2 * eager + torch.finfo(torch.bfloat16).eps


def test_what_is_not_a_module_is_named():
    for function in (dk.fuse, dk.unfuse):
        with pytest.raises(TypeError, match=r"model is a dict: expected an nn\.Module"):
            function({})
