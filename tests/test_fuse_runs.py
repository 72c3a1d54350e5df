"""Fused models under everything people wrap around a model: compile, autocast, checkpointing, DDP, FSDP2."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from foreign import Block, FCDMBlock
from support import rel_rms, run_python, saved_bytes
from test_fuse import MODELS, assert_within_budget, fused_modules, hard, results
from torch import nn
from torch.utils.checkpoint import checkpoint

import dico_kernels as dk
from dico_kernels.reference.weights import fill_, named_input

NAMES = ["DiCo", "FCDM", "published DiCo", "published FCDM", "codec"]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "eager") for name in NAMES), ("DiCo", "aot_eager"), ("FCDM", "aot_eager")]
)
def test_compiles_in_one_graph(name, backend):
    model, inputs = hard(name)
    dk.fuse(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    expected = results(model, inputs)
    actual = {k.removeprefix("_orig_mod."): v for k, v in results(compiled, inputs).items()}
    for key, value in expected.items():
        if value.norm() > 1e-9:
            assert rel_rms(actual[key], value) < 1e-5, key
    other = (named_input((5, 4, 12, 16)).requires_grad_(), torch.arange(5) * 100, torch.arange(5))[: len(inputs)]
    with torch._dynamo.config.patch(error_on_recompile=True):  # another batch and resolution, the same graph
        assert rel_rms(compiled(*other), model(*other)) < 1e-5


def test_blocks_compiled_one_by_one():
    """Regional compilation: unlike blocks must not eat each other's recompilation limit."""
    classes = [type("Own", (Block,), {}) for _ in range(torch._dynamo.config.recompile_limit + 1)]
    blocks = [fill_(dk.fuse(own(16))) for own in classes]
    for block in blocks:
        c = block.conv1.in_channels
        x, cond = torch.randn(2, c, 4, 6), torch.randn(2, c)
        expected = block(x, cond)
        block.compile(backend="eager", fullgraph=True)
        assert rel_rms(block(x, cond), expected) < 1e-6


def test_fuse_inside_a_compiled_model():
    model, inputs = hard("DiCo")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(*inputs)
        dk.fuse(compiled)
        assert fused_modules(compiled)
        after = compiled(*inputs)
    assert rel_rms(after, before) < 1e-5
    assert not torch.equal(after, before)


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    model, inputs = hard(name)
    truth = results(copy.deepcopy(model).double(), (inputs[0].double(), *inputs[1:]))
    with torch.autocast("cpu", torch.bfloat16):
        eager = results(model, inputs)
        dk.fuse(model)
        fused = results(model, inputs)
    assert fused["output"].dtype == eager["output"].dtype
    assert_within_budget(fused, eager, truth, 3 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args):
            return checkpoint(self.block, *args, use_reentrant=reentrant)

    model, inputs = hard("DiCo")
    expected = results(dk.fuse(copy.deepcopy(model)), inputs)
    for name in ("encoder_level_2", "latent"):
        stage = getattr(model, name)
        for i, block in enumerate(stage):
            stage[i] = Checkpointed(block)
    dk.fuse(model)
    assert len(fused_modules(model)) == 8
    actual = results(model, inputs)
    for key, value in actual.items():
        assert rel_rms(value, expected[key.replace(".block.", ".")]) < 1e-5, key


@pytest.mark.parametrize("name", [name for name in NAMES if name != "published FCDM"])  # that checkpoints its blocks
class TestRecompute:
    def test_less_is_kept_and_nothing_else_changes(self, name):
        model, inputs = hard(name)
        eager = copy.deepcopy(model)
        expected = results(dk.fuse(model), inputs)
        usual = bytes_kept(model, inputs)
        assert dk.fuse(model, recompute=True) is model
        for key, value in results(model, inputs).items():
            assert rel_rms(value, expected[key]) < 1e-5 or expected[key].norm() < 1e-9, key
        less = bytes_kept(model, inputs)
        assert less < usual < 0.5 * bytes_kept(eager, inputs)
        assert bytes_kept(dk.fuse(eager, recompute=True), inputs) == less  # at once, or later
        assert bytes_kept(dk.fuse(model), inputs) == usual

    def test_it_goes_with_copies_and_ends_with_unfuse(self, name):
        model, inputs = hard(name)
        attributes = [set(m.__dict__) for m in model.modules()]
        dk.fuse(model, recompute=True)
        less = bytes_kept(model, inputs)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert bytes_kept(twin, inputs) == less
        assert "fused, recomputing" in str(dk.explain(model))
        dk.unfuse(model)
        assert [set(m.__dict__) for m in model.modules()] == attributes
        assert "recomputing" not in str(dk.explain(dk.fuse(model)))


def bytes_kept(model, inputs):
    return saved_bytes(model, inputs, model.parameters())


def test_recompute_compiles_in_one_graph():
    model, inputs = hard("DiCo")
    compiled = torch.compile(dk.fuse(model, recompute=True), backend="aot_eager", fullgraph=True)
    expected = results(model, inputs)
    for key, value in results(compiled, inputs).items():
        assert rel_rms(value, expected[key.removeprefix("_orig_mod.")]) < 1e-5 or value.norm() < 1e-9, key


class CheckpointsItself(Block):
    def forward(self, hidden, cond):
        if self.training:
            return checkpoint(super().forward, hidden, cond, use_reentrant=False)
        return super().forward(hidden, cond)


def test_a_forward_that_checkpoints_itself():
    """Fused it keeps no more than it did."""
    block = fill_(CheckpointsItself(16)).train()
    x, c = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 16)
    expected, own = results(block, (x, c)), bytes_kept(block, (x, c))
    plain = bytes_kept(dk.fuse(fill_(Block(16))), (x, c))
    dk.fuse(nn.ModuleList([block, CheckpointsItself(32)]))
    assert "fused, checkpointing" in str(dk.explain(block))
    assert bytes_kept(block, (x, c)) <= own < plain
    for key, value in results(block, (x, c)).items():
        assert rel_rms(value, expected[key]) < 1e-5, key
    twin = pickle.loads(pickle.dumps(block))
    assert bytes_kept(twin, (x, c)) <= own
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert rel_rms(compiled(x, c), expected["output"]) < 1e-5
    assert own < bytes_kept(dk.fuse(twin, recompute=True), (x, c)) < plain
    assert "fused, recomputing " in str(dk.explain(twin))
    assert bytes_kept(block.eval(), (x, c)) == plain


def test_what_keeps_little_does_not_checkpoint():
    class Frugal(nn.Module):
        """GRN in a form that keeps its input and vectors."""

        def __init__(self):
            super().__init__()
            self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 1, 16)) for _ in range(2))

        def forward(self, x):
            size = x.norm(p=2, dim=(1, 2), keepdim=True)
            return x * (1 + self.gamma * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.beta

    Frugal.__name__ = "GRN"
    for module in (Frugal(), Block(16), FCDMBlock(16)):
        verdict = dk.explain(dk.fuse(module)).modules[0]
        assert verdict.fused
        assert not verdict.checkpoints


def test_modules_of_our_own_recompute():
    block = fill_(dk.nn.FCDMBlock(16))
    x, c = torch.randn(2, 16, 8, 8, requires_grad=True), torch.randn(2, 16)
    usual = bytes_kept(block, (x, c))
    assert bytes_kept(dk.fuse(block, recompute=True), (x, c)) < usual
    assert bytes_kept(dk.unfuse(block), (x, c)) == usual


def test_second_derivatives_are_refused():
    """And never silently wrong: a gradient penalty must not come out as zero."""
    model, inputs = hard("DiCo")
    x = inputs[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dk.fuse(model)(x, *inputs[1:]).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        gradient.square().sum().backward()


WORKER = Path(__file__).parent / "fuse_worker.py"


SHARDED = ["ddp-then-fuse", "fsdp-inner", "fsdp-then-fuse", "fsdp-then-unfuse", "dtensor-then-fuse"]


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *((name, mode) for name in ("DiCo", "published FCDM") for mode in ("ddp", "fsdp")),
        *(("DiCo", m) for m in SHARDED),
    ],
)
def test_two_processes(name, mode, tmp_path):
    """Sharded training of a fused model gives the gradients of one process with the whole batch."""
    done = run_python(str(WORKER), name, mode, str(tmp_path / "store"), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("as one process") == 2, done.stdout


def test_models_named_here_exist():
    assert set(NAMES) <= set(MODELS)
