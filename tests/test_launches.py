"""How many kernels a block's training step starts on a GPU: a step of a small batch takes as long as its launches.

Counted without one: Triton's launches are collected and not made, PyTorch's are what its profiler sees.
"""

from __future__ import annotations

import pytest
import torch
from support import DEVICE
from torch.profiler import ProfilerActivity, profile

import dico_kernels as dk
from dico_kernels._linear import onednn_multiplies
from dico_kernels.kernels.common import record

# What PyTorch starts a kernel for, of what these blocks call.
ATEN = {
    f"aten::{name}"
    for name in (
        *("add", "add_", "addmm", "bmm", "cat", "copy_", "div", "div_", "fill_", "gelu", "mean", "mkldnn_linear", "mm"),
        *("mul", "mul_", "mv", "neg", "reciprocal", "rsub", "sigmoid", "silu", "silu_backward", "sqrt", "square"),
        *("sub", "sum", "where", "zero_"),
    )
}


def launches(call):
    """(what call returns, Triton's launches, PyTorch's)."""
    with record(90) as made, profile(activities=[ProfilerActivity.CPU]) as seen:
        result = call()

    def inside_another(event):
        parent = event.cpu_parent
        return parent is not None and (parent.name in ATEN or inside_another(parent))

    return result, len(made), sum(e.name in ATEN and not inside_another(e) for e in seen.events())


# DiCo's ten of Triton's in forward: adaLN, depthwise, sums in parts and added up, attention, scale, gate; adaLN, GELU,
# gate. Of PyTorch's, products that oneDNN makes on a CPU, which has none in bfloat16 for AVX2, are not seen:
# `products`, in forward and backward.
@pytest.mark.parametrize(
    ("block", "forward", "backward", "products"),
    [(dk.nn.DiCoBlock, (10, 3), (17, 14), (4, 6)), (dk.nn.FCDMBlock, (6, 4), (14, 12), (2, 3))],
)
def test_launches_of_a_training_step(block, forward, backward, products):
    if DEVICE == "cuda" or not onednn_multiplies(torch.empty(0, dtype=torch.bfloat16)):
        forward, backward = ((t, p + seen) for (t, p), seen in zip((forward, backward), products, strict=True))
    torch.manual_seed(0)
    module = block(64).bfloat16().to(DEVICE)
    x = torch.randn(8, 64, 16, 16).bfloat16().to(DEVICE, memory_format=torch.channels_last).requires_grad_()
    c = torch.randn(8, 64).bfloat16().to(DEVICE).requires_grad_()
    with dk.backend("triton", strict=True, products="library"):
        out, *counted = launches(lambda: module(x, c))
        assert all(n <= most for n, most in zip(counted, forward, strict=True)), counted
        dy = torch.randn_like(out)
        _, *counted = launches(lambda: out.backward(dy))
        assert all(n <= most for n, most in zip(counted, backward, strict=True)), counted
