"""pack: packed weights are used where they may be, never stale, and nothing else notices them."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from support import rel_rms
from test_fuse import hard

import dico_kernels as dk
from dico_kernels import _linear
from dico_kernels.ops import pointwise

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
pytestmark = needs_onednn
NAMES = ["DiCo", "FCDM", "published DiCo"]


@pytest.fixture
def used(monkeypatch):
    """used(call): the call's result, and of how many products in it the weight was packed, and of how many not."""
    found: list[bool] = []

    def spy(weight):
        kept = _linear.packed(weight)
        found.append(kept is not None)
        return kept

    monkeypatch.setattr(pointwise, "packed", spy)

    def run(call):
        found.clear()
        return call(), found.count(True), found.count(False)

    return run


def fused(name, dtype=torch.float32):
    model, inputs = hard(name)
    model, inputs = model.to(dtype), tuple(v.to(dtype) if v.is_floating_point() else v for v in inputs)
    return dk.fuse(model).eval(), inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_same_results(name, dtype, used):
    model, inputs = fused(name, dtype)
    for context in (torch.no_grad, torch.inference_mode):
        dk.unpack(model)
        with context():
            plain, packed, unpacked = used(lambda: model(*inputs))
            assert packed == 0
            assert dk.pack(model) is model
            again, packed, left = used(lambda: model(*inputs))
        assert (packed, left) == (unpacked, 0)
        assert rel_rms(again, plain) <= (1e-6 if dtype == torch.float32 else 4e-3)


def test_gradients_and_copies_see_the_originals(used):
    model, inputs = fused("DiCo")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dk.pack(model)
    assert used(lambda: model(*inputs).sum().backward())[1:] == (0, 0)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert used(lambda: twin(*inputs))[1] == 0


def _step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def _replace(model):
    for m in model.modules():
        for key, p in list(m._parameters.items()):
            if p is not None:
                m._parameters[key] = torch.nn.Parameter(p.detach() * 1.01)


CHANGES = {
    "optimiser": _step,
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.01 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v * 1.01 for k, v in m.state_dict().items()}, assign=True),
    "to": lambda m: m.bfloat16().float(),
    "new parameters": _replace,
    "no_grad": lambda m: [p.mul_(1.01) for p in m.parameters()],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_never_stale(change, used):
    model, inputs = fused("DiCo")
    dk.pack(model)
    with torch.no_grad():
        model(*inputs)
        with torch.enable_grad() if change == "optimiser" else torch.no_grad():
            CHANGES[change](model)
        result, packed, _ = used(lambda: model(*inputs))
        assert packed == 0
        assert rel_rms(result, dk.unfuse(copy.deepcopy(model))(*inputs)) < 1e-5
        dk.pack(model)
        again, packed, left = used(lambda: model(*inputs))
    assert packed
    assert not left
    assert rel_rms(again, result) < 1e-6


def test_without_onednn_the_originals_run(used):
    model, inputs = fused("FCDM")
    dk.pack(model)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert used(lambda: model(*inputs))[1] == 0


def test_under_autocast_the_cast_weights_run(used):
    model, inputs = fused("DiCo")
    dk.pack(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert used(lambda: model(*inputs))[1] == 0


def test_memory_goes_with_the_model_and_with_unpack():
    gc.collect()
    before = len(_linear._PACKED)
    model, _ = fused("DiCo")
    dk.pack(model)
    assert len(_linear._PACKED) > before
    assert dk.unpack(model) is model
    assert len(_linear._PACKED) == before
    dk.pack(model)
    del model
    gc.collect()
    assert len(_linear._PACKED) == before


@pytest.mark.parametrize("why", ["not fused", "float64", "meta"])
def test_nothing_to_pack_is_said(why):
    model, _ = hard("DiCo")
    if why != "not fused":
        model = dk.fuse(model).to(**({"dtype": torch.float64} if why == "float64" else {"device": "meta"}))
    with pytest.warns(RuntimeWarning, match="nothing was packed: expected fused blocks"):
        dk.pack(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.unpack(model)
