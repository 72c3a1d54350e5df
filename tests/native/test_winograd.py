"""Native 3x3 convolution by Winograd's algorithm on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from support import rel_rms, threads
from torch.nn import functional as F

from dico_kernels import _gemm, _winograd, native
from dico_kernels._linear import loops
from dico_kernels.dtypes import accumulation_dtype

# images, inputs, height, width, outputs: one pixel, odd everything, images of a tile and less, panels of any width
CASES = [(1, 1, 1, 1, 1), (2, 5, 3, 7, 4), (3, 17, 4, 2, 9), (2, 33, 1, 9, 70), (1, 24, 2, 2, 136), (2, 40, 6, 5, 65)]


def problem(case, dtype, image):
    n, c, h, w, outputs = case
    weight = torch.randn(outputs, c, 3, 3, dtype=torch.float64) / (9 * c) ** 0.5
    return image((n, c, h, w), dtype), weight.to(dtype), torch.randn(outputs, dtype=torch.float64).to(dtype)


def convolve(x, weight, bias=None):
    return native.winograd(x, _winograd.pack(weight), weight.shape[0], bias)


@pytest.fixture(autouse=True)
def _fresh_scratch(monkeypatch):
    """What is kept between calls would hide what is read before it is written."""
    for name in ("SCRATCH", "_WEIGHT"):
        monkeypatch.setattr(_winograd, name, _gemm.Scratch())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(isa, case, dtype, biased, image):
    x, weight, bias = problem(case, dtype, image)
    bias = bias if biased else None
    y = convolve(x, weight, bias)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    # A 16-bit result is one rounding of it.
    assert rel_rms(y, exact) <= {torch.float64: 2e-15, torch.float32: 4e-7}.get(dtype, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_weight_packed_for_the_call(isa, case, dtype, image):
    """The same bits as of one that is kept, in any strides; transposed, too."""
    x, weight, bias = problem(case, dtype, image)
    y = convolve(x, weight, bias)
    gaps = torch.zeros(*weight.shape, 2, dtype=dtype)[..., 0].copy_(weight)
    cut = F.pad(weight, (1, 2, 0, 0, 1, 0))[:, 1:, :, 1:4]  # a row of taps is not three taps from the next
    for same in (weight, weight.to(memory_format=torch.channels_last), gaps, cut):
        assert torch.equal(_winograd.convolve(x, same, bias), y)
    x, bias = image((x.shape[0], weight.shape[0], *x.shape[2:]), dtype), bias.new_ones(weight.shape[1])
    exact = F.conv_transpose2d(x.double(), weight.double(), bias.double(), padding=1)
    for same in (weight, weight.to(memory_format=torch.channels_last), gaps, cut):
        y = _winograd.convolve(x, same, bias, transposed=True)
        assert rel_rms(y, exact) <= {torch.float64: 2e-15, torch.float32: 4e-7}.get(dtype, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("bytes_of_a_block", [None, 0], ids=["at once", "in blocks"])
@pytest.mark.parametrize("case", [*CASES, (4, 20, 11, 19, 35)], ids=str)
def test_weight_gradient(isa, case, dtype, bytes_of_a_block, image, monkeypatch):
    """Of a sum over pixels: the root of their number in roundings; and one of a 16-bit result."""
    if bytes_of_a_block is not None:
        monkeypatch.setattr(_winograd, "_BLOCK_BYTES", bytes_of_a_block)
        monkeypatch.setattr(_winograd, "_TILES", 7)
    x, weight, _ = problem(case, dtype, image)
    dy = image((x.shape[0], weight.shape[0], *x.shape[2:]), dtype)
    dweight = _winograd.weight_gradient(dy, x)
    assert dweight.dtype == dtype
    assert dweight.is_contiguous()
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, dy.double(), padding=1)
    wide = accumulation_dtype(dtype)
    pixels = x[:, 0].numel()
    budget = 2 * torch.finfo(wide).eps * pixels**0.5 + (torch.finfo(dtype).eps / 2 if dtype != wide else 0)
    assert rel_rms(dweight, exact) <= budget


def test_weight_gradient_of_each_tap(isa, image):
    """Of integers, and so exact: inside, across every border, and in an image that has half of a tile."""
    for size in ((6, 8), (5, 7), (1, 1), (3, 2)):
        x, dy = (image((2, c, *size), torch.float32).mul(10).round() for c in (5, 3))
        exact = torch.nn.grad.conv2d_weight(x, (3, 5, 3, 3), dy, padding=1)
        assert torch.equal(_winograd.weight_gradient(dy, x), exact)


def test_weight_gradient_of_many_pixels_keeps_digits(isa, image):
    """A mean, as of activations, makes each sum large."""
    x, dy = (image((2, c, 40, 40), torch.float32) + 1 for c in (16, 24))
    exact = torch.nn.grad.conv2d_weight(x.double(), (24, 16, 3, 3), dy.double(), padding=1)
    plain = torch.nn.grad.conv2d_weight(x, (24, 16, 3, 3), dy, padding=1)
    assert rel_rms(_winograd.weight_gradient(dy, x), exact) <= max(2 * rel_rms(plain, exact), 1e-6)


def test_when_a_weight_is_packed_for_a_call():
    """For many pixels, where native products are the faster ones, as long as what is kept has a bound."""
    weight = torch.empty(64, 32, 3, 3)
    with native.isa("base"):
        assert not _winograd.pays_unpacked(4, 32, 32, weight)
    fast = _gemm.multiplies(weight)
    for given in (weight, weight.to(memory_format=torch.channels_last), weight.transpose(0, 1)):
        assert _winograd.pays_unpacked(4, 32, 32, given) == fast
        assert _winograd.pays_unpacked(1, 12, 16, given) == fast
    assert _winograd.pays_unpacked(4, 32, 32, weight.bfloat16()) == (fast and loops(torch.bfloat16))
    assert _winograd.pays_unpacked(4, 32, 32, weight, torch.bfloat16) == (fast and loops(torch.bfloat16))
    for size, given in [
        *(((1, 12, 15), weight), ((4, 32, 32), weight[:15]), ((4, 32, 32), weight.double())),
        *(((4, 32, 32), torch.empty(64, 32, 5, 5)), ((4, 32, 32), torch.empty(1025, 1024, 3, 3))),
        *(((4, 32, 32), torch.empty(64, 32, 3, 4)[..., :3]), ((4, 32, 32), weight.to("meta"))),
    ]:
        assert not _winograd.pays_unpacked(*size, given)


def test_more_accurate_than_the_definition(isa, image):
    """Fewer roundings: each sum is over the inputs alone."""
    x, weight, bias = problem((2, 256, 8, 8, 64), torch.float32, image)
    for mean in (0, 3):
        exact = F.conv2d((x + mean).double(), weight.double(), bias.double(), padding=1)
        plain = F.conv2d(x + mean, weight, bias, padding=1)
        assert rel_rms(convolve(x + mean, weight, bias), exact) <= rel_rms(plain, exact)


@pytest.mark.parametrize("tap", range(9))
def test_each_tap_at_each_border(isa, tap, image):
    """Of integers, and so exact: of a tile inside, across every border, and in an image that has half of one."""
    weight = torch.zeros(3, 3, 9)
    weight[range(3), range(3), tap] = 4
    weight = weight.view(3, 3, 3, 3)
    for size in ((6, 8), (5, 7), (1, 1)):
        x = image((2, 3, *size), torch.float32).mul(100).round()
        assert torch.equal(convolve(x, weight), F.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_any_number_of_threads(isa, dtype, image, same_bits):
    for case in ((2, 24, 5, 4, 136), (3, 20, 31, 30, 17)):
        x, weight, bias = problem(case, dtype, image)
        same_bits(lambda v=(x, weight, bias): [convolve(*v)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_of_a_weight_gradient(isa, dtype, image, same_bits):
    x, dy = image((3, 20, 31, 30), dtype), image((3, 60, 31, 30), dtype)
    same_bits(lambda: [_winograd.weight_gradient(dy, x)])


def test_same_bits_in_any_division(isa, image, monkeypatch):
    x, weight, bias = problem((3, 20, 9, 11, 150), torch.float32, image)
    whole = convolve(x, weight, bias)
    for division in ((1, 1), (7, 2), (12, 1), (90, 3), (200, 5)):
        monkeypatch.setattr(_winograd, "_division", lambda *_, d=division: d)
        assert torch.equal(convolve(x, weight, bias), whole)


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("outputs", [16, 64, 136, 1024])
def test_threads_share_the_work(count, outputs):
    """The first has the most of it: at most a tenth and a tile more than its share. No buffer outgrows its bound."""
    for tiles in (1, 16, 64, 100, 256, 1024, 5000):
        for inputs in (16, 128, 512, 4096):
            block, parts = _winograd._division(tiles, inputs, outputs, count)
            assert parts == 1 or outputs >= 64 * parts
            most = -(-(-(-tiles // block) * parts) // count) * block / parts
            assert most <= 1.1 * tiles / count + 1, (tiles, inputs)
            assert block <= max(6, min(96, 2**21 // (64 * inputs)))


def test_an_empty_batch(isa, image):
    x, weight, bias = problem((2, 5, 3, 7, 4), torch.float32, image)
    assert convolve(x[:0], weight, bias).shape == (0, 4, 3, 7)
    assert not _winograd.weight_gradient(x[:0, :3].contiguous(memory_format=torch.channels_last), x[:0]).any()


@pytest.mark.parametrize("pixel", [(6, 5), (5, 6), (4, 4), (0, 11)], ids=str)
def test_what_is_not_finite_or_large_stays_under_its_pixel(isa, pixel, image):
    """Nor do its neighbours' neighbours lose digits to it."""
    x, weight, _ = problem((1, 16, 12, 12, 16), torch.float32, image)
    before = convolve(x, weight)
    reached = torch.zeros(12, 12, dtype=torch.bool)
    reached[max(pixel[0] - 1, 0) : pixel[0] + 2, max(pixel[1] - 1, 0) : pixel[1] + 2] = True
    for value in (float("nan"), float("inf"), 1e30):
        x[0, 3, pixel[0], pixel[1]] = value
        y = convolve(x, weight)
        assert torch.equal(y[..., ~reached], before[..., ~reached])
        assert (y[..., reached] != before[..., reached]).all()
        assert value == 1e30 or not y[..., reached].isfinite().any()


def test_scratch_is_a_threads_own(image):
    """Its buffer grows with their number."""
    x, weight, bias = problem((4, 64, 16, 16, 32), torch.float32, image)
    one = convolve(x, weight, bias)
    with threads(7):
        assert torch.equal(convolve(x, weight, bias), one)


def test_bad_arguments_are_named(image):
    x, weight, bias = problem((2, 5, 3, 7, 4), torch.float32, image)
    kept = _winograd.pack(weight)
    for named, call in {
        "x has strides": lambda: native.winograd(x.contiguous(), kept, 4),
        "packed has shape": lambda: native.winograd(x, kept[:-1], 4),
        "packed is torch.float32": lambda: native.winograd(x, kept.float(), 4),
        "bias has shape": lambda: native.winograd(x, kept, 4, bias[:3]),
        "bias is torch.float64": lambda: native.winograd(x, kept, 4, bias.double()),
        r"weight is torch.float32 \(4, 5, 1, 1\): .*\(K, C, 3, 3\)": lambda: _winograd.pack(weight[..., :1, :1]),
        r"weight is torch.int64": lambda: _winograd.pack(weight.long()),
        "weight is torch.float64 on": lambda: _winograd.convolve(x, weight.double()),
        r"weight is torch.float32 \(4, 5, 1, 1\)": lambda: _winograd.convolve(x, weight[..., :1, :1]),
        r"x has 5 channels: expected 4, as weight \(4, 5, 3, 3\) has": lambda: _winograd.convolve(
            x, weight, transposed=True
        ),
        "x has strides ": lambda: _winograd.convolve(x.contiguous(), weight),
        "dy has strides": lambda: _winograd.weight_gradient(x.contiguous(), x),
        r"dy has shape \(1, 5, 3, 7\)": lambda: _winograd.weight_gradient(x[:1], x),
        "dy is torch.float64": lambda: _winograd.weight_gradient(x.double(), x),
    }.items():
        with pytest.raises(ValueError, match=named):
            call()
    with pytest.raises(RuntimeError, match="winograd_pack: the native kernel runs on cpu only"):
        _winograd.pack(weight.to("meta"))
