"""The native depthwise convolution, with GELU and without, on every instruction set, against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from support import rel_rms

from dico_kernels import native
from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.reference import functional as F

GELU_ERROR = 3.3e-7  # of float's GELU, absolute: mostly its erf's


def reference(gelu):
    return lambda *args: F.gelu(F.depthwise(*args)) if gelu else F.depthwise(*args)


def weights(c, k, dtype):
    return (torch.randn(c, 1, k, k, dtype=torch.float64) / k).to(dtype), torch.randn(c, dtype=torch.float64).to(dtype)


def evaluate(x, weight, bias, gelu, dy):
    dx, dweight, dbias = native.depthwise_backward(dy, x, weight, bias, gelu)
    assert dweight.dtype == dbias.dtype == accumulation_dtype(x.dtype)
    y = native.depthwise(x, weight, bias, gelu)
    for image in (y, dx):
        assert image.dtype == x.dtype
        assert image.is_contiguous(memory_format=torch.channels_last)
    return [y, dx, dweight, dbias]


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("k", [3, 7])
def test_against_float64(isa, shape, dtype, k, gelu, image, check):
    """Images of one pixel and narrower than the kernel are among the shapes."""
    args = (image(shape, dtype), *weights(shape[1], k, dtype))
    dy = image(shape, dtype)
    check(evaluate(*args, gelu, dy), reference(gelu), args, [dy], floor=GELU_ERROR if gelu else 0)


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("k", [1, 5, 9])
def test_other_kernel_sizes(isa, k, gelu, image, check):
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((2, 21, 10, 3), (1, 70, 17, 9)):
            args = (image(shape, dtype), *weights(shape[1], k, dtype))
            dy = image(shape, dtype)
            check(evaluate(*args, gelu, dy), reference(gelu), args, [dy], floor=GELU_ERROR if gelu else 0)


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
def test_without_bias(isa, gelu, image):
    x, dy = image((2, 19, 5, 6), torch.float32), image((2, 19, 5, 6), torch.float32)
    weight, bias = weights(19, 3, torch.float32)
    without, zero = evaluate(x, weight, None, gelu, dy), evaluate(x, weight, torch.zeros_like(bias), gelu, dy)
    assert all(torch.equal(a, b) for a, b in zip(without, zero, strict=True))


@pytest.mark.parametrize("k", [3, 7])
def test_borders_are_zero_padding(isa, k, image):
    """Every tap at every distance from every border, one at a time and exactly."""
    x = image((1, 3, 6, 9), torch.float64)
    for tap in range(k * k):
        weight = torch.zeros(3, 1, k * k, dtype=torch.float64)
        weight[:, :, tap] = 1
        weight = weight.reshape(3, 1, k, k)
        assert torch.equal(native.depthwise(x, weight, None, False), F.depthwise(x, weight, None))


def test_an_image_in_blocks_of_rows(isa, image, check):
    """One narrow, tall image is divided into blocks whose borders are not the image's."""
    x, dy = image((1, 4, 53, 5), torch.float32), image((1, 4, 53, 5), torch.float32)
    args = (x, *weights(4, 7, torch.float32))
    check(evaluate(*args, True, dy), reference(True), args, [dy], floor=GELU_ERROR)


def test_gelu_is_exact_to_the_documented_error(isa):
    """Through a 1x1 kernel of one: the function itself and its slope over all of float's interesting range."""
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([0.0, -0.0, 1e-30, -40.0, 40.0, 1e10, -1e10])])
    pixels = x.reshape(1, 1, 1, -1)
    one, ones = torch.ones(1, 1, 1, 1), torch.ones_like(pixels)
    exact = x.double().requires_grad_()
    y = F.gelu(exact)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    out = native.depthwise(pixels, one, None, True).flatten().double()
    dx = native.depthwise_backward(ones, pixels, one, None, True)[0].flatten().double()
    rounding = x.double().abs().clamp(max=1e10) * 2**-24  # of the result itself
    assert ((out - y).abs() <= GELU_ERROR - 1e-7 + rounding).all()
    assert float((dx - slope).detach().abs().max()) <= GELU_ERROR


def test_nan_and_infinity_stay_where_the_kernel_reaches(isa):
    x = torch.zeros(1, 20, 9, 9).contiguous(memory_format=torch.channels_last)
    x[0, 3, 4, 4] = float("nan")
    x[0, 7, 0, 0] = float("inf")
    y = native.depthwise(x, torch.ones(20, 1, 3, 3), None, True)
    assert y[0, 3, 3:6, 3:6].isnan().all()
    assert int(y.isnan().sum()) == 9
    assert y[0, 7, :2, :2].isposinf().all()


def test_same_bits_on_any_number_of_threads(isa, image, same_bits):
    x, dy = image((3, 70, 19, 7), torch.float32), image((3, 70, 19, 7), torch.float32)
    for k, gelu in ((3, True), (7, False)):
        weight, bias = weights(70, k, torch.float32)
        same_bits(lambda w=weight, b=bias, g=gelu: evaluate(x, w, b, g, dy))


def test_bad_arguments_are_named(image):
    x = image((2, 5, 3, 3), torch.float32)
    weight, bias = weights(5, 3, torch.float32)
    for named, call in {
        "x has strides": lambda: native.depthwise(x.contiguous(), weight, bias, True),
        "weight has shape .*k in 1, 3": lambda: native.depthwise(x, weight[..., :2, :2], bias, True),
        "weight has shape": lambda: native.depthwise(x, weight[:4], bias, True),
        "bias has shape": lambda: native.depthwise(x, weight, bias[:4], True),
        "bias is torch.float64": lambda: native.depthwise(x, weight, bias.double(), True),
        "dy has shape": lambda: native.depthwise_backward(x[:1], x, weight, bias, True),
    }.items():
        with pytest.raises(ValueError, match=named):
            call()
    with pytest.raises(RuntimeError, match="depthwise: the native kernel runs on cpu only"):
        native.depthwise(*(v.to("meta") for v in (x, weight, bias)), True)


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize("k", [3, 7])
def test_with_sums(isa, shape, dtype, k, gelu, image):
    """The sums are those of the rounded output, which is the same with them and without."""
    x, (weight, bias) = image(shape, dtype), weights(shape[1], k, dtype)
    y, sums = native.depthwise_sums(x, weight, bias, gelu)
    assert torch.equal(y, native.depthwise(x, weight, bias, gelu))
    assert sums.dtype == accumulation_dtype(dtype)
    allowed = (1e-14 if dtype == torch.float64 else 3e-7) * float(y.double().abs().sum((2, 3)).norm())
    assert float((sums - y.double().sum((2, 3))).norm()) <= allowed


def test_long_sums_keep_their_digits(isa, image):
    x, (weight, bias) = image((1, 8, 200, 200), torch.float32), weights(8, 3, torch.float32)
    y, sums = native.depthwise_sums(x.abs(), weight.abs(), bias.abs(), True)
    assert rel_rms(sums, y.double().sum((2, 3))) < 5e-7


def test_sums_have_the_same_bits_on_any_number_of_threads(isa, image, same_bits):
    x, (weight, bias) = image((2, 136, 11, 13), torch.bfloat16), weights(136, 3, torch.bfloat16)
    same_bits(lambda: native.depthwise_sums(x, weight, bias, True))
