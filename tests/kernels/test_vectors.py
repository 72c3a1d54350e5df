"""Products of a few vectors against float64: channel attention's gate, and the conditioning of a level."""

from __future__ import annotations

import gc

import pytest
import torch
from support import rel_rms
from torch.nn import functional as F

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.kernels import vectors
from dico_kernels.kernels.common import record

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Vectors, outputs, inputs: one of each, odd numbers, more than a tile of any.
SHAPES = [(1, 1, 1), (2, 5, 3), (3, 17, 40), (17, 33, 5), (1, 70, 131), (35, 6, 16)]


def heads(shape, groups, dtype, random):
    n, k, c = shape
    weights = [random((k, c), dtype) / c**0.5 for _ in range(groups)]
    return random((n, c), dtype), weights, [random((k,), dtype) for _ in range(groups)]


def linear_silu(c, *weights_and_biases):
    weights, biases = (
        weights_and_biases[: len(weights_and_biases) // 2],
        weights_and_biases[len(weights_and_biases) // 2 :],
    )
    return torch.stack([F.linear(F.silu(c), w, b) for w, b in zip(weights, biases, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conditioning(shape, groups, dtype, random, agree):
    c, weights, biases = heads(shape, groups, dtype, random)
    y = vectors.conditioning(c, weights, biases)
    assert y.dtype == dtype
    agree([y], linear_silu, [c, *weights, *biases])


ATTENTION = [(1, 1, 1), (2, 3, 5), (3, 2, 17), (18, 1, 40), (1, 19, 131)]  # images, parts, channels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_channel_attention(case, biased, dtype, random):
    n, _, c = case
    sums = random((n, c), accumulation_dtype(dtype)) * 40
    weight, bias = random((c, c), dtype) / c**0.5, random((c,), dtype) if biased else None
    mean, attention = vectors.channel_attention(sums, 6, weight, bias)
    assert mean.dtype == attention.dtype == sums.dtype
    torch.testing.assert_close(mean, sums / 6, rtol=3e-7, atol=0)
    # the mean meets a 16-bit weight rounded to its dtype, as in F.linear
    logits = mean.to(dtype).double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert rel_rms(attention, torch.sigmoid(logits)) <= (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_channel_attention_backward(case, dtype, random):
    n, _, c = case
    acc = accumulation_dtype(dtype)
    weight, parts = random((c, c), dtype) / c**0.5, random(case, acc)
    mean, attention = random((n, c), acc), torch.sigmoid(random((n, c), acc))
    dsums, dweight, dbias = vectors.channel_attention_backward(parts, attention, mean, 6, weight)
    assert dweight.dtype == weight.dtype
    assert dbias.dtype == acc
    dlogits = parts.double().sum(1) * attention.double() * (1 - attention.double())
    assert rel_rms(dbias, dlogits) <= (1e-15 if dtype == torch.float64 else 3e-7)
    # the products' factors and results are rounded to the weight's dtype
    budget = {torch.float64: 1e-14, torch.float32: 2e-6}.get(dtype, 2 * torch.finfo(dtype).eps)
    assert rel_rms(dsums, dlogits @ weight.double() / 6) <= budget
    assert rel_rms(dweight, dlogits.t() @ mean.double()) <= budget


def test_attention_saturates_and_keeps_nan(device):
    logits = torch.tensor([6e4, -6e4, 90.0, -90.0, float("inf"), -float("inf"), float("nan"), 0.0], device=device)
    zeros = torch.zeros(1, 8, device=device)
    _, attention = vectors.channel_attention(zeros, 1, torch.zeros(8, 8, device=device), logits)
    torch.testing.assert_close(attention[0], torch.sigmoid(logits), equal_nan=True, rtol=0, atol=1e-30)


def test_addresses_that_are_not_aligned(random, agree):
    c, weights, biases = heads((2, 5, 7), 2, torch.bfloat16, random)
    buffer = random((36,), torch.bfloat16)
    weights[1] = buffer[1:].view(5, 7)
    assert weights[1].data_ptr() % 16
    agree([vectors.conditioning(c, weights, biases)], linear_silu, [c, *weights, *biases])
    with record() as launches:
        vectors.conditioning(c, weights, biases)
        vectors.conditioning(c, weights[:1], biases[:1])
    assert [launch.constants["ALIGNED"] for launch in launches] == [False, True]


def test_weights_may_change_in_place_and_move(random, agree):
    c, weights, biases = heads((2, 5, 7), 2, torch.float32, random)
    vectors.conditioning(c, weights, biases)
    weights[0].mul_(3)
    agree([vectors.conditioning(c, weights, biases)], linear_silu, [c, *weights, *biases])
    weights[1].data = random((5, 7), torch.float32)
    agree([vectors.conditioning(c, weights, biases)], linear_silu, [c, *weights, *biases])


def test_a_table_lives_as_long_as_its_weights(random):
    c, weights, biases = heads((2, 5, 7), 2, torch.float32, random)
    before = len(vectors._TABLES)
    vectors.conditioning(c, weights, biases)
    vectors.conditioning(c, weights, biases)
    assert len(vectors._TABLES) == before + 1
    assert len(vectors._TABLES[weights[0]]) == 1
    del weights
    gc.collect()
    assert len(vectors._TABLES) == before


def test_no_more_tables_are_kept_than_weights_take_turns(random):
    c, weights, biases = heads((2, 5, 7), 2, torch.float32, random)
    others = [random((5,), torch.float32) for _ in range(3 * vectors._KEPT)]  # all alive: none in another's place
    for other in others:
        vectors.conditioning(c, weights, [other, *biases[1:]])
    assert len(vectors._TABLES[weights[0]]) == vectors._KEPT


def test_a_table_that_a_graph_reads_is_kept(random, monkeypatch):
    c, weights, biases = heads((2, 5, 7), 2, torch.float32, random)
    vectors.conditioning(c, weights, biases)
    with monkeypatch.context() as recording:
        recording.setattr(vectors, "_capturing", lambda device: True)
        table = vectors._table(weights, biases)
        assert table is not None
        assert vectors._table(weights, [*biases[1:], torch.zeros(5)]) is None  # it would have to be written
    others = [random((5,), torch.float32) for _ in range(2 * vectors._KEPT)]
    for other in others:
        vectors.conditioning(c, weights, [other, *biases[1:]])
    addresses = tuple(t.data_ptr() for t in (*weights, *biases))
    assert addresses not in vectors._TABLES[weights[0]]
    assert vectors._RECORDED[weights[0]][addresses] is table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_stay_off_wgmma(dtype):
    for n in (1, 16, 64):
        with record(90) as launches:
            x = torch.empty(n, 416, dtype=dtype, device="meta")
            w, b = (
                [torch.empty(2496, 416, dtype=dtype, device="meta")] * 9,
                [torch.empty(2496, dtype=dtype, device="meta")] * 9,
            )
            vectors.conditioning(x, w, b)
        assert launches[0].constants["BM"] < 64


def test_same_bits_twice(random, repeats):
    c, weights, biases = heads((17, 33, 40), 2, torch.bfloat16, random)
    repeats(lambda: vectors.conditioning(c, weights, biases))
