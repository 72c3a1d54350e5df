"""Bad arguments: refused by name, on real and on fake tensors alike."""

from __future__ import annotations

import contextlib

import pytest
import torch
from ops_cases import CASES
from torch._subclasses.fake_tensor import FakeTensorMode

N, C, H, W = 2, 6, 4, 5
IMAGE = {name: ("up" if name == "pixel_shuffle_skip" else "x") for name in CASES}


def good(name):
    return [a.float() for a in CASES[name].arguments((N, C, H, W))]


def replaced(name, index, value):
    arguments = good(name)
    arguments[index] = value(arguments[index]) if callable(value) else value
    return arguments


BAD = [
    *[(n, 0, lambda a: a[0], rf"{IMAGE[n]} has shape .*expected \(N, C, H, W\)") for n in CASES],
    *[(n, 0, lambda a: a[:, :, :0], rf"{IMAGE[n]} has shape .*H, W > 0") for n in CASES],
    *[(n, 0, lambda a: a[..., :0], rf"{IMAGE[n]} has shape .*H, W > 0") for n in CASES],
    *[(n, 0, lambda a: a.int(), rf"{IMAGE[n]} has dtype torch.int32: expected float32") for n in CASES],
    *[(n, 0, lambda a: a.to(torch.complex64), rf"{IMAGE[n]} has dtype torch.complex64") for n in CASES],
    *[(n, -1, lambda a: a.double(), r"has dtype torch.float64: expected x's, torch.float32") for n in CASES],
    ("adaln_modulate", 1, torch.zeros(3, C), r"shift has shape \(3, 6\): expected \(2, 6\) or \(1, 6\)"),
    ("adaln_modulate", 2, torch.zeros(N, 5), r"scale has shape \(2, 5\): expected \(2, 6\) or \(1, 6\)"),
    ("gated_residual", 1, torch.zeros(N, C, H, 4), r"branch has shape .*expected x's, \(2, 6, 4, 5\)"),
    ("gated_residual", 2, torch.zeros(4, C), r"gate has shape \(4, 6\)"),
    ("gated_residual", 2, torch.zeros(N, C, 1, 1), r"gate has shape \(2, 6, 1, 1\)"),
    ("gated_residual_adaln", 2, torch.zeros(C), r"gate has shape \(6,\)"),
    ("gated_residual_adaln", 4, torch.zeros(N, 7), r"scale has shape \(2, 7\)"),
    ("pointwise_depthwise_gelu", 1, torch.zeros(8, 5, 1, 1), r"pw_weight has shape .*expected \(K, 6, 1, 1\)"),
    ("pointwise_depthwise_gelu", 1, torch.zeros(8, 6, 3, 3), r"pw_weight has shape"),
    ("pointwise_depthwise_gelu", 2, torch.zeros(7), r"pw_bias has shape \(7,\): expected \(8,\)"),
    ("pointwise_depthwise_gelu", 3, torch.zeros(8, 1, 4, 4), r"dw_weight has a 4x4 kernel: expected an odd size"),
    ("pointwise_depthwise_gelu", 3, torch.zeros(8, 1, 11, 11), r"dw_weight has a 11x11 kernel"),
    ("pointwise_depthwise_gelu", 3, torch.zeros(8, 1, 3, 5), r"dw_weight has shape .*expected \(8, 1, k, k\)"),
    ("pointwise_depthwise_gelu", 3, torch.zeros(7, 1, 3, 3), r"dw_weight has shape"),
    ("pointwise_depthwise_gelu", 4, torch.zeros(8, 1), r"dw_bias has shape"),
    ("depthwise_adaln", 1, torch.zeros(C, 1, 6, 6), r"weight has a 6x6 kernel: expected an odd size"),
    ("depthwise_adaln", 2, torch.zeros(3), r"bias has shape \(3,\): expected \(6,\)"),
    ("cca_gate", 1, torch.zeros(7, C, 1, 1), r"weight has shape .*as many outputs as x has channels"),
    ("cca_gate", 1, torch.zeros(C, 7), r"weight has shape .*expected \(K, 6, 1, 1\)"),
    ("grn", 1, torch.zeros(1, 5, 1, 1), r"gamma has shape .*expected \(1, 6, 1, 1\), \(1, 1, 1, 6\) or \(6,\)"),
    ("grn", 2, torch.zeros(C, 1), r"beta has shape"),
    ("conv_half", 3, torch.zeros(3, C), r"gate has shape \(3, 6\): expected \(2, 6\) or \(1, 6\)"),
    ("conv_half", 4, torch.zeros(8, 5, 1, 1), r"pw1_weight has shape .*expected \(K, 6, 1, 1\)"),
    ("conv_half", 6, torch.zeros(8, 1, 4, 4), r"dw_weight has a 4x4 kernel: expected an odd size"),
    ("conv_half", 8, torch.zeros(8, 6, 1, 1), r"ca_weight has shape .*expected \(8, 8, 1, 1\)"),
    ("conv_half", 10, torch.zeros(5, 8, 1, 1), r"pw2_weight has shape .*expected \(6, 8, 1, 1\)"),
    ("conv_half", 0, lambda a: a.double(), r"pw1_weight has dtype torch.float32: expected x's, torch.float64$"),
    ("ffn_half", 4, lambda a: a.double(), r"expected x's, torch.float32, or torch.bfloat16 or torch.float16"),
    ("ffn_half", 5, torch.zeros(12), r"fc1_bias has shape \(12,\): expected \(13,\)"),
    ("ffn_half", 6, torch.zeros(6, 12, 1, 1), r"fc2_weight has shape .*expected \(6, 13, 1, 1\)"),
    ("fcdm_block", 4, torch.zeros(C, 1, 6, 6), r"dw_weight has a 6x6 kernel"),
    ("fcdm_block", 8, torch.zeros(1, 12, 1, 1), r"gamma has shape .*expected \(1, 13, 1, 1\)"),
    ("fcdm_block", 9, torch.zeros(1, 13, 1), r"beta has shape"),
    ("pixel_shuffle_skip", 0, torch.zeros(N, 6, H, W), r"up has 6 channels: expected a multiple of 4"),
    ("pixel_shuffle_skip", 1, torch.zeros(N, 7, H, W), r"skip has shape .*expected \(2, S, 8, 10\)"),
    ("pixel_shuffle_skip", 2, torch.zeros(9, 12, 1, 1), r"weight has shape .*expected \(K, 13, 1, 1\)"),
    ("pixel_shuffle_skip", 3, torch.zeros(8), r"bias has shape \(8,\): expected \(9,\)"),
]


@pytest.mark.parametrize(("name", "index", "value", "named"), BAD)
def test_bad_argument_is_named(name, index, value, named):
    arguments = replaced(name, index, value)
    with pytest.raises(ValueError, match=named):
        CASES[name].op(*arguments)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(Exception, match=named):
        CASES[name].op(*(mode.from_tensor(a) for a in arguments))


@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual_adaln", "depthwise_adaln", "grn"])
@pytest.mark.parametrize("eps", [-1e-6, float("nan")])
def test_a_bad_eps_is_named(name, eps):
    with pytest.raises(ValueError, match=f"eps={eps}: expected a number >= 0"):
        CASES[name].op(*good(name), eps)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_none_is_refused_where_a_tensor_is_needed(case, gradients, fake):
    arguments = good(case.name)
    schema = getattr(torch.ops.dico_kernels, case.name).default._schema.arguments
    for index in range(len(arguments)):
        given = replaced(case.name, index, None)
        given[0] = given[0] if index == 0 else given[0].requires_grad_(gradients)
        if str(schema[index].type) == "Tensor":
            with contextlib.ExitStack() as stack:
                if fake:
                    mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
                    given = [None if a is None else mode.from_tensor(a) for a in given]
                stack.enter_context(
                    pytest.raises(TypeError, match=f"^{schema[index].name} is None: expected a tensor$")
                )
                case.op(*given)


def test_none_is_refused_under_autocast(case):
    arguments = [None, *good(case.name)[1:]]
    for given in (arguments, [None] * len(arguments)):
        with torch.autocast("cpu"), pytest.raises(TypeError, match=f"^{IMAGE[case.name]} is None: expected a tensor$"):
            case.op(*given)


@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual_adaln", "depthwise_adaln", "grn"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("eps", [None, torch.float32, "1e-6"], ids=str)
def test_what_is_no_number_is_refused_as_eps(name, gradients, eps):
    arguments = good(name)
    arguments[0].requires_grad_(gradients)
    with pytest.raises(RuntimeError, match="'float' for argument 'eps'"):
        CASES[name].op(*arguments, eps)


def test_mixed_devices_are_refused(case):
    arguments = [a.float() for a in case.arguments((N, C, H, W))]
    arguments[-1] = arguments[-1].to("meta")
    with pytest.raises(ValueError, match=r"is on meta: expected x's device, cpu"):
        case.op(*arguments)
