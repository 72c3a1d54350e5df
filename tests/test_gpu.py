"""The public functions on models that are on a GPU: what the CPU's tests of them cannot show."""

from __future__ import annotations

import copy

import pytest
import torch
from support import EPS, assert_within_budget, results

import dico_kernels as dk
from dico_kernels import tuning
from dico_kernels.reference import FCDM, DiCo
from dico_kernels.reference.weights import fill_, named_input

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INPUTS = named_input((3, 4, 8, 12)), torch.tensor([999, 500, 37]), torch.tensor([207, 1000, 0])
BRANCHES = {DiCo: {"conv_half", "ffn_half"}, FCDM: {"fcdm_block"}}


@pytest.fixture(params=BRANCHES, ids=lambda kind: kind.__name__)
def model(request):
    torch.manual_seed(0)
    return fill_(request.param(hidden_size=24, depth=[1, 2, 1, 1, 1])).eval().cuda()


@pytest.fixture
def inputs():
    return [v.cuda() for v in INPUTS]


def test_fused_within_the_error_budget(model, inputs):
    truth = results(copy.deepcopy(model).double(), [inputs[0].double(), *inputs[1:]])
    eager = results(model, inputs)
    fused = results(dk.fuse(model), inputs)
    assert all(v.is_cuda for v in fused.values())
    # Weights' gradients are sums over pixels and samples, in an order of their own.
    assert_within_budget(fused, eager, truth, band=32 * EPS)


def test_a_training_step_under_autocast(model, inputs):
    def step(model):
        with torch.autocast("cuda", torch.bfloat16):
            return results(model, inputs)

    truth = results(copy.deepcopy(model).double(), [inputs[0].double(), *inputs[1:]])
    eager = step(model)
    assert_within_budget(step(dk.fuse(model)), eager, truth, band=4 * torch.finfo(torch.bfloat16).eps)


def test_explain_says_triton(model, inputs):
    rows = dk.explain(dk.fuse(model), *inputs)
    assert {row.choice.backend for row in rows} == {"triton"}, str(rows)
    assert all(verdict.fused for verdict in rows.modules)


def test_tuned(model, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, str(tmp_path / "tuning.json"))
    dk.fuse(model)
    try:
        with torch.inference_mode():
            before = model(*inputs)
            rows = dk.tune(model, *inputs)
            after = model(*inputs)
    finally:
        dk.untune()
    assert {row.case.branch for row in rows} == next(v for k, v in BRANCHES.items() if isinstance(model, k))
    assert all(set(row.ms) == {"library", "mixed", "fused"} for row in rows), str(rows)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("products", ["library", "mixed", "fused"])
def test_whoever_multiplies(model, inputs, products):
    model = dk.fuse(model).bfloat16()
    x = inputs[0].bfloat16()
    truth = copy.deepcopy(model).double()(x.double(), *inputs[1:])
    eager = dk.unfuse(copy.deepcopy(model))(x, *inputs[1:])
    with dk.backend("triton", strict=True, products=products), torch.inference_mode():
        found = model(x, *inputs[1:])
    assert_within_budget({"y": found}, {"y": eager}, {"y": truth}, band=4 * torch.finfo(torch.bfloat16).eps)


def test_compiled_whole(model, inputs):
    dk.fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
