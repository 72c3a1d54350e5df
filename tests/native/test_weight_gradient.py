"""Gradients of 1x1 convolutions' weights and of the gate behind, on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch

from dico_kernels import native
from dico_kernels._memory import DTYPES
from dico_kernels.dtypes import accumulation_dtype

# samples, pixels, K, C: less than a tile; an odd number of pixels; several tiles, strips, panels and blocks; more
# pixels than one chain sums up, an odd number left over, and more than are packed at a time; more samples than are;
# and where tiles go by turns, all of a strip's
SIZES = [
    (1, 1, 1, 1), (3, 7, 13, 33), (2, 64, 24, 96), (2, 5, 200, 130), (2, 600, 7, 35), (2, 9001, 3, 5), (140, 61, 7, 66),
    (2, 300, 110, 128),
]  # fmt: skip


def close(found, terms, dim, dtype):
    """The terms have signs, so the error is measured by what was summed, not by what is left of it."""
    limit = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 0.6 * torch.finfo(dtype).eps)
    exact = terms.sum(dim)
    return (found - exact).norm() <= limit * exact.norm() + 1e-6 * (dtype != torch.float64) * terms.abs().sum(
        dim
    ).norm()


def given(sizes, dtype, broadcast=False):
    n, pixels, k, c = sizes
    dy, x, weight = (
        torch.randn(n, pixels, k).to(dtype),
        torch.randn(n, pixels, c).to(dtype),
        torch.randn(k, c).to(dtype),
    )
    # rows of a wider matrix, as the chunks of adaLN's projection are
    return dy, x, weight, torch.randn(1 if broadcast else n, 3 * k).to(dtype)[:, k : 2 * k]


def products_of(dy, x, s):
    """G_n s_n in float64."""
    products = dy.double().transpose(1, 2) @ x.double()
    return products if s is None else products * s.double()[:, None]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plain(isa, dtype, sizes):
    dy, x, _, _ = given(sizes, dtype)
    dweight, *nothing = native.weight_gradient(dy, x)
    assert dweight.dtype == dtype
    assert nothing == [None, None]
    _, pixels, k, c = sizes
    terms = dy.double().reshape(-1, k, 1) * x.double().reshape(-1, 1, c) if pixels < 1000 else products_of(dy, x, None)
    assert close(dweight, terms, 0, dtype)


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gated(isa, dtype, sizes, scaled, broadcast):
    dy, x, weight, gate = given(sizes, dtype, broadcast)
    acc, (n, _, k, c) = accumulation_dtype(dtype), sizes
    s = torch.randn(n, c, dtype=acc) if scaled else None
    dweight, dgate, dscale = native.weight_gradient(dy, x, weight, gate, s)
    assert (dweight.dtype, dgate.dtype) == (dtype, acc)
    products, g, w = products_of(dy, x, s), gate.double().expand(n, k)[:, :, None], weight.double()
    assert close(dweight, products * g, 0, dtype)
    assert close(dgate, products * w, 2, acc)
    assert (dscale is not None) == scaled
    if scaled:
        assert dscale.dtype == acc
        assert close(dscale, products_of(dy, x, None) * w * g, 1, acc)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_wide(isa, dtype, sizes):
    """What else is rounded at last."""
    dy, x, weight, gate = given(sizes, dtype)
    acc = accumulation_dtype(dtype)
    for options in ((), (weight, gate)):
        wide = native.weight_gradient(dy, x, *options, wide=True)[0]
        assert wide.dtype == acc
        assert torch.equal(wide.to(dtype), native.weight_gradient(dy, x, *options)[0])
        by = gate.double().expand(sizes[0], sizes[2])[:, :, None] if options else 1
        assert close(wide, products_of(dy, x, None) * by, 0, acc)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_with_a_shift_and_a_bias(isa, dtype, sizes):
    """They change nothing but what they are in."""
    dy, x, weight, gate = given(sizes, dtype)
    acc, (n, _, k, c) = accumulation_dtype(dtype), sizes
    s, shift, bias = torch.randn(n, c, dtype=acc), torch.randn(c).to(dtype), torch.randn(k).to(dtype)
    gated, sums = torch.randn(k, dtype=acc), torch.randn(n, k, dtype=acc)
    dweight, dgate, dscale = native.weight_gradient(dy, x, weight, gate, s, shift, gated, sums, bias)
    _, without, same = native.weight_gradient(dy, x, weight, gate, s)
    assert torch.equal(dscale, same)
    terms = products_of(dy, x, s) * gate.double()[:, :, None]
    assert close(dweight, torch.cat([terms, (gated.double()[:, None] * shift.double())[None]]), 0, dtype)
    assert close(dgate, torch.stack([without.double(), sums.double() * bias.double()]), 0, acc)


def test_many_pixels_lose_no_digits(isa):
    """As one chain of additions their sum would err by 5e-6."""
    dy, x = torch.randn(1, 65536, 3), torch.randn(1, 65536, 5)
    exact = (dy.double().transpose(1, 2) @ x.double())[0]
    assert (native.weight_gradient(dy, x)[0] - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize(("samples", "pixels"), [(1, 1024), (4, 1024), (64, 64)])
def test_packs_a_few_megabytes_at_a_time(isa, samples, pixels):
    """Calls whose memory is more than recordings hold between them are not recorded, see ops/_recorded.py."""
    size = native.extension().weight_gradient_scratch(DTYPES[torch.float32], samples, pixels, 2048, 512)
    sums = 4 * samples * 2 * (2048 * 512 // 16 + 512 * 32)  # of rows and columns, of two parts
    assert size - sums < 7 << 20


def test_infinity_stays_infinite(isa):
    """What fills up the last vector of channels takes no part."""
    dy, ones = torch.zeros(1, 16, 1), torch.ones(1, 16, 3)
    dy[0, 3, 0] = float("inf")
    _, dgate, _ = native.weight_gradient(dy, ones, torch.ones(1, 3), torch.ones(1, 1))
    assert dgate.item() == float("inf")


@pytest.mark.parametrize("sizes", [(0, 4, 3, 5), (2, 0, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0)], ids=str)
def test_of_nothing_there_is_none(isa, dtype, sizes):
    dy, x, weight, gate = given(sizes, dtype)
    s = torch.ones(sizes[0], sizes[3], dtype=accumulation_dtype(dtype))
    for found in native.weight_gradient(dy, x, weight, gate, s):
        assert torch.equal(found, torch.zeros_like(found))


def test_the_same_bits_on_any_number_of_threads(isa, dtype, same_bits):
    dy, x, weight, gate = given((3, 267, 133, 261), dtype)
    s, products = torch.randn(3, 261, dtype=accumulation_dtype(dtype)), torch.randn(3, 133, 261).to(dtype)

    def run():
        dweight = torch.zeros(133, 261, dtype=s.dtype)
        both = native.gated_products(products, weight, gate, s, dweight)
        return [*native.weight_gradient(dy, x, weight, gate, s), *both, dweight]

    same_bits(run)


@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 5, 7), (3, 67, 33), (1, 130, 17)], ids=str)
def test_of_products(isa, dtype, sizes, scaled, broadcast):
    n, k, c = sizes
    acc = accumulation_dtype(dtype)
    products, weight = torch.randn(n, k, c).to(dtype), torch.randn(k, c).to(dtype)
    gate = torch.randn(1 if broadcast else n, k).to(dtype)
    s = torch.randn(n, c, dtype=acc) if scaled else None
    before = torch.randn(k, c, dtype=acc)
    dweight = before.clone()
    dgate, dscale = native.gated_products(products, weight, gate, s, dweight)
    g, w = gate.double().expand(n, k)[:, :, None], weight.double()
    by = torch.ones(n, 1, c, dtype=torch.float64) if s is None else s.double()[:, None]
    limit = 1e-13 if dtype == torch.float64 else 1e-6
    for found, terms, dim in (
        (dweight, torch.cat([before.double()[None], products.double() * g * by]), 0),
        (dgate, products.double() * w * by, 2),
        *([(dscale, products.double() * w * g, 1)] if scaled else []),
    ):
        assert found.dtype == acc
        # The terms have signs, so the error is measured by what was summed, not by what is left of it.
        assert (found - terms.sum(dim)).norm() <= limit * terms.abs().sum(dim).norm()


@pytest.mark.parametrize("scaled", [False, True])
def test_of_products_written_with_a_bias(isa, dtype, scaled):
    """Into memory that holds nothing yet; gates as rows of a wider matrix."""
    n, k, c = 3, 67, 33
    acc = accumulation_dtype(dtype)
    products, weight = torch.randn(n, k, c).to(dtype), torch.randn(k, c).to(dtype)
    gate, bias = torch.randn(n, 3 * k).to(dtype)[:, k : 2 * k], torch.randn(k).to(dtype)
    s, sums = torch.randn(n, c, dtype=acc) if scaled else None, torch.randn(n, k, dtype=acc)
    plain, before = torch.zeros(k, c, dtype=acc), torch.full((k, c), float("nan"), dtype=acc)
    dgate, dscale = native.gated_products(products, weight, gate.contiguous(), s, plain)
    with_bias, same = native.gated_products(products, weight, gate, s, before, sums, bias, False)
    assert torch.equal(before, plain)
    assert (dscale is None) == (same is None)
    assert dscale is None or torch.equal(dscale, same)
    exact = dgate.double() + sums.double() * bias.double()
    assert (with_bias - exact).norm() <= (1e-14 if dtype == torch.float64 else 1e-6) * exact.norm()
    with pytest.raises(ValueError, match="sums is None"):
        native.gated_products(products, weight, gate, s, before, None, bias)
    with pytest.raises(ValueError, match="bias has shape"):
        native.gated_products(products, weight, gate, s, before, sums, bias[:5])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(2, 3, 4)}, r"x has shape \(2, 3, 4\)"),
        ({"x": torch.ones(2, 4, 5).double()}, "x is torch.float64"),
        ({"weight": torch.ones(3, 3)}, r"weight has shape \(3, 3\)"),
        ({"weight": None}, "weight is None"),
        ({"gate": torch.ones(3, 3)}, r"gate has shape \(3, 3\)"),
        ({"gate": None}, "gate is None: expected it with s"),
        ({"s": torch.ones(2, 3)}, r"s has shape \(2, 3\)"),
        ({"shift": torch.ones(3)}, r"shift has shape \(3,\)"),
        ({"gated": None}, "gated is None: expected it with shift"),
        ({"gated": torch.ones(2)}, r"gated has shape \(2,\)"),
        ({"sums": None}, "sums is None: expected it with bias"),
        ({"sums": torch.ones(3, 3)}, r"sums has shape \(3, 3\)"),
        ({"bias": torch.ones(5)}, r"bias has shape \(5,\)"),
    ],
)
def test_what_would_break_memory_is_refused(changed, message):
    arguments = {
        "dy": torch.ones(2, 4, 3), "x": torch.ones(2, 4, 5), "weight": torch.ones(3, 5), "gate": torch.ones(2, 3),
        "s": torch.ones(2, 5), "shift": torch.ones(5), "gated": torch.ones(3), "sums": torch.ones(2, 3),
        "bias": torch.ones(3),
    }  # fmt: skip
    native.weight_gradient(**arguments)
    with pytest.raises(ValueError, match=message):
        native.weight_gradient(**{**arguments, **changed})


def test_products_that_would_break_memory_are_refused():
    with pytest.raises(ValueError, match=r"weight has shape \(3, 3\)"):
        native.gated_products(torch.ones(2, 3, 4), torch.ones(3, 3), torch.ones(2, 3), None, torch.ones(3, 4))
