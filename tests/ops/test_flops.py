"""FlopCounterMode counts a fused model as it counts the layers that it replaces."""

from __future__ import annotations

import pytest
import torch
from test_fuse import hard
from torch.utils.flop_counter import FlopCounterMode

import dico_kernels as dk
from dico_kernels.reference import functional as R


def count(model, inputs, train):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        y = model(*inputs)
        if train:
            y.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["DiCo", "FCDM", "published DiCo", "published FCDM"])
def test_a_fused_model_counts_like_its_layers(name):
    model, inputs = hard(name)
    plain = count(model.eval(), inputs, train=False)
    assert count(dk.fuse(model), inputs, train=False) == plain > 0


@pytest.mark.parametrize("name", ["cca_gate", "pointwise_depthwise_gelu", "pixel_shuffle_skip", "depthwise_adaln"])
def test_an_op_counts_like_its_formula(name):
    """Backward twice the forward. (PyTorch's own count of a depthwise convolution's is that of a dense one.)"""

    def given(*shape):
        return torch.randn(shape, requires_grad=True)

    arguments = {
        "cca_gate": (given(2, 4, 5, 6), given(4, 4, 1, 1), given(4)),
        "pointwise_depthwise_gelu": (given(2, 4, 5, 6), given(8, 4, 1, 1), given(8), given(8, 1, 3, 3), given(8)),
        "pixel_shuffle_skip": (given(2, 16, 3, 5), given(2, 6, 6, 10), given(8, 10, 1, 1), given(8)),
        "depthwise_adaln": (given(2, 4, 5, 6), given(4, 1, 7, 7), given(4), given(2, 4), given(2, 4)),
    }[name]
    forward = count(getattr(R, name), arguments, train=False)
    assert count(getattr(dk.ops, name), arguments, train=False) == forward > 0
    assert count(getattr(dk.ops, name), arguments, train=True) == 3 * forward
