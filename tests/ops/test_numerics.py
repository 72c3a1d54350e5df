"""Outputs and every gradient of every op on every backend that runs here, against float64."""

from __future__ import annotations

import pytest
import torch
from ops_cases import CASES, DTYPES, REGIMES, SHAPES, check_against_float64, outputs_and_gradients, tuple_of
from support import rel_rms, threads

import dico_kernels as dk
from dico_kernels import native


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_against_float64(case, backend, device, shape, dtype):
    if dtype == torch.float16 and backend == "triton" and shape != SHAPES[0]:
        shape = (1, 5, 2, 3)
    check_against_float64(case, case.arguments(shape), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.usefixtures("poisoned")
def test_both_weight_regimes(case, backend, device, regime, dtype):
    check_against_float64(case, case.arguments((2, 24, 5, 6), regime, seed=3), dtype, device)


def test_gradcheck(case, backend, device):
    arguments = [
        a.to(device).requires_grad_() for a in case.arguments((2, 3, 3, 4) if backend != "triton" else (1, 3, 3, 4))
    ]
    assert torch.autograd.gradcheck(case.op, arguments, fast_mode=backend == "triton", nondet_tol=0)


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "permuted", "expanded gradient"])
def test_layouts(case, backend, device, layout):
    """Inputs and output gradients in any strides give what plain ones give."""
    arguments = [a.float().to(device) for a in case.arguments((2, 6, 3, 4))]
    plain = outputs_and_gradients(case.op, arguments)
    if layout == "expanded gradient":
        leaves = [a.clone().requires_grad_() for a in arguments]
        torch.autograd.backward([o.sum() for o in tuple_of(case.op(*leaves))])
        dense = [a.clone().requires_grad_() for a in arguments]
        outs = tuple_of(case.op(*dense))
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
        for a, b in zip(leaves, dense, strict=True):
            assert torch.equal(a.grad, b.grad)
        return

    def restride(a):
        if a.ndim == 4 and layout == "channels_last":
            return a.contiguous(memory_format=torch.channels_last)
        if a.ndim == 4 and layout == "permuted":
            return a.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
        wide = torch.zeros([2 * s for s in a.shape], dtype=a.dtype, device=a.device)
        return wide[tuple(slice(None, None, 2) for _ in a.shape)].copy_(a)

    strided = [restride(a) for a in arguments]
    for a, b in zip(outputs_and_gradients(case.op, strided), plain, strict=True):
        assert torch.equal(a, b)


def test_images_come_back_channels_last(case, backend, device):
    arguments = [a.float().to(device) for a in case.arguments((2, 6, 3, 4))]
    for out in tuple_of(case.op(*arguments)):
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_conditioning_of_batch_one_broadcasts(case, backend, device):
    arguments = [a.to(device) for a in case.arguments((3, 6, 2, 3))]
    vectors = [i for i, a in enumerate(arguments) if a.ndim == 2]
    if not vectors:
        assert case.name in ("pointwise_depthwise_gelu", "cca_gate", "grn", "pixel_shuffle_skip")
        return
    one = [a[:1] if i in vectors else a for i, a in enumerate(arguments)]
    ours = outputs_and_gradients(case.op, one)
    for a, b in zip(ours, outputs_and_gradients(case.definition, one), strict=True):
        assert a.shape == b.shape
        assert rel_rms(a, b) < 1e-12


def test_absent_biases(case, backend, device):
    arguments = [a.to(device) for a in case.arguments((2, 4, 3, 3))]
    optional = {
        "pointwise_depthwise_gelu": (2, 4),
        "depthwise_adaln": (2,),
        "cca_gate": (2,),
        "pixel_shuffle_skip": (3,),
        "conv_half": (5, 7, 9, 11),
        "ffn_half": (5, 7),
        "fcdm_block": (5, 7, 11),
    }
    for index in optional.get(case.name, ()):
        kept = [a for i, a in enumerate(arguments) if i != index]

        def without(fn, index=index):
            return lambda *args: fn(*args[:index], None, *args[index:])

        ours = outputs_and_gradients(without(case.op), kept)
        for a, b in zip(ours, outputs_and_gradients(without(case.definition), kept), strict=True):
            assert rel_rms(a, b) < 1e-12


def test_same_bits_every_time(case, backend, device):
    """Interpreted, programs run one after the other: a small image shows what that can show."""
    shape = (2, 8, 4, 3) if backend == "triton" and device == "cpu" else (2, 40, 9, 7)
    arguments = [a.float().to(device) for a in case.arguments(shape)]
    first = outputs_and_gradients(case.op, arguments)
    for a, b in zip(outputs_and_gradients(case.op, arguments), first, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual", "gated_residual_adaln", "depthwise_adaln", "grn"])
def test_same_native_bits_on_any_number_of_threads(name):
    """Several blocks of rows to share out. The other ops hold a matrix product, which the library may sum by threads;
    tests/native has their kernels.
    """
    case = CASES[name]
    arguments = [a.float() for a in case.arguments((2, 40, 19, 17))]
    runs = []
    with dk.backend("native", strict=True), native.grain(0):
        for count in (1, 2, 3):
            with threads(count):
                runs.append(outputs_and_gradients(case.op, arguments))
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)


def test_an_empty_batch_gives_empty_outputs_and_zero_gradients(case, backend, device):
    arguments = [a.float().to(device) for a in case.arguments((0, 6, 2, 3))]
    results = outputs_and_gradients(case.op, arguments)
    expected = outputs_and_gradients(case.definition, arguments) if case.name != "pixel_shuffle_skip" else None
    for index, result in enumerate(results):
        assert result.numel() == 0 or torch.count_nonzero(result) == 0
        if expected is not None:
            assert result.shape == expected[index].shape


@pytest.mark.parametrize("mean", [3.0, 30.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm_of_a_mean_far_above_the_deviation(backend, device, mean, dtype):
    for name in ("adaln_modulate", "gated_residual_adaln", "conv_half", "ffn_half"):
        arguments = CASES[name].arguments((2, 48, 3, 3))
        arguments[0] = arguments[0] + mean
        check_against_float64(CASES[name], arguments, dtype, device)


def test_eps_reaches_the_kernel(backend, device):
    for name in (
        "adaln_modulate", "gated_residual_adaln", "depthwise_adaln", "grn", "conv_half", "ffn_half", "fcdm_block"
    ):  # fmt: skip
        case = CASES[name]
        tiny = [
            a.to(device) * (1e-4 if a.ndim == 4 and i < 2 else 1) for i, a in enumerate(case.arguments((2, 6, 3, 4)))
        ]
        for eps in (1e-6, 1e-3):
            ours = outputs_and_gradients(lambda *a, c=case, e=eps: c.op(*a, e), tiny)
            truth = outputs_and_gradients(lambda *a, c=case, e=eps: c.definition(*a, e), tiny)
            for a, b in zip(ours, truth, strict=True):
                assert rel_rms(a, b) < 1e-9
