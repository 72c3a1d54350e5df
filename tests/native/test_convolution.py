"""Native dense convolution and its gradients on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from support import rel_rms
from torch.nn import functional as F

from dico_kernels import _convolution, _extension, _winograd, native
from dico_kernels.dtypes import accumulation_dtype

# images, inputs, height, width, outputs, kernel: one pixel, odd everything, a kernel larger than the image, 1x1, and
# the shape of a way up
CASES = [(1, 1, 1, 1, 1, 3), (2, 5, 3, 7, 4, 3), (3, 17, 4, 2, 9, 5), (1, 3, 2, 2, 70, 9), (2, 33, 1, 9, 16, 1)]
CASES += [(2, 24, 4, 4, 136, 3)]


def inputs(case, dtype, image):
    n, c, h, w, outputs, k = case
    weight = torch.randn(outputs, c, k, k, dtype=torch.float64) / (c * k * k) ** 0.5
    return image((n, c, h, w), dtype), weight.to(dtype), image((n, outputs, h, w), dtype)


def evaluate(x, weight, dy, bias=None):
    dx, dweight = native.convolution_gradient(dy, weight), native.convolution_weight_gradient(dy, x, weight)
    return [native.convolution(x, weight, bias), dx, dweight]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(isa, case, dtype, image, check):
    x, weight, dy = inputs(case, dtype, image)
    results = evaluate(x, weight, dy)
    assert all(v.dtype == dtype for v in results)
    assert all(v.is_contiguous(memory_format=torch.channels_last) for v in results[:2])
    check(results, lambda *a: F.conv2d(*a, padding=case[-1] // 2), [x, weight], [dy], summed={2: dy[:, 0].numel()})


def test_a_bias_is_added(isa, dtype, image, check):
    x, weight, dy = inputs((2, 5, 3, 7, 4, 3), dtype, image)
    bias = torch.randn(4, dtype=torch.float64).to(dtype)
    results = [*evaluate(x, weight, dy, bias), dy.double().sum((0, 2, 3)).to(dtype)]
    check(results, lambda *a: F.conv2d(*a, padding=1), [x, weight, bias], [dy], summed={2: dy[:, 0].numel()})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["usual", "channels_last"])
def test_of_many_pixels(isa, layout, image, check, monkeypatch):
    """By Winograd's algorithm, where products are ours at all: nothing is gathered."""
    x, weight, dy = inputs((2, 17, 16, 17, 24, 3), torch.float32, image)
    weight, bias = weight.to(memory_format=layout), torch.randn(24)
    called = []
    for module in (_convolution, _winograd):
        monkeypatch.setattr(module, "call", lambda name, *a: called.append(name) or _extension.call(name, *a))
    results = [*evaluate(x, weight, dy, bias), dy.double().sum((0, 2, 3)).float()]
    by_patches = ["patches_backward", "patches", "patches"]
    by_winograd = ["winograd_pack", "winograd", "winograd_gradient", "winograd_pack", "winograd"]
    assert called == (by_patches if isa == "base" else by_winograd)
    check(results, lambda *a: F.conv2d(*a, padding=1), [x, weight, bias], [dy], summed={2: dy[:, 0].numel()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_patches_are_those_of_unfold(isa, case, dtype, image):
    n, c, h, w, _, k = case
    x = image((n, c, h, w), dtype)
    expected = F.unfold(x.double(), k, padding=k // 2).transpose(1, 2).reshape(n, h, w, c * k * k)
    assert torch.equal(_convolution._patches(x, k).double(), expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_their_gradient_is_that_of_fold(isa, case, dtype, image):
    n, c, h, w, _, k = case
    dpatches, dx = torch.randn(n, h, w, c * k * k, dtype=torch.float64).to(dtype), image((n, c, h, w), dtype)
    _extension.call("patches_backward", dx, dx, dpatches, n, h, w, c, k)
    columns = dpatches.double().reshape(n, h * w, -1).transpose(1, 2)
    assert rel_rms(dx, F.fold(columns, (h, w), k, padding=k // 2)) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_any_number_of_threads(isa, dtype, image, same_bits):
    x, weight, dy = inputs((2, 24, 5, 4, 136, 3), dtype, image)
    same_bits(lambda: evaluate(x, weight, dy))


@pytest.mark.parametrize(("images", "chunks"), [(2, 3), (0, 5)])
def test_a_few_images_at_a_time(isa, dtype, images, chunks, image, monkeypatch):
    """Also where not even one has the size of a chunk."""
    x, weight, dy = inputs((5, 3, 4, 3, 7, 3), dtype, image)
    bias = torch.randn(7, dtype=torch.float64).to(dtype)
    whole = evaluate(x, weight, dy, bias)
    monkeypatch.setattr(_convolution, "_CHUNK_BYTES", images * 4 * 3 * 27 * accumulation_dtype(dtype).itemsize)
    assert len(_convolution._chunks(x, weight)) == chunks
    for all_at_once, found in zip(whole, evaluate(x, weight, dy, bias), strict=True):
        assert found.dtype == dtype
        assert found.stride() == all_at_once.stride()
        assert rel_rms(found, all_at_once.double()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_x_is_rounded_once(isa, dtype, image):
    x, weight, dy = inputs((2, 24, 6, 5, 40, 3), dtype, image)
    exact = torch.nn.grad.conv2d_input(x.shape, weight.double(), dy.double(), padding=1)
    found = native.convolution_gradient(dy, weight)
    # As the exact one is, but where the float32 before it lay at the boundary of two.
    assert (found != exact.to(dtype)).double().mean() < 0.01


def test_bad_arguments_are_named(image):
    x, weight, dy = inputs((2, 5, 3, 7, 4, 3), torch.float32, image)
    for named, call in {
        "x has strides": lambda: native.convolution(x.contiguous(), weight),
        "weight has shape .* k odd": lambda: native.convolution(x, weight[..., :2, :2].contiguous()),
        r"weight has shape \(4, 4, 3, 3\)": lambda: native.convolution(x, weight[:, :4].contiguous()),
        "weight is torch.float64": lambda: native.convolution(x, weight.double()),
        r"weight has shape \(2, 5": lambda: native.convolution_gradient(dy, weight[:2].contiguous()),
        "dy has strides": lambda: native.convolution_gradient(dy.contiguous(), weight),
        "dy has shape": lambda: native.convolution_weight_gradient(dy[:1], x, weight),
        "dy is torch.float64": lambda: native.convolution_weight_gradient(dy.double(), x, weight),
    }.items():
        with pytest.raises(ValueError, match=named):
            call()
    with pytest.raises(RuntimeError, match="the native kernel runs on cpu only"):
        native.convolution(x.to("meta"), weight.to("meta"))
