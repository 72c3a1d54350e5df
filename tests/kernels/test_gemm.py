"""1x1 convolutions with every prologue and epilogue that the blocks use, against float64 of the reference."""

from __future__ import annotations

import math

import pytest
import torch
from support import added_up

from dico_kernels.kernels import common, gemm, tiles
from dico_kernels.reference import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# batch, inputs, outputs, H, W: one of everything; ragged everything, many samples a tile; two 8x8 samples in 128 rows
# and a third in a half-empty tile; samples of whole tiles
SHAPES = [(1, 1, 1, 1, 1), (3, 72, 40, 3, 5), (3, 40, 136, 8, 8), (2, 24, 24, 8, 16)]
EPS = 1e-6


@pytest.fixture(autouse=True)
def _exact_products_in_large_tiles(monkeypatch):
    # the rule remembers what it answered
    tiles.pointwise_tile.cache_clear()
    monkeypatch.setattr(tiles, "_FILL", 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    tiles.pointwise_tile.cache_clear()


def use(capability, monkeypatch, device):
    if device == "cuda" and torch.cuda.get_device_capability()[0] * 10 < capability:
        pytest.skip("needs TMA")
    monkeypatch.setattr(gemm, "capability", lambda x: capability)


@pytest.fixture(
    params=[(torch.float32, 0), (torch.float64, 0), (torch.bfloat16, 0), (torch.bfloat16, 90), (torch.float16, 90)],
    ids=["fp32", "fp64", "bf16", "bf16-tma", "fp16-tma"],
)
def dtype(request, monkeypatch, device):
    """Every type, and for bfloat16 both ways to load operands; wider types know only pointers."""
    use(request.param[1], monkeypatch, device)
    return request.param[0]


@pytest.fixture(params=[0, 90], ids=["pointers", "tma"])
def half(request, monkeypatch, device):
    """bfloat16 with both ways to load operands."""
    use(request.param, monkeypatch, device)
    return torch.bfloat16


def arguments(shape, dtype, random, mean=0.0):
    """x, shift, scale, weight, bias, gate, residual."""
    b, k, n, h, w = shape
    x, residual = random((b, k, h, w), dtype, mean=mean), random((b, n, h, w), dtype)
    weight = (random((n, k, 1, 1), torch.float64) / math.sqrt(k)).to(dtype).contiguous()
    vectors = [random(s, dtype) for s in ((b, k), (b, k), (n,), (b, n))]
    return (x, vectors[0], vectors[1], weight, vectors[2], vectors[3], residual)


def slack(y):
    """What the approximate error function may add to GELU's error."""
    return 0.0 if y.dtype == torch.float64 else 3e-7 * math.sqrt(y.numel())


def normed(x, shift, scale, weight, bias):
    return F.pointwise(F.adaln_modulate(x, shift, scale, EPS), weight, bias)


def run_normed(x, shift, scale, weight, bias, **options):
    modulation = gemm.modulation_terms(weight, bias, shift, scale)
    return gemm.pointwise(x, weight, modulation=modulation, statistics=gemm.row_statistics(x, EPS), **options)


def scaled(x, s, weight, bias, gate, residual):
    return F.gated_residual(residual, F.pointwise(x * F.per_channel(s), weight, bias), gate)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstFloat64:
    def test_bias(self, shape, dtype, random, agree, is_image):
        x, _, _, weight, bias, *_ = arguments(shape, dtype, random)
        y = gemm.pointwise(x, weight, bias).y
        assert is_image(y, dtype)
        agree((y,), F.pointwise, (x, weight, bias))
        agree((gemm.pointwise(x, weight).y,), lambda x, w: F.pointwise(x, w, None), (x, weight))

    def test_adaln(self, shape, dtype, random, agree, is_image):
        inputs = arguments(shape, dtype, random)[:5]
        product = run_normed(*inputs)
        assert is_image(product.y, dtype)
        agree((product.y,), normed, inputs)

    def test_adaln_gelu(self, shape, dtype, random, agree):
        inputs = arguments(shape, dtype, random)[:5]
        product = run_normed(*inputs, gelu=True, keep=True)
        agree((product.before_gelu,), normed, inputs)
        agree((product.y,), lambda *v: F.gelu(normed(*v)), inputs, slack=slack(product.y))
        assert torch.equal(product.y, run_normed(*inputs, gelu=True).y)

    def test_scale_gate_residual(self, shape, dtype, random, agree, is_image):
        x, _, s, weight, bias, gate, residual = arguments(shape, dtype, random)
        y = gemm.pointwise(x, weight, bias, scale=s, gate=gate, residual=residual).y
        assert is_image(y, dtype)
        agree((y,), scaled, (x, s, weight, bias, gate, residual))

    def test_gate_residual(self, shape, dtype, random, agree):
        x, _, _, weight, bias, gate, residual = arguments(shape, dtype, random)
        y = gemm.pointwise(x, weight, bias, gate=gate, residual=residual).y
        agree(
            (y,), lambda x, w, b, g, r: F.gated_residual(r, F.pointwise(x, w, b), g), (x, weight, bias, gate, residual)
        )

    @pytest.mark.parametrize("channel", ["sums", "squares"])
    def test_channel_sums(self, channel, shape, dtype, random):
        """Of the stored, rounded result, in the accumulation type."""
        product = run_normed(*arguments(shape, dtype, random)[:5], gelu=True, channel=channel)
        y = product.y.double()
        assert product.sums.dtype == common.accumulation_dtype(dtype)
        terms = y if channel == "sums" else y * y
        error = (added_up(product.sums) - terms.sum((2, 3))).abs()
        assert (error <= 2e-6 * terms.abs().sum((2, 3))).all()

    def test_partials_of_the_result(self, shape, dtype, random):
        x, _, _, weight, bias, gate, residual = arguments(shape, dtype, random)
        product = gemm.pointwise(x, weight, bias, gate=gate, residual=residual, partials=True)
        width = product.partials.width
        moments = product.partials.moments.double()
        rows = product.y.permute(0, 2, 3, 1).reshape(moments.shape[2], -1).double()
        for (mean, squares), run in zip(moments, rows.split(width, 1), strict=True):
            expected = run.mean(1)
            assert torch.allclose(mean, expected, rtol=0, atol=1e-6)
            assert torch.allclose(squares, (run - expected[:, None]).square().sum(1), rtol=1e-5, atol=1e-10)


def test_a_real_width(half, random, agree):
    """DiCo-XL's first level; 416 is no multiple of any tile."""
    inputs = arguments((1, 416, 416, 8, 8), half, random)
    agree((run_normed(*inputs[:5]).y,), normed, inputs[:5])
    x, _, s, weight, bias, gate, residual = inputs
    y = gemm.pointwise(x, weight, bias, scale=s, gate=gate, residual=residual).y
    agree((y,), scaled, (x, s, weight, bias, gate, residual))


@pytest.mark.parametrize("source", ["rows", "partials"])
@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0, 1000.0, "rows", "outliers"])
def test_layer_norm_of_difficult_rows(mean, dtype, source, random, agree):
    """Means far above the deviation, different in each row, or a few channels that dominate all others."""
    inputs = list(arguments((2, 200, 40, 3, 5), dtype, random, mean=mean if isinstance(mean, float) else 0.0))
    x = inputs[0].double()
    if mean == "rows":
        x += 10 * torch.randn(2, 1, 3, 5, dtype=torch.float64, device=x.device)
    if mean == "outliers":
        x[:, ::37] *= 100
    # a product that is x itself, for its partials
    one = torch.eye(200, dtype=dtype, device=x.device)
    product = gemm.pointwise(x.to(dtype).contiguous(memory_format=torch.channels_last), one, partials=True)
    assert torch.equal(product.y, x.to(dtype))
    x, shift, scale, weight, bias = product.y, *inputs[1:5]
    statistics = product.partials if source == "partials" else gemm.row_statistics(x, EPS)
    modulation = gemm.modulation_terms(weight, bias, shift, scale)
    result = gemm.pointwise(x, weight, modulation=modulation, statistics=statistics, eps=EPS)
    agree((result.y,), normed, (x, shift, scale, weight, bias))
    double = x.double()
    assert torch.allclose(result.statistics.mean.double(), double.mean(1), rtol=2e-7, atol=1e-6)
    rstd = 1 / torch.sqrt(double.var(1, correction=0) + EPS)
    # sum(x^2) - mean^2 in float32 would be wrong by 1e-4 at 30 deviations
    assert torch.allclose(result.statistics.rstd.double(), rstd, rtol=1e-5, atol=0)


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_eps(eps, random, agree):
    x, shift, scale, weight, bias = arguments((1, 32, 8, 2, 2), torch.float64, random)[:5]
    x = x * 1e-3
    modulation = gemm.modulation_terms(weight, bias, shift, scale)
    partials = gemm.pointwise(x, torch.eye(32, dtype=x.dtype, device=x.device), partials=True).partials
    for statistics in (gemm.row_statistics(x, eps), partials):
        y = gemm.pointwise(x, weight, modulation=modulation, statistics=statistics, eps=eps).y
        agree(
            (y,),
            lambda x, a, b, w, c: F.pointwise(F.adaln_modulate(x, a, b, eps), w, c),
            (x, shift, scale, weight, bias),
        )


@pytest.mark.parametrize("hw", [(3, 5), (8, 8)], ids=str)
def test_broadcast_vectors(hw, half, random):
    """One vector for all samples, or one each that are equal: the same bits."""
    x, shift, scale, weight, bias, gate, residual = arguments((3, 24, 40, *hw), half, random)

    def run(*single):
        a, b, g = (v[:1] if i in single else v[:1].repeat(3, 1) for i, v in enumerate((shift, scale, gate)))
        norm = run_normed(x, a, b, weight, bias, gate=g, residual=residual, channel="sums")
        return norm.y, norm.sums, gemm.pointwise(x, weight, bias, scale=b, gate=g, residual=residual).y

    expected = run()
    for single in ((0,), (1,), (2,), (0, 1, 2)):
        assert all(torch.equal(a, b) for a, b in zip(run(*single), expected, strict=True))


def test_same_bits_every_time(half, random, repeats):
    x, shift, scale, weight, bias, gate, residual = arguments((3, 40, 72, 8, 8), half, random)

    def run():
        product = run_normed(x, shift, scale, weight, bias, gate=gate, residual=residual, partials=True, channel="sums")
        return product.y, product.partials.moments, product.sums

    repeats(run)


def test_samples_of_a_batch_do_not_touch(half, random):
    """NaN in one sample stays there, whatever tiles it shares with others."""
    for hw in ((3, 5), (8, 8), (8, 16)):
        x, shift, scale, weight, bias, gate, residual = arguments((3, 24, 40, *hw), half, random)
        for v in (x, shift, scale, gate, residual):
            v[1] = float("nan")
        product = run_normed(x, shift, scale, weight, bias, gate=gate, residual=residual, channel="sums")
        scaled = gemm.pointwise(x, weight, bias, scale=scale, gate=gate, residual=residual).y
        for v in (product.y, product.sums, scaled):
            assert v[[0, 2]].isfinite().all()
            assert v[1].isnan().all()


def test_projection_is_not_rounded_to_the_type(dtype, random):
    vectors, weight = random((5, 40), dtype), random((24, 40), dtype)
    y = gemm.project(vectors, weight)
    expected = vectors.double() @ weight.double().t()
    assert y.dtype == common.accumulation_dtype(dtype)
    assert (y - expected).norm() <= 1e-6 * expected.norm()


class TestConfigurations:
    """What is launched, from recordings."""

    def launch(self, monkeypatch, dtype=torch.bfloat16, capability=90, size=8, offset=0, **options):
        monkeypatch.undo()
        b, c = 128, 128
        x = torch.ones(b * c * size * size + offset, dtype=dtype)[offset:].view(b, size, size, c).permute(0, 3, 1, 2)
        with common.record(capability) as launches:
            gemm.pointwise(x, torch.ones(512, c, dtype=dtype), **options)
        return launches[-1]

    @pytest.mark.parametrize(("size", "samples"), [(7, 0), (8, 2), (15, 0), (16, 1)])
    def test_samples_in_a_tile(self, size, samples, monkeypatch):
        launch = self.launch(monkeypatch, size=size, scale=torch.ones(128, 128, dtype=torch.bfloat16))
        assert (launch.constants["SAMPLES"], launch.constants["BM"]) == (samples, 128)
        shared = self.launch(monkeypatch, size=size, scale=torch.ones(1, 128, dtype=torch.bfloat16))
        assert shared.constants["SAMPLES"] == 1

    def test_descriptors_where_they_can_be_used(self, monkeypatch):
        assert self.launch(monkeypatch).constants["TMA"]
        assert not self.launch(monkeypatch, offset=1).constants["TMA"]
        assert not self.launch(monkeypatch, capability=80).constants["TMA"]

    @pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32")])
    def test_float32_follows_torchs_setting(self, setting, expected, monkeypatch):
        torch.set_float32_matmul_precision(setting)
        assert self.launch(monkeypatch, dtype=torch.float32).constants["PRECISION"] == expected

    def test_tiles(self):
        for m in (1, 64, 4096, 1 << 20):
            for n, k in ((1, 1), (24, 40), (416, 1664), (5000, 352)):
                for dtype in DTYPES:
                    for capability in (0, 80, 90, 100, 120):
                        t = tiles.pointwise_tile(m, n, k, dtype, capability, True)
                        assert all(tiles.pow2(side) == side >= 16 for side in (t.m, t.n, t.k))
                        assert (t.m + t.n) * t.k * dtype.itemsize * t.stages <= 99 * 1024
                        assert not t.tma or (capability in (90, 100) and k * dtype.itemsize % 16 == 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the interpreter has nothing in flight")
@pytest.mark.parametrize("prologue", ["none", "scale", "norm"])
@pytest.mark.parametrize(("n", "side", "fill"), [(64, 32, 0), (64, 8, 0), (1, 32, 128)])
def test_no_step_overwrites_what_another_still_reads(prologue, n, side, fill, device, monkeypatch):
    """Of a product of many steps in many programs. Small integers: exact in any order, so that one wrong bit shows.

    In tiles of one sample, of two, and in the small ones of a small batch.
    """
    monkeypatch.setattr(tiles, "_FILL", fill)
    tiles.pointwise_tile.cache_clear()

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, device=device).to(torch.bfloat16)

    k, outputs = 416, 256
    x = integers(-2, 2, n, k, side, side).contiguous(memory_format=torch.channels_last)
    weight, s = integers(-1, 1, outputs, k), integers(1, 2, n, k)
    scaled = x if prologue == "none" else x * s[:, :, None, None]
    exact = torch.einsum("nkhw,ok->nohw", scaled.float(), weight.float()).to(torch.bfloat16)
    options = {}
    if prologue == "scale":
        options = {"scale": s}
    elif prologue == "norm":
        nothing = torch.zeros(n, outputs, device=device)
        pixels = torch.zeros(n, side, side, device=device)
        rows = gemm.Statistics(pixels, pixels + 1)
        options = {"modulation": gemm.Modulation(s, nothing, nothing), "statistics": rows}
    for _ in range(100):
        assert torch.equal(gemm.pointwise(x, weight, **options).y, exact)


def test_descriptors_want_rows_at_multiples_of_sixteen_bytes(monkeypatch):
    monkeypatch.setattr(gemm, "capability", lambda x: 90)
    x = torch.empty(1, 64, dtype=torch.bfloat16, device="meta")
    row = torch.empty(1, 67, dtype=torch.bfloat16, device="meta")[:, :64]  # contiguous, for it is one row
    assert row.is_contiguous()
    assert gemm._tile(x, x, False).tma
    assert not gemm._tile(x, row, False).tma
