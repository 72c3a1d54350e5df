"""Whole residual branches out of the fused products, against float64 of the reference."""

from __future__ import annotations

import math

import pytest
import torch

from dico_kernels.kernels import block
from dico_kernels.reference import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# batch, channels, H, W: odd everything; two samples in a tile of 128 rows
SHAPES = [(2, 24, 3, 5), (3, 24, 8, 8)]


@pytest.fixture(autouse=True)
def _exact_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def weight(random, dtype, n, k, size=1):
    """Unit gain."""
    return (random((n, k, size, size), torch.float64) / (math.sqrt(k) * size)).to(dtype).contiguous()


def conditioning(random, dtype, b, c):
    return [random((b, c), dtype) for _ in range(3)]


def conv_half(random, dtype, b, c, h, w, single=False):
    vectors = conditioning(random, dtype, 1 if single else b, c)
    # attention that moves: logits of a deviation of some 2
    ca = weight(random, dtype, c, c) * 2 * math.sqrt(h * w)
    return (
        random((b, c, h, w), dtype), *vectors, weight(random, dtype, c, c), random((c,), dtype),
        weight(random, dtype, c, 1, 3), random((c,), dtype), ca, random((c,), dtype),
        weight(random, dtype, c, c), random((c,), dtype),
    )  # fmt: skip


def ffn_half(random, dtype, b, c, h, w, single=False):
    vectors = conditioning(random, dtype, 1 if single else b, c)
    return (
        random((b, c, h, w), dtype), *vectors, weight(random, dtype, 3 * c, c), random((3 * c,), dtype),
        weight(random, dtype, c, 3 * c), random((c,), dtype),
    )  # fmt: skip


def fcdm(random, dtype, b, c, h, w, single=False):
    vectors = conditioning(random, dtype, 1 if single else b, c)
    return (
        random((b, c, h, w), dtype), *vectors, weight(random, dtype, c, 1, 7), random((c,), dtype),
        weight(random, dtype, 3 * c, c), random((3 * c,), dtype),
        random((1, 3 * c, 1, 1), dtype), random((1, 3 * c, 1, 1), dtype),
        weight(random, dtype, c, 3 * c), random((c,), dtype),
    )  # fmt: skip


BRANCHES = {
    "conv_half": (block.conv_half_forward, F.conv_half, conv_half, (5, 7, 9, 11)),
    "ffn_half": (block.ffn_half_forward, F.ffn_half, ffn_half, (5, 7)),
    "fcdm_block": (block.fcdm_block_forward, F.fcdm_block, fcdm, (5, 7, 11)),
}


@pytest.mark.parametrize("name", BRANCHES)
class TestAgainstFloat64:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_result(self, name, shape, dtype, random, agree, is_image):
        forward, reference, make, _ = BRANCHES[name]
        inputs = make(random, dtype, *shape)
        out = forward(*inputs).out
        assert is_image(out, dtype)
        agree((out,), reference, inputs)

    def test_one_vector_for_all_samples_and_no_biases(self, name, random, agree):
        forward, reference, make, biases = BRANCHES[name]
        inputs = list(make(random, torch.float32, 2, 24, 3, 5, single=True))
        agree((forward(*inputs).out,), reference, inputs)
        kept = [v for i, v in enumerate(inputs) if i not in biases]

        def without(*v):
            v = list(v)
            for i in biases:
                v.insert(i, None)
            return v

        agree((forward(*without(*kept)).out,), lambda *v: reference(*without(*v)), kept)

    def test_same_bits_every_time(self, name, random, repeats):
        forward, _, make, _ = BRANCHES[name]
        inputs = make(random, torch.bfloat16, 3, 24, 5, 5)
        repeats(lambda: (forward(*inputs).out,))


def mean_and_rstd(x, eps=1e-6):
    return x.mean(1), 1 / torch.sqrt(x.var(1, correction=0) + eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_backward_of_the_conv_half_wants(dtype, random, agree):
    inputs = conv_half(random, dtype, 2, 24, 3, 5)
    x, shift, scale, _, pw1_weight, pw1_bias, dw_weight, dw_bias, ca_weight, ca_bias, *_ = inputs
    result = block.conv_half_forward(*inputs)
    agree(result.statistics, mean_and_rstd, (x,))
    agree((result.y1,), lambda x, a, b, w, c: F.pointwise(F.adaln_modulate(x, a, b), w, c),
          (x, shift, scale, pw1_weight, pw1_bias))  # fmt: skip

    def pooled(x, shift, scale, *v):
        return F.pointwise_depthwise_gelu(F.adaln_modulate(x, shift, scale), *v).mean((2, 3))

    before = (x, shift, scale, pw1_weight, pw1_bias, dw_weight, dw_bias)
    agree((result.pooled,), pooled, before)
    agree((result.attention,), lambda w, b, *v: torch.sigmoid(pooled(*v) @ w[:, :, 0, 0].t() + b),
          (ca_weight, ca_bias, *before))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_backward_of_the_others_wants(dtype, random, agree):
    inputs = ffn_half(random, dtype, 2, 24, 3, 5)
    x, shift, scale, _, w, b, *_ = inputs
    result = block.ffn_half_forward(*inputs)
    agree(result.statistics, mean_and_rstd, (x,))
    agree((result.h,), lambda x, s, t, w, b: F.pointwise(F.adaln_modulate(x, s, t), w, b), (x, shift, scale, w, b))
    lean = block.ffn_half_forward(*inputs, keep=False)
    assert lean.h is None
    assert torch.equal(lean.out, result.out)

    inputs = fcdm(random, dtype, 2, 24, 3, 5)
    x, shift, scale, _, dw, db, w, b, *_ = inputs
    result = block.fcdm_block_forward(*inputs)
    agree((result.y1,), F.depthwise, (x, dw, db))
    agree(result.statistics, mean_and_rstd, (result.y1,))

    def h(x, dw, db, shift, scale, w, b):
        return F.pointwise(F.depthwise_adaln(x, dw, db, shift, scale), w, b)

    before = (x, dw, db, shift, scale, w, b)
    agree((result.h,), h, before)
    agree((result.norm,), lambda *v: torch.linalg.vector_norm(F.gelu(h(*v)), dim=(2, 3)), before)
    assert block.fcdm_block_forward(*inputs, keep=False).h is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_statistics_travel_from_one_branch_to_the_next(mean, dtype, random, agree):
    """A block is its two halves; the second adds up what the first left, and finds what a pass over x would."""
    first, second = conv_half(random, dtype, 2, 24, 3, 5), ffn_half(random, dtype, 2, 24, 3, 5)
    first = (first[0] + mean, *first[1:])
    middle = block.conv_half_forward(*first, more=True)
    result = block.ffn_half_forward(middle.out, *second[1:], partials=middle.partials)
    assert block.conv_half_forward(*first).partials is result.partials is None
    agree(result.statistics, mean_and_rstd, (middle.out,))
    count = len(first)
    agree((result.out,), lambda *v: F.ffn_half(F.conv_half(*v[:count]), *v[count:]), (*first, *second[1:]))
