"""Fifty fused training steps follow the reference's loss as closely as another memory layout of the reference does."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from support import PLACES
from torch.nn import functional as F

import dico_kernels as dk
from dico_kernels.reference.dico import DiCo
from dico_kernels.reference.fcdm import FCDM
from dico_kernels.reference.weights import fill_

STEPS = 50
MODELS = {"DiCo": DiCo, "FCDM": FCDM}
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 1e-4}


def losses(model, dtype, layout=torch.contiguous_format):
    """The loss of every step from the model's weights on; data by step, the same for all."""
    model = copy.deepcopy(model).train().to(memory_format=layout)
    place = next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    cast = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(place.type, dtype)
    found = []
    for _ in range(STEPS):
        x, noise = (torch.randn(2, 4, 16, 16, generator=generator) for _ in range(2))
        t, y = torch.randint(1000, (2,), generator=generator), torch.randint(10, (2,), generator=generator)
        with cast:
            out = model((x + noise).to(place).contiguous(memory_format=layout), t.to(place), y.to(place))
        loss = F.mse_loss(out.float(), noise.to(place))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return torch.tensor(found, dtype=torch.float64)


def deviations(name, dtype, change=lambda model: model, place="cpu"):
    """How far channels_last, and fused, stray from the reference: rms over the steps, relative to its loss."""
    torch.manual_seed(0)
    model = MODELS[name](
        in_channels=4, hidden_size=32, depth=(1, 1, 1, 1, 1), num_classes=10, learn_sigma=False, class_dropout_prob=0
    )
    fill_(model).to(place)
    truth = losses(model, dtype)
    spread = losses(model, dtype, torch.channels_last)
    fused = losses(change(dk.fuse(copy.deepcopy(model))), dtype)
    assert torch.isfinite(truth).all()
    return [float(((v - truth) / truth).square().mean().sqrt()) for v in (spread, fused)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", PLACES)
def test_fifty_steps_follow_eager(place, name, dtype):
    spread, fused = deviations(name, dtype, place=place)
    if place == "cpu":
        assert spread > 0
    # A GPU may run the same kernels for both layouts, whose distance then says nothing.
    assert fused <= 10 * max(spread, FLOORS[dtype] if place == "cuda" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_without_its_channel_attention_does_not(dtype, monkeypatch):
    """The test above would notice: the gate of one op set to a half."""
    from dico_kernels.ops import _recorded, block

    monkeypatch.setattr(_recorded, "_ENABLED", False)  # a recording would go on as before
    half = lambda sums, pixels, weight, bias: (sums / pixels, torch.full_like(sums, 0.5))  # noqa: E731
    monkeypatch.setattr(block, "attention_of", half)
    spread, fused = deviations("DiCo", dtype)
    assert fused > 10 * spread
