"""Loads and stores of 16-bit elements on every instruction set: all values there are, and how they are rounded."""

from __future__ import annotations

import pytest
import torch

from dico_kernels import native

# Exact, to subnormal numbers, beyond the largest; half a step more than a value: to the even one; and just off that.
FACTORS = [1.0, -1.0, 2.0**-8, 2.0**-14, 1.5 * 2.0**-14, 2.0**12, 1.5, 1.25, 1.5 + 2.0**-23, 1.5 - 2.0**-23]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_is_read_and_rounded_as_by_torch(isa, dtype):
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    x = values.repeat(len(FACTORS), 1).reshape(len(FACTORS), -1, 1, 16).permute(0, 3, 1, 2)
    factors = torch.tensor(FACTORS)[:, None].repeat(1, 16)
    y = native.channel_affine(x, factors)
    expected = (x.float() * factors[..., None, None]).to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    if dtype == torch.bfloat16:  # processors with instructions for it take subnormal ones for zero
        numbers &= (expected == 0) | (expected.abs() >= torch.finfo(dtype).tiny)
    assert torch.equal(y[numbers].view(torch.int16), expected[numbers].view(torch.int16))
