"""Every instruction set's kernels: the ops' own tests in tests/ops run the best one only."""

from __future__ import annotations

import pytest
import torch
from ops_cases import CASES, DTYPES, SHAPES, check_against_float64, outputs_and_gradients
from support import rel_rms

import dico_kernels as dk
from dico_kernels import native
from dico_kernels.reference import functional as R


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def _native():
    with dk.backend("native", strict=True):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_float64(isa, name, dtype):
    for shape in (*SHAPES, (1, 70, 5, 6), (2, 129, 2, 3)):
        check_against_float64(CASES[name], CASES[name].arguments(shape), dtype, "cpu")


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("k", [1, 3, 5, 7, 9])
def test_depthwise_kernel_sizes(isa, k, gelu):
    """Images of one pixel, narrower than the kernel, and tall enough to be cut into several units of rows."""
    for n, c, h, w in ((1, 3, 1, 1), (2, 35, 2, 9), (1, 5, 70, 3), (1, 2, 130, 61)):
        x, dy = (
            torch.randn(n, c, h, w, dtype=torch.float64).contiguous(memory_format=torch.channels_last) for _ in "ab"
        )
        weight, bias = torch.randn(c, 1, k, k, dtype=torch.float64) / k, torch.randn(c, dtype=torch.float64)

        def definition(*a, gelu=gelu):
            return R.gelu(R.depthwise(*a)) if gelu else R.depthwise(*a)

        leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
        out = definition(*leaves)
        out.backward(dy)
        assert rel_rms(native.depthwise(x, weight, bias, gelu), out) < 1e-13
        for ours, leaf in zip(native.depthwise_backward(dy, x, weight, bias, gelu), leaves, strict=True):
            assert rel_rms(ours, leaf.grad) < 1e-12


@pytest.mark.parametrize("gelu", [False, True])
def test_depthwise_same_bits_on_any_number_of_threads(isa, gelu):
    x, dy = (torch.randn(2, 70, 40, 33).contiguous(memory_format=torch.channels_last) for _ in "ab")
    weight, bias = torch.randn(70, 1, 3, 3), torch.randn(70)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            forward = native.depthwise(x, weight, bias, gelu)
            runs.append([forward, *native.depthwise_backward(dy, x, weight, bias, gelu)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_gelu_is_exact_to_float_rounding(isa):
    """Through a 1x1 kernel of ones; A&S 7.1.26 is within 3.3e-7 of the erf form everywhere."""
    x = torch.cat([torch.linspace(-12, 12, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 60.0, -60.0, 3e38, -3e38])])
    image = x[None, None, :, None].contiguous(memory_format=torch.channels_last)
    out = native.depthwise(image, torch.ones(1, 1, 1, 1), None, True).flatten()
    exact = torch.nn.functional.gelu(x.double())
    assert (out - exact).abs().max() < 3.3e-7 * exact.abs().clamp(min=1).max()
    assert ((out - exact).abs() / exact.abs().clamp(min=1)).max() < 3.3e-7
    special = torch.tensor([float("inf"), float("nan")])[None, None, :, None]
    out = native.depthwise(special.contiguous(memory_format=torch.channels_last), torch.ones(1, 1, 1, 1), None, True)
    assert out.flatten()[0] == float("inf")
    assert out.flatten()[1].isnan()


def test_skip_in_many_chunks(isa, monkeypatch):
    arguments = [a.float() for a in CASES["pixel_shuffle_skip"].arguments((3, 6, 5, 4))]
    whole = outputs_and_gradients(dk.ops.pixel_shuffle_skip, arguments)
    monkeypatch.setattr(native, "_CHUNK_BYTES", 3000)
    up, skip = (a.contiguous(memory_format=torch.channels_last) for a in arguments[:2])
    assert len(list(native._chunks(up, skip))) >= 5
    for a, b in zip(outputs_and_gradients(dk.ops.pixel_shuffle_skip, arguments), whole, strict=True):
        assert rel_rms(a, b) < 1e-6


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, v: native.adaln_modulate(x.contiguous(), v, v, 1e-6), "x has shape .*expected a channels_last"),
        (lambda x, v: native.adaln_modulate(x, v[:, ::2], v, 1e-6), r"shift is \(2, 3\).*expected contiguous"),
        (lambda x, v: native.adaln_modulate(x, v, v.double(), 1e-6), "scale is .*float64"),
        (lambda x, v: native.gated_residual(x, x.double(), v), "branch is .*expected the other images'"),
        (lambda x, v: native.gated_residual(x.to("meta"), x, v), "x is .*on meta"),
        (
            lambda x, v: native.depthwise(x, torch.ones(6, 1, 2, 2), None, False),
            "weight has shape .*expected square, odd",
        ),
        (lambda x, v: native.depthwise(x, torch.ones(5, 1, 3, 3), None, False), "weight is .*expected 54"),
        (lambda x, v: native.channel_affine(x, v.double()), "s is .*float64"),
        (lambda x, v: native.adaln_modulate_backward(x, x, v, v, v), "mean is .*expected 24 contiguous"),
        (lambda x, v: native.pixel_shuffle_skip(x, x, torch.ones(1, 7, 1, 1), None), r"skip is \(2, 6, 3, 4\)"),
    ],
)
def test_what_would_read_beyond_memory_is_refused(call, named):
    x = torch.randn(2, 6, 3, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=named):
        call(x, torch.randn(2, 6))
