"""DiCo's block without conditioning: its affine norms join the weights behind them, and no change goes unseen."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import Unconditioned
from support import rel_rms

import dico_kernels as dk
from dico_kernels import native
from dico_kernels._recording import Recording
from dico_kernels.nn import _state
from dico_kernels.nn import block as block_module
from dico_kernels.ops import _recorded
from dico_kernels.reference.weights import fill_

if not (native.available() and native.multiplies(torch.empty(0))):
    pytest.skip("recordings need a CPU whose products are ours (AVX-512)", allow_module_level=True)


def plain(dtype=torch.float32):
    torch.manual_seed(0)
    return dk.fuse(fill_(Unconditioned(16)).to(dtype).eval())


def given(dtype=torch.float32):
    return torch.randn(2, 16, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)


def recorded(module):
    state = _state._STATES.get(module)
    return state is not None and any(isinstance(kind, Recording) for kind in state.epoch.kinds.values())


def unrecorded(module, x):
    """What it makes of the same without recordings."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(_recorded, "_ENABLED", False)
        return module(x)


def unfused(module, x):
    """What the layers make of it, called one by one; unpacked."""
    with torch.no_grad():
        return dk.unfuse(dk.unpack(copy.deepcopy(module)))(x)


@pytest.mark.parametrize("packed", [False, True], ids=["fused", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_affine_norms_join_the_weights(context, dtype, packed, monkeypatch):
    """Once for packed weights, which must not change unseen; for others at each call."""
    if not native.multiplies(torch.empty(0, dtype=dtype)):
        pytest.skip("this CPU's bfloat16 products are not ours")
    module, x = plain(dtype), given(dtype)
    if packed:
        dk.pack(module)
    calls, fold = [], block_module._behind_affine
    monkeypatch.setattr(block_module, "_behind_affine", lambda *args: (calls.append(args), fold(*args))[1])
    with context():
        for _ in range(4):
            out = module(x)
        assert len(calls) == (2 if packed else 8)  # a norm each
        assert recorded(module)
        assert torch.equal(out, unrecorded(module, x))
        for changed in (module.norm1.weight, module.norm2.bias, module.conv4.weight):
            changed.mul_(2)
            before = out
            for _ in range(3):
                out = module(x)
                assert torch.equal(out, unrecorded(module, x))
                assert not torch.equal(out, before)


def by_data(module, parameter):
    parameter.data.copy_(parameter.data * 1.5)


def by_numpy(module, parameter):
    parameter.detach().numpy()[...] *= 1.5


def by_fused_optimizer(module, parameter):
    before = parameter._version
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.5, fused=True).step()
    assert parameter._version == before  # so nothing else tells


def by_fused_optimizer_of_all(module, parameter):
    for p in module.parameters():
        p.grad = torch.ones_like(p) * 0.1
    torch.optim.AdamW(module.parameters(), lr=0.1, fused=True).step()


def is_seen(change, module, name):
    """A recorded module gives what its layers give of the changed weights."""
    x = given()
    with torch.no_grad():
        for _ in range(3):
            before = module(x)
    assert recorded(module)
    change(module, module.get_parameter(name))
    with torch.no_grad():
        for _ in range(3):
            after = module(x)
            assert rel_rms(after, unfused(module, x)) < 2e-6
            assert rel_rms(after, before) > 1e-4


@pytest.mark.parametrize(
    "name", ["norm1.weight", "norm2.bias", "conv1.weight", "conv1.bias", "conv4.weight", "conv5.bias"]
)
@pytest.mark.parametrize("change", [by_data, by_numpy, by_fused_optimizer, by_fused_optimizer_of_all])
def test_what_pytorch_does_not_count_is_seen_unpacked(change, name):
    is_seen(change, plain(), name)


@pytest.mark.parametrize("name", ["norm1.weight", "conv3.weight", "conv5.weight"])
@pytest.mark.parametrize("change", [by_fused_optimizer, by_fused_optimizer_of_all])
def test_optimizers_that_count_no_change_are_seen_packed(change, name):
    is_seen(change, dk.pack(plain()), name)


def test_affine_norms_get_their_gradients():
    module, x = plain(), given()
    with torch.no_grad():
        for _ in range(3):
            module(x)
    module(x).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in module.parameters())
