"""The native products with what surrounds them, on every instruction set, against float64."""

from __future__ import annotations

import pytest
import torch
from support import rel_rms, threads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from dico_kernels import _gemm, _linear, _packed, native
from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.reference import functional as R

# batch, inputs, H, W, outputs: one pixel; odd inputs and outputs; rows that are no multiple of a tile; a panel
# of every width; several blocks of rows
SHAPES = [(1, 1, 1, 1, 5), (2, 5, 3, 7, 17), (3, 67, 4, 9, 131), (1, 32, 2, 5, 40), (2, 24, 12, 11, 64)]
BEFORE = ["nothing", "adaLN", "scale", "scale and plus"]
BEHIND = ["nothing", "GELU", "gate", "GELU, product, gate"]


@pytest.fixture(autouse=True)
def _fresh_scratch(monkeypatch):
    """Scratch that is kept between calls would hide what is read before it is written."""
    monkeypatch.setattr(_gemm, "SCRATCH", _gemm.Scratch())


@pytest.fixture
def problem(image, vector):
    """problem(shape, dtype, before, behind, stream): arguments of pointwise, and the result in float64 of the same."""

    def make(shape, dtype, before, behind, stream=None):
        n, c, h, w, k = shape
        last = 9 if "product" in behind else k
        x = image((n, c, h, w), (stream or dtype) if before == "adaLN" else dtype, mean=0.3)
        weight = (torch.randn(k, c, dtype=torch.float64) / c**0.5).to(dtype)
        bias = vector(1, k, dtype)[0]
        options = {}
        a = x.double()
        if before == "adaLN":
            options |= {"shift": vector(n, c, dtype), "scale": vector(1, c, dtype)}
            a = R.adaln_modulate(a, options["shift"].double(), options["scale"].double())
        elif before != "nothing":
            options["s"] = vector(n, c, accumulation_dtype(dtype)).abs()
            a = a * options["s"].double()[:, :, None, None]
            if "plus" in before:
                options["plus"] = vector(1, c, dtype)[0]
                a = a + options["plus"].double()[:, None, None]
        y = F.conv2d(a, weight.double()[:, :, None, None], bias.double())
        if "GELU" in behind:
            options["gelu"] = True
            y = F.gelu(y)
        if "product" in behind:
            options["then"] = (
                (torch.randn(last, k, dtype=torch.float64) / k**0.5).to(dtype),
                vector(1, last, dtype)[0],
            )
            y = F.conv2d(y, options["then"][0].double()[:, :, None, None], options["then"][1].double())
        if "gate" in behind:
            options |= {"gate": vector(n, last, dtype), "residual": image((n, last, h, w), stream or dtype)}
            y = options["residual"].double() + options["gate"].double()[:, :, None, None] * y
        return (x, weight, bias), options, y

    return make


def budget(dtype):
    """A few roundings of a factor, which are that of y's dtype too."""
    return {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1.3 * torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(isa, shape, dtype, problem, before, behind):
    arguments, options, exact = problem(shape, dtype, before, behind)
    y = native.pointwise(*arguments, **options).y
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    error = 2e-7 * exact.numel() ** 0.5 if "GELU" in behind and dtype == torch.float32 else 0  # erf's, absolute
    assert (y - exact).norm() <= budget(dtype) * exact.norm() + error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("before", ["adaLN", "scale"])
def test_a_float32_stream_beside_narrow_weights(isa, dtype, problem, before, behind):
    arguments, options, exact = problem((2, 67, 4, 9, 33), dtype, before, behind, stream=torch.float32)
    y = native.pointwise(*arguments, **options).y
    assert y.dtype == (torch.float32 if "gate" in behind else dtype)
    assert rel_rms(y, exact) <= budget(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_else_is_returned(isa, shape, dtype, problem):
    (x, weight, bias), options, _ = problem(shape, dtype, "adaLN", "GELU")
    found = native.pointwise(x, weight, bias, **options, keep=True, squares=True)
    _, _, before = problem(shape, dtype, "adaLN", "nothing")
    again = native.pointwise(x, weight, bias, shift=options["shift"], scale=options["scale"], statistics=False)
    assert torch.equal(found.before, again.y)
    assert found.before.shape == before.shape
    assert again[1:] == (None, None, None, None)
    acc = accumulation_dtype(dtype)
    assert found.squares.dtype == found.mean.dtype == found.rstd.dtype == acc
    few = 1e-13 if dtype == torch.float64 else 2e-6
    assert rel_rms(found.squares, found.y.double().square().sum((2, 3))) <= few
    _, mean, rstd = native.adaln_modulate(x, options["shift"], options["scale"])
    assert torch.equal(found.mean, mean)
    assert torch.equal(found.rstd, rstd)


def test_hidden_values_are_kept_through_a_second_product(isa, dtype, problem):
    arguments, options, _ = problem((2, 24, 5, 7, 33), dtype, "adaLN", "GELU, product, gate")
    kept = native.pointwise(*arguments, **options, keep=True)
    alone = native.pointwise(*arguments, shift=options["shift"], scale=options["scale"])
    assert torch.equal(kept.before, alone.y)
    assert torch.equal(kept.y, native.pointwise(*arguments, **options).y)


@pytest.mark.parametrize("sizes", [(1, 1), (17, 5), (64, 32), (131, 67), (100, 96)], ids=str)
def test_packed_weights_multiply_to_the_same_bits(isa, sizes, dtype, image):
    k, c = sizes
    x, weight = image((2, c, 3, 5), dtype), torch.randn(k, c, dtype=torch.float64).to(dtype)
    y = native.pointwise(x, weight).y
    for same in (weight.t().contiguous().t(), torch.randn(k, 2 * c + 1).to(dtype)[:, : 2 * c : 2].copy_(weight)):
        assert torch.equal(_gemm.pack(weight), _gemm.pack(same))
    assert _packed.keep(weight, _gemm.pack, _gemm.form())
    assert _packed.packed(weight, _gemm.form()) is not None
    assert torch.equal(native.pointwise(x, weight).y, y)
    others = [i for i in native.isas() if i != isa]
    for other in others[:1]:
        with native.isa(other):  # which reads another layout
            assert _packed.packed(weight, _gemm.form()) is None
            assert rel_rms(native.pointwise(x, weight).y, y) <= budget(dtype)
    weight.add_(1)
    assert _packed.packed(weight, _gemm.form()) is None
    assert not torch.equal(native.pointwise(x, weight).y, y)


def test_kept_weights_are_left_alone_where_that_is_wanted(isa, image):
    """As while training: what is written through .data leaves no trace that a kept weight could be known by."""
    x, weight = image((1, 8, 2, 2), torch.float32), torch.nn.Parameter(torch.randn(8, 8))
    assert _packed.keep(weight, _gemm.pack, _gemm.form())
    before = native.pointwise(x, weight.detach()).y
    weight.data.add_(1)
    assert torch.equal(native.pointwise(x, weight).y, before)
    assert rel_rms(native.pointwise(x, weight, frozen=False).y, before) > 0.1


@pytest.mark.parametrize("device", ["meta"])
def test_scratch_is_the_processors_whatever_the_default_device(isa, device, image):
    x, weight = image((1, 8, 2, 2), torch.float32), torch.randn(8, 8)
    with torch.device(device):
        y = native.pointwise(x, weight).y
        z = native.depthwise(x, torch.ones(8, 1, 3, 3, device="cpu"), None, False)
    assert torch.equal(native.pointwise(x, weight).y, y)
    assert z.is_cpu


def test_rows_of_a_wider_matrix_serve_as_vectors(isa, problem):
    arguments, options, _ = problem((3, 12, 4, 5, 12), torch.float32, "adaLN", "GELU, product, gate")
    options["shift"], options["then"] = torch.randn(3, 12), (torch.randn(12, 12), None)
    options["residual"], options["gate"] = arguments[0], torch.randn(3, 12)
    wide = torch.cat([options["shift"], options["gate"]], 1)
    y = native.pointwise(*arguments, **options).y
    options["shift"], options["gate"] = wide.chunk(2, 1)
    assert torch.equal(native.pointwise(*arguments, **options).y, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_any_number_of_threads_and_in_any_division(isa, dtype, problem, same_bits, monkeypatch):
    arguments, options, _ = problem((2, 40, 13, 11, 70), dtype, "adaLN", "GELU")

    def run():
        return native.pointwise(*arguments, **options, keep=True, squares=True)

    same_bits(run)
    y = run().y
    for rows in ((1, 1), (7, 7), (96, 96)):
        monkeypatch.setattr(_gemm, "_ROWS", rows)
        assert torch.equal(run().y, y)


def test_an_infinity_or_nan_stays_in_its_row(isa, dtype, image):
    x, weight = image((1, 37, 3, 5), dtype), torch.ones(40, 37, dtype=dtype)
    x[0, 3, 1, 2], x[0, 36, 2, 4] = float("nan"), float("inf")
    y = native.pointwise(x, weight).y
    assert y[0, :, 1, 2].isnan().all()
    assert y[0, :, 2, 4].isposinf().all()
    assert int((~y.isfinite()).sum()) == 80


def test_empty_batch(isa):
    x = torch.empty(0, 5, 2, 2).contiguous(memory_format=torch.channels_last)
    assert native.pointwise(x, torch.zeros(7, 5)).y.shape == (0, 7, 2, 2)


X, W, V = torch.zeros(2, 5, 3, 3).contiguous(memory_format=torch.channels_last), torch.zeros(7, 5), torch.zeros(2, 5)
Y, G = torch.zeros(2, 7, 3, 3).contiguous(memory_format=torch.channels_last), torch.zeros(2, 7)


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((X.contiguous(memory_format=torch.contiguous_format), W), {}, "x has strides"),
        ((X, W[:, :4]), {}, r"weight has shape \(7, 4\): expected \(K, 5\) or \(K, 5, 1, 1\)"),
        ((X, W[:0]), {}, r"weight has shape \(0, 5\)"),
        ((X, W.double()), {}, "x is torch.float32 on cpu: expected torch.float64"),
        ((X, W, torch.zeros(5)), {}, r"weight's bias has shape \(5,\)"),
        ((X, W), {"shift": V}, "shift and scale belong together"),
        ((X, W), {"gate": G}, "gate and residual belong together"),
        ((X, W), {"shift": V, "scale": V[:, :4]}, "scale has shape"),
        ((X, W), {"shift": V, "scale": V, "s": V}, "expected adaLN or s"),
        ((X, W), {"gate": G, "residual": Y, "gelu": True}, "of one product GELU or a gate"),
        ((X, W), {"s": V.double()}, "s is torch.float64"),
        ((X, W), {"plus": V[0]}, "s is None: expected it with plus"),
        ((X, W), {"s": V, "plus": V}, "plus has shape"),
        ((X, W), {"gate": G, "residual": X}, "residual has shape"),
        ((X, W), {"then": (W.t(), None)}, "expected a gate with then"),
        ((X, W), {"then": (W, None), "gate": G, "residual": Y}, r"then has shape \(7, 5\): expected \(K, 7\)"),
        ((X, W), {"then": (W.t(), torch.zeros(4)), "gate": V, "residual": X}, "then's bias has shape"),
    ],
)
def test_bad_arguments_are_named(arguments, options, named):
    with pytest.raises(ValueError, match=named):
        native.pointwise(*arguments, **options)


HALVES = {torch.bfloat16, torch.float16}


@pytest.mark.parametrize(("isa", "amx", "looped", "multiplied"), [
    ("v4bf16", False, {torch.float16}, {torch.float32, *HALVES}),
    ("v4bf16", True, {torch.float16}, {torch.float32, torch.float16}),
    ("v4bf16", True, set(), {torch.float32}),
    ("v4", False, set(), {torch.float32}),
    ("v3", False, HALVES, {torch.float32, *HALVES}),
    ("base", False, HALVES, set()),
])  # fmt: skip
def test_where_it_is_as_fast_as_the_library(isa, amx, looped, multiplied, monkeypatch):
    monkeypatch.setattr(_gemm, "_amx", lambda: amx)
    monkeypatch.setattr(_gemm, "loops", lambda dtype: dtype in looped)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    assert {d for d in dtypes if _gemm._multiplies(d, isa)} == multiplied


def test_what_the_library_multiplies_may_be_asked_among_fake_tensors():
    for dtype in (torch.float32, torch.bfloat16):
        expected = _linear._onednn(dtype)
        _linear._onednn.cache_clear()
        with FakeTensorMode():
            assert _linear._onednn(dtype) is expected


def test_which_dtypes_the_library_multiplies_by_loops():
    """What it says agrees with what oneDNN does: it refuses what it has no product of."""
    assert not _linear.loops(torch.float32)
    assert not _linear.loops(torch.float64)
    for dtype in HALVES:
        one = torch.ones(1, 1, dtype=dtype)
        try:
            multiplied = float(torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")) == 1
        except RuntimeError:
            multiplied = False
        assert _linear.loops(dtype) is not multiplied


@pytest.mark.parametrize("behind", BEHIND)
def test_outputs_are_divided_where_rows_do_not_occupy_the_threads(isa, dtype, problem, behind):
    arguments, options, exact = problem((1, 12, 3, 5, 300), dtype, "adaLN", behind)
    found = []
    for count in (1, 2, 3, 16):
        with threads(count):
            found.append(native.pointwise(*arguments, **options, squares=behind == "GELU"))
    assert rel_rms(found[0].y, exact) <= budget(dtype)
    for other in found[1:]:
        same = zip(found[0], other, strict=True)
        assert all(a is b is None or torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("images", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("side", [16, 24, 32, 40, 64])
def test_threads_have_as_many_rows_each(images, side):
    """Of 8, 4 or 2 threads the first has the most blocks, if they are not as many for all."""
    rows, counts = side * side, torch.tensor([2, 4, 8])
    block = _gemm._block_rows(images, rows, 832, 4)
    blocks = images * -(-rows // block)
    most = -(-blocks // counts) * block
    assert block >= 24
    assert (most * counts <= 1.13 * images * rows).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_onednn_is_found_whatever_the_default_device_is(dtype):
    """Asked once a process: a wrong answer would stay."""
    on_the_cpu = _linear._onednn.__wrapped__(dtype)
    with torch.device("meta"):
        assert _linear._onednn.__wrapped__(dtype) == on_the_cpu
    if not on_the_cpu:
        pytest.skip("this torch's oneDNN does not multiply by it")


@pytest.mark.parametrize("shape", [(3, 24), (24,), (2, 3, 24)], ids=str)
def test_linear(isa, dtype, shape):
    x, weight, bias = (torch.randn(s, dtype=torch.float64).to(dtype) for s in (shape, (130, 24), (130,)))
    y = _gemm.linear(x, weight, bias)
    assert y.shape == (*shape[:-1], 130)
    assert y.is_contiguous()
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert (y - exact).norm() <= budget(dtype) * exact.norm()
    if x.ndim == 2:
        assert torch.equal(_gemm.linear(x.t().contiguous().t(), weight, bias), y)
