"""Channel attention's gate on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from support import rel_rms

from dico_kernels import native
from dico_kernels.dtypes import accumulation_dtype

# images, channels: one of each, odd numbers of both, more than a group of either
CASES = [(1, 1), (2, 5), (3, 17), (4, 64), (5, 33), (9, 136)]


def inputs(case, dtype):
    n, c = case
    weight = (torch.randn(c, c, dtype=torch.float64) / c**0.5).to(dtype)
    return torch.randn(n, c).to(accumulation_dtype(dtype)) * 40, weight, torch.randn(c).to(dtype)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(isa, case, dtype, biased):
    sums, weight, bias = inputs(case, dtype)
    mean, attention = native.channel_attention(sums, 6, weight, bias if biased else None)
    exact = sums.double() / 6
    limit = 1e-14 if dtype == torch.float64 else 2e-7
    assert mean.dtype == attention.dtype == sums.dtype
    assert rel_rms(mean, exact) <= limit
    # In the accumulation dtype throughout: what a 16-bit weight is rounded to is all that its dtype costs.
    truth = torch.sigmoid(exact @ weight.double().t() + (bias.double() if biased else 0))
    assert rel_rms(attention, truth) <= 5 * limit


def test_saturates_and_keeps_nan(isa, dtype):
    logits = torch.tensor([[6e4, -6e4, 90.0, -90.0, float("inf"), -float("inf"), float("nan"), 0.0]], dtype=dtype)
    zeros = torch.zeros(1, 8, dtype=accumulation_dtype(dtype))
    _, attention = native.channel_attention(zeros, 1, torch.zeros(8, 8, dtype=dtype), logits[0])
    torch.testing.assert_close(attention, torch.sigmoid(logits.to(zeros.dtype)), equal_nan=True, rtol=0, atol=1e-30)


def test_same_bits_on_any_number_of_threads(isa, same_bits):
    sums, weight, bias = inputs((4, 136), torch.bfloat16)
    same_bits(lambda: native.channel_attention(sums, 9, weight, bias))


def test_bad_arguments_are_named():
    sums, weight, bias = inputs((2, 5), torch.bfloat16)
    for named, call in {
        "sums is": lambda: native.channel_attention(sums.double(), 4, weight, bias),
        "weight has shape": lambda: native.channel_attention(sums, 4, weight[:4], bias),
        "weight has dtype": lambda: native.channel_attention(sums, 4, weight.int(), bias),
        "bias has shape": lambda: native.channel_attention(sums, 4, weight, bias[:4]),
        "bias is": lambda: native.channel_attention(sums, 4, weight, bias.float()),
        "pixels=0": lambda: native.channel_attention(sums, 0, weight, bias),
    }.items():
        with pytest.raises(ValueError, match=named):
            call()
