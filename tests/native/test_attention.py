"""Channel attention's gate and the conditioning of blocks on every instruction set, against float64."""

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


@pytest.mark.parametrize("case", [c for c in CASES if c[0] <= 8] + [(8, 24), (6, 16)], ids=str)
def test_gradients_against_float64(isa, case, dtype):
    sums, weight, bias = inputs(case, dtype)
    mean, attention = native.channel_attention(sums, 6, weight, bias)
    dattention = torch.randn(case).to(sums.dtype)
    dsums, dweight, dbias = native.channel_attention_backward(dattention, attention, mean, 6, weight)
    leaves = [t.double().requires_grad_() for t in (sums, weight)]
    each = bias.double().expand(case).clone().requires_grad_()
    truth = torch.sigmoid(leaves[0] / 6 @ leaves[1].t() + each)
    exact = torch.autograd.grad(truth, [*leaves, each], dattention.double())
    limit = 1e-13 if dtype == torch.float64 else 2e-6
    assert (dsums.dtype, dweight.dtype, dbias.dtype) == (sums.dtype, dtype, sums.dtype)
    assert rel_rms(dsums, exact[0]) <= limit
    assert rel_rms(dweight, exact[1]) <= limit + (0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2)
    assert rel_rms(dbias, exact[2]) <= limit


def test_gradients_have_the_same_bits_on_any_number_of_threads(isa, same_bits):
    sums, weight, bias = inputs((4, 136), torch.bfloat16)
    mean, attention = native.channel_attention(sums, 9, weight, bias)
    same_bits(lambda: native.channel_attention_backward(sums, attention, mean, 9, weight))


def test_gradients_of_more_images_are_left_to_the_product():
    for n in (0, 9):
        sums, weight, bias = inputs((n, 5), torch.float32)
        mean, attention = native.channel_attention(sums, 9, weight, bias)
        assert native.channel_attention_backward(sums, attention, mean, 9, weight) is None


def test_bad_arguments_of_gradients_are_named():
    sums, weight, _ = inputs((2, 5), torch.bfloat16)
    for named, args in {
        "dattention has shape": (sums[:1], sums, sums, 4, weight),
        "dattention is": (sums.double(), sums, sums, 4, weight),
        "mean has shape": (sums, sums, sums[:, :4], 4, weight),
        "weight has shape": (sums, sums, sums, 4, weight[:4]),
        "weight has dtype": (sums, sums, sums, 4, weight.int()),
        "pixels=0": (sums, sums, sums, 0, weight),
    }.items():
        with pytest.raises(ValueError, match=named):
            native.channel_attention_backward(*args)


# heads, images, inputs, outputs: one of each, odd numbers of all, more than a block of outputs
HEADS = [(1, 1, 1, 1), (2, 3, 17, 5), (3, 8, 40, 100), (2, 4, 33, 64)]


@pytest.mark.parametrize("case", HEADS, ids=str)
def test_conditioning_against_float64(isa, case, dtype):
    heads, n, inputs, outputs = case
    c = torch.randn(n, inputs).to(dtype) * 3
    weights = [(torch.randn(outputs, inputs, dtype=torch.float64) / inputs**0.5).to(dtype) for _ in range(heads)]
    biases = [torch.randn(outputs).to(dtype) for _ in range(heads)]
    y = native.conditioning(c, weights, biases)
    # As the modules compute it: SiLU's output has c's dtype.
    activated = torch.nn.functional.silu(c.double()).to(dtype).double()
    truth = torch.stack([activated @ w.double().t() + b.double() for w, b in zip(weights, biases, strict=True)])
    assert (y.shape, y.dtype) == (truth.shape, dtype)
    limit = {torch.float64: 1e-14, torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert rel_rms(y, truth) <= limit


def test_conditioning_of_more_vectors_is_left_to_the_product():
    weight, bias = torch.randn(4, 3), torch.randn(4)
    assert native.conditioning(torch.randn(8, 3), [weight], [bias]) is not None
    assert native.conditioning(torch.randn(9, 3), [weight], [bias]) is None


def test_conditioning_has_the_same_bits_on_any_number_of_threads(isa, same_bits):
    c, weights, biases = torch.randn(4, 50), [torch.randn(150, 50) for _ in range(3)], [torch.randn(150)] * 3
    same_bits(lambda: native.conditioning(c, weights, biases))


def test_bad_arguments_of_conditioning_are_named():
    c, weight, bias = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    for named, args in {
        "c has dtype": (c.int(), [weight], [bias]),
        "c has shape": (torch.randn(3, 2).t(), [weight], [bias]),
        "weight has shape": (c, [weight, weight[:, :2]], [bias, bias]),
        "weight is": (c, [weight.double()], [bias]),
        "bias has shape": (c, [weight], [bias[:3]]),
        "bias is": (c, [weight], [bias.bfloat16()]),
    }.items():
        with pytest.raises(ValueError, match=named):
            native.conditioning(*args)
