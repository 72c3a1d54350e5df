"""Channel sums, dots and affine maps on every instruction set, against float64; CCA and GRN composed of them."""

from __future__ import annotations

import pytest
import torch
from support import rel_rms

from dico_kernels import native
from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.reference import functional as F


def per_channel(v):
    return v.double()[:, :, None, None]


def budget(dtype):
    """One rounding of the result in the image's dtype, or a short float sum."""
    return {torch.float64: 1e-13, torch.float32: 3e-7}.get(dtype, torch.finfo(dtype).eps / 2)


def test_sums_and_dots(isa, shape, dtype, image):
    """The sums of terms without sign, so that none cancels: their error is that of the summation."""
    a, b = image(shape, dtype).abs(), image(shape, dtype).abs()
    sums, dots = native.channel_sums(a), native.channel_dots(a, b)
    assert sums.dtype == dots.dtype == accumulation_dtype(dtype)
    limit = 1e-13 if dtype == torch.float64 else 3e-7
    assert rel_rms(sums, a.double().sum((2, 3))) <= limit
    assert rel_rms(dots, (a.double() * b.double()).sum((2, 3))) <= limit


def test_long_sums_keep_their_digits(isa):
    x = torch.rand(1, 8, 200, 200).contiguous(memory_format=torch.channels_last)
    assert rel_rms(native.channel_sums(x), x.double().sum((2, 3))) < 5e-7


@pytest.mark.parametrize("with_shift", [False, True])
@pytest.mark.parametrize("with_second", [False, True])
def test_affine(isa, shape, dtype, image, vector, with_shift, with_second):
    n, c = shape[:2]
    acc = accumulation_dtype(dtype)
    x, z = image(shape, dtype), image(shape, dtype)
    s, shift, r = (vector(n, c, acc) for _ in range(3))
    out = native.channel_affine(
        x, s, shift if with_shift else None, z if with_second else None, r if with_second else None
    )
    expected = x.double() * per_channel(s)
    if with_second:
        expected = expected + z.double() * per_channel(r)
    if with_shift:
        expected = expected + per_channel(shift)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert rel_rms(out, expected) <= budget(dtype)


def test_affine_broadcasts_vectors_of_batch_one(isa, image, vector):
    x, z = image((3, 9, 2, 2), torch.float32), image((3, 9, 2, 2), torch.float32)
    s, shift, r = (vector(1, 9, torch.float32) for _ in range(3))
    full = [v.repeat(3, 1) for v in (s, shift, r)]
    assert torch.equal(native.channel_affine(x, s, shift, z, r), native.channel_affine(x, full[0], full[1], z, full[2]))


def test_attention_and_response_normalisation_are_made_of_these(isa, image):
    x = image((2, 24, 5, 6), torch.float32)
    weight, bias, gamma, beta = torch.randn(24, 24), torch.randn(24), torch.randn(24), torch.randn(24)
    gate = torch.sigmoid(torch.nn.functional.linear(native.channel_sums(x) / 30, weight, bias))
    assert rel_rms(native.channel_affine(x, gate), F.cca_gate(x, weight[:, :, None, None], bias)) < 1e-6
    norm = native.channel_dots(x, x).sqrt()
    s = 1 + gamma * norm / (norm.mean(1, keepdim=True) + 1e-6)
    assert rel_rms(native.channel_affine(x, s, beta[None]), F.grn(x, gamma, beta)) < 1e-6


@pytest.mark.parametrize("biased", [False, True])
def test_cca_gate_is_its_three_steps_in_one_call(isa, shape, dtype, image, biased):
    x, c = image(shape, dtype), shape[1]
    weight, bias = torch.randn(c, c).to(dtype), torch.randn(c).to(dtype) if biased else None
    mean, attention = native.channel_attention(native.channel_sums(x), shape[2] * shape[3], weight, bias)
    expected = native.channel_affine(x, attention), mean, attention
    for found, one in zip(native.cca_gate(x, weight, bias), expected, strict=True):
        assert torch.equal(found, one)
        assert found.dtype == one.dtype


def test_same_bits_on_any_number_of_threads(isa, image, vector, same_bits):
    a, b = image((3, 40, 9, 9), torch.float32), image((3, 40, 9, 9), torch.float32)
    s = vector(3, 40, torch.float32)
    same_bits(lambda: (native.channel_sums(a), native.channel_dots(a, b), native.channel_affine(a, s, s, b, s)))


def test_bad_arguments_are_named(image):
    x, v = image((2, 5, 3, 3), torch.float32), torch.zeros(2, 5)
    for named, call in {
        "x has strides": lambda: native.channel_sums(x.contiguous()),
        "b has shape": lambda: native.channel_dots(x, x[:1]),
        "s has shape": lambda: native.channel_affine(x, v[:, :4]),
        "s is torch.float64": lambda: native.channel_affine(x, v.double()),
        "z and r belong together": lambda: native.channel_affine(x, v, z=x),
        "weight has shape": lambda: native.cca_gate(x, torch.zeros(5, 4), None),
        "bias is torch.float64": lambda: native.cca_gate(x, torch.zeros(5, 5), torch.zeros(5).double()),
    }.items():
        with pytest.raises(ValueError, match=named):
            call()
    with pytest.raises(RuntimeError, match="channel_sums: the native kernel runs on cpu only"):
        native.channel_sums(x.to("meta"))


def test_every_float16_value_survives_its_conversions(isa):
    """Subnormals, infinities and every NaN's being one included: float16 is converted by integer operations."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x.reshape(1, 256, 16, 16).contiguous(memory_format=torch.channels_last)
    same = native.channel_affine(x, torch.ones(1, 256))
    assert torch.equal(same.isnan(), x.isnan())
    assert torch.equal(same[~x.isnan()], x[~x.isnan()])
    scale = 1 + torch.rand(1, 256) * 3e-3
    rounded = (x.float() * scale[:, :, None, None]).half()
    ours = native.channel_affine(x, scale)
    assert torch.equal(ours[~rounded.isnan()], rounded[~rounded.isnan()])


@pytest.mark.parametrize("sizes", [(1, 1), (2, 5), (3, 67)], ids=str)
def test_grn_scale(isa, dtype, sizes, vector):
    acc = accumulation_dtype(dtype)
    squares, gamma = vector(*sizes, acc).square(), vector(1, sizes[1], dtype)[0]
    squares[0, 0] = 0
    norm, s = native.grn_scale(squares, gamma, 1e-3)
    exact = squares.double().sqrt()
    response = exact / (exact.mean(1, keepdim=True) + 1e-3)
    tolerance = {"rtol": 1e-13, "atol": 0} if acc == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    assert norm.dtype == s.dtype == acc
    torch.testing.assert_close(norm.double(), exact, **tolerance)
    torch.testing.assert_close(s.double(), 1 + gamma.double() * response, **tolerance)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 5), (3, 67)], ids=str)
def test_gradients_of_grn_scale(isa, dtype, sizes, vector):
    acc = accumulation_dtype(dtype)
    x, gamma, ds = vector(*sizes, acc), vector(1, sizes[1], dtype)[0], vector(*sizes, acc)
    x[0, 0] = 0
    norm, s = native.grn_scale(x.square(), gamma, 1e-3)
    assert torch.equal(native.grn_rescale(norm, gamma, 1e-3), s)
    dgamma, through = native.grn_scale_backward(ds, norm, gamma, 1e-3)
    leaf, each = x.double().requires_grad_(), gamma.double().expand(sizes).clone().requires_grad_()
    size = leaf[:, :, None].norm(dim=2)  # of an image of one pixel: a zero's gradient is zero
    truth = 1 + each * size / (size.mean(1, keepdim=True) + 1e-3)
    exact, exact_gamma = torch.autograd.grad(truth, [leaf, each], ds.double())
    scale = float(ds.double().norm() * (1 + gamma.double().norm()) / (size.detach().mean() + 1e-3))
    limit = 1e-12 if acc == torch.float64 else 1e-5
    assert dgamma.dtype == through.dtype == acc
    assert float((dgamma - exact_gamma).norm()) <= limit * (1 + float(exact_gamma.norm()))
    assert float((through * x - exact).norm()) <= limit * scale
    assert through[0, 0] == 0


def test_grn_scale_names_bad_arguments():
    with pytest.raises(ValueError, match=r"gamma has shape \(4,\)"):
        native.grn_rescale(torch.ones(2, 3), torch.ones(4), 0.0)
    with pytest.raises(ValueError, match=r"dscale has shape \(2, 4\)"):
        native.grn_scale_backward(torch.ones(2, 4), torch.ones(2, 3), torch.ones(3), 0.0)
    with pytest.raises(ValueError, match=r"norm is torch\.float64"):
        native.grn_scale_backward(torch.ones(2, 3), torch.ones(2, 3).double(), torch.ones(3), 0.0)
    with pytest.raises(ValueError, match="gamma has dtype"):
        native.grn_rescale(torch.ones(2, 3), torch.ones(3).int(), 0.0)
    with pytest.raises(ValueError, match=r"squares is torch\.float64"):
        native.grn_scale(torch.ones(2, 3, dtype=torch.float64), torch.ones(3), 0.0)
    with pytest.raises(ValueError, match=r"gamma has shape \(4,\)"):
        native.grn_scale(torch.ones(2, 3), torch.ones(4), 0.0)
