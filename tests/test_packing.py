"""pack: packed weights are used where they may be, never stale, and nothing else notices them."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from support import rel_rms, run_python
from test_fuse import hard
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

import dico_kernels as dk
from dico_kernels import _gemm, _packed, native, packing
from dico_kernels.nn.pixel_shuffle import FusedUShape
from dico_kernels.ops import pointwise

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a torch with oneDNN")
pytestmark = needs_onednn
NAMES = ["DiCo", "FCDM", "published DiCo"]


@pytest.fixture
def used(monkeypatch):
    """used(call): the call's result, and of how many products in it the weight was packed, and of how many not."""
    found: list[bool] = []

    def spy(weight, form=_packed.ONEDNN):
        kept = _packed.packed(weight, form)
        found.append(kept is not None)
        return kept

    def spy_for(*args):
        kept = _packed.packed_for(*args)
        found.append(kept is not None)
        return kept

    for user in (pointwise, native, packing, _gemm):
        monkeypatch.setattr(user, "packed", spy)
    monkeypatch.setattr(packing, "packed_for", spy_for)

    def run(call):
        found.clear()
        return call(), found.count(True), found.count(False)

    return run


def fused(name, dtype=torch.float32):
    model, inputs = hard(name)
    model, inputs = model.to(dtype), tuple(v.to(dtype) if v.is_floating_point() else v for v in inputs)
    return dk.fuse(model).eval(), inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_same_results(name, dtype, used):
    model, inputs = fused(name, dtype)
    for context in (torch.no_grad, torch.inference_mode):
        dk.unpack(model)
        with context():
            plain, packed, products = used(lambda: model(*inputs))
            assert packed == 0
            up = sum(row.choice.entry == "convolution" for row in dk.explain(model, *inputs))
            assert dk.pack(model) is model
            again, packed, left = used(lambda: model(*inputs))
        layers = sum(isinstance(m, (packing.PackedConv2d, packing.PackedLinear)) for m in model.modules())
        if isinstance(model, FusedUShape):  # the heads of a level's blocks are computed at once, unpacked
            layers -= sum(len(m) for m in model.children() if isinstance(m, nn.ModuleList) and len(m) > 1)
        assert layers > 10
        assert (up > 0) == isinstance(model, FusedUShape)
        assert (packed, left) == (products + layers, 0)
        assert rel_rms(again, plain) <= (1e-6 if dtype == torch.float32 else 4e-3)


REORDERS = """
import torch, dico_kernels as dk
x = torch.randn(1, {inputs}, {side}, {width}).contiguous(memory_format=torch.channels_last)
with torch.no_grad(), dk.backend("auto", products="library"):  # ours has one layout for all sizes
    conv = dk.pack(torch.nn.Conv2d({inputs}, {outputs}, 3, padding=1))
    conv(x)
    print("again", flush=True)
    conv(x)
"""


# Where AVX2's layout for these sizes is another than for a size that is not known.
@pytest.mark.parametrize(("inputs", "outputs", "side", "width"), [(256, 512, 16, 16), (128, 64, 32, 16)])
def test_a_convolution_is_packed_for_the_size_of_its_input(inputs, outputs, side, width, tmp_path):
    script = REORDERS.format(inputs=inputs, outputs=outputs, side=side, width=width)
    done = run_python("-c", script, cwd=tmp_path, ONEDNN_VERBOSE="1")
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("again")
    weight = f"{outputs}x{inputs}x3x3"
    assert [line for line in before.splitlines() if ",reorder," in line and weight in line]
    assert not [line for line in after.splitlines() if ",reorder," in line and weight in line]
    assert ",convolution," in after


@pytest.fixture
def by_winograd(monkeypatch):
    """by_winograd(call): how many convolutions in a call are by Winograd's algorithm."""
    found: list[None] = []
    winograd = native.winograd

    def spy(*args):
        found.append(None)
        return winograd(*args)

    monkeypatch.setattr(native, "winograd", spy)

    def run(call):
        found.clear()
        call()
        return len(found)

    return run


needs_products = pytest.mark.skipif(
    not native.multiplies(torch.empty(1)), reason="needs a processor with multiply-adds, or library products are faster"
)


@needs_products
def test_winograds_algorithm_where_it_is_the_faster_one(by_winograd):
    x = torch.randn(2, 16, 6, 5)
    with torch.no_grad():
        for layer, runs in ((nn.Conv2d(16, 16, 3, padding=1), 1), (nn.Conv2d(16, 15, 3, padding=1), 0)):
            assert by_winograd(lambda: layer(x)) == 0  # noqa: B023
            dk.pack(layer)
            assert by_winograd(lambda: layer(x)) == runs  # noqa: B023
    layer = dk.pack(nn.Conv2d(16, 16, 3, padding=1))
    assert by_winograd(lambda: layer(x)) == 0  # of which gradients are wanted
    with torch.no_grad():
        assert "winograd" in str(dk.explain(layer, x))
        with dk.backend("auto", products="library"):
            assert by_winograd(lambda: layer(x)) == 0
        with dk.backend("reference"):
            assert by_winograd(lambda: layer(x)) == 0
        for isa in native.isas():
            with native.isa(isa):  # whose panels may have another width
                assert by_winograd(lambda: layer(x)) == (isa == native.isas()[0])
        layer.weight.mul_(2)
        assert by_winograd(lambda: layer(x)) == 0


@needs_products
@pytest.mark.parametrize("name", NAMES)
def test_a_packed_model_is_not_less_accurate(name, by_winograd):
    model, inputs = fused(name)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(inputs[0].double(), *inputs[1:])
        plain = rel_rms(model(*inputs), exact)
        dk.pack(model)
        assert rel_rms(model(*inputs), exact) <= 1.2 * plain
        assert by_winograd(lambda: model(*inputs)) >= 2


def test_a_packed_bias_may_have_gaps():
    layer, x = nn.Conv2d(16, 20, 3, padding=1), torch.randn(2, 16, 6, 5)
    layer.bias = nn.Parameter(torch.randn(40)[::2])
    with torch.no_grad():
        plain = layer(x)
        assert rel_rms(dk.pack(layer)(x), plain) <= 1e-6


def test_the_last_two_sizes_of_input_are_kept(used):
    conv = nn.Conv2d(5, 7, 3, padding=1)
    plain = copy.deepcopy(conv)
    dk.pack(conv)
    for size in ((1, 5, 4, 6), (2, 5, 4, 6), (1, 5, 4, 6), (1, 5, 6, 4)):
        for context in (torch.inference_mode, torch.no_grad):
            x = torch.randn(size)
            with context():
                y, packed, _ = used(lambda x=x: conv(x))
                assert packed == 1
                assert rel_rms(y, plain(x)) <= 1e-6
    kept = _packed._PACKED[conv.weight]
    assert [tuple(size) for size in kept.by_size] == [(1, 5, 4, 6), (1, 5, 6, 4)]
    with torch.no_grad():
        conv.weight.mul_(2)
        assert used(lambda: conv(x))[1] == 0
    assert not kept.by_size
    assert rel_rms(conv(x) - conv.bias.view(-1, 1, 1), 2 * (plain(x) - plain.bias.view(-1, 1, 1))) <= 1e-6


@pytest.mark.parametrize("size", [(1, 4, 8, 8), (1, 5, 1, 1)], ids=str)
def test_what_a_plain_convolution_refuses_is_refused_in_its_words(size):
    conv, x = nn.Conv2d(5, 7, 3), torch.randn(size)
    with pytest.raises(RuntimeError) as plain:
        conv(x)
    with torch.no_grad(), pytest.raises(RuntimeError) as packed:
        dk.pack(conv)(x)
    assert str(packed.value) == str(plain.value)


def test_packed_weights_do_not_keep_the_memory_of_the_original(used):
    conv = dk.pack(nn.Conv2d(5, 7, 3))
    was = StorageWeakRef(conv.weight.untyped_storage())
    with torch.no_grad():
        conv(torch.randn(1, 5, 4, 6))
        conv.double()
        assert was.expired()
        assert used(lambda: conv(torch.randn(1, 5, 4, 6).double()))[1] == 0
    assert not _packed._PACKED[conv.weight].by_size


def test_packing_anew_unpacks_what_cannot_be_packed_any_more():
    model = dk.pack(nn.Sequential(nn.Conv2d(5, 7, 3), nn.Linear(4, 3))).double()
    with pytest.warns(RuntimeWarning, match="nothing was packed"):
        dk.pack(model)
    assert [type(m) for m in model] == [nn.Conv2d, nn.Linear]
    assert not any(_packed.holds(m.weight) for m in model)


def test_gradients_and_copies_see_the_originals(used):
    model, inputs = fused("DiCo")
    twin = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    dk.pack(model)
    for m in (model, twin):
        m(*inputs).sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert rel_rms(p.grad, q.grad) <= 1e-6 or float(q.grad.norm()) == 0
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert used(lambda: copy.deepcopy(model)(*inputs))[1] == 0


def test_layers_keep_their_names_and_get_their_class_back():
    model, _ = fused("DiCo")
    shown = repr(model)
    classes = [type(m) for m in model.modules()]
    dk.unpack(dk.pack(dk.pack(model)))
    assert [type(m) for m in model.modules()] == classes
    assert repr(model) == shown
    assert all(v.fused for v in dk.explain(dk.pack(model)).modules)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 1), stride=2, bias=False),
        nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(16, 20, 3, padding=1),
        nn.Conv2d(16, 20, 3, padding=1, bias=False),
        nn.Conv2d(16, 20, 3),
        nn.Conv2d(16, 20, 3, padding=1, stride=2),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Linear(5, 7),
        nn.Linear(5, 7, bias=False),
    ],
    ids=str,
)
def test_any_layer(layer, used):
    """Also one image without a batch, an empty batch, more than two dimensions, and other memory layouts."""
    if isinstance(layer, nn.Linear):
        inputs = [torch.randn(3, 5), torch.randn(5), torch.randn(2, 3, 5), torch.randn(0, 5), torch.randn(5, 4).t()]
    else:
        x = torch.randn(2, layer.in_channels, 9, 8)
        inputs = [x, x[0], x[:0], x.contiguous(memory_format=torch.channels_last), x[:, :, 1:, ::2]]
    with torch.no_grad():
        plain = [layer(x) for x in inputs]
        packs = "reflect" not in str(layer) and "same" not in str(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if packs else "ignore")
            dk.pack(layer)
        for x, y in zip(inputs, plain, strict=True):
            result, packed, left = used(lambda: layer(x))  # noqa: B023
            assert result.shape == y.shape
            assert result.stride() == y.stride() or not x.numel()
            torch.testing.assert_close(result, y, rtol=1e-5, atol=1e-6)
            assert left == 0
            assert packed == (packs and x.numel() > 0 and not (x.ndim == 3 and isinstance(layer, nn.Conv2d)))


def test_transforms_and_tangents_take_the_original(used):
    layer = dk.pack(nn.Linear(5, 7))
    x, v = torch.randn(3, 5), torch.randn(3, 5)
    with torch.no_grad():
        y, packed, _ = used(lambda: torch.func.vmap(layer)(x))
        assert packed == 0
        torch.testing.assert_close(y, layer(x))
        _, tangent = torch.func.jvp(layer, (x,), (v,))
        torch.testing.assert_close(tangent, v @ layer.weight.t())
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, v))).tangent
        torch.testing.assert_close(tangent, v @ layer.weight.t())


def test_compiled_in_one_graph():
    model, inputs = fused("DiCo")
    dk.pack(model)
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
        assert rel_rms(y, model(*inputs)) < 1e-6


def _step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def _step_uncounted(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.01, fused=True).step()


def _replace(model):
    for m in model.modules():
        for key, p in list(m._parameters.items()):
            if p is not None:
                m._parameters[key] = torch.nn.Parameter(p.detach() * 1.01)


CHANGES = {
    "optimiser": _step,
    "optimiser, fused": _step_uncounted,
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.01 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v * 1.01 for k, v in m.state_dict().items()}, assign=True),
    "to": lambda m: m.bfloat16().float(),
    "new parameters": _replace,
    "no_grad": lambda m: [p.mul_(1.01) for p in m.parameters()],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_never_stale(change, used):
    model, inputs = fused("DiCo")
    dk.pack(model)
    with torch.no_grad():
        model(*inputs)
        with torch.enable_grad() if "optimiser" in change else torch.no_grad():
            CHANGES[change](model)
        result, packed, _ = used(lambda: model(*inputs))
        assert packed == 0
        assert rel_rms(result, dk.unfuse(copy.deepcopy(model))(*inputs)) < 1e-5
        dk.pack(model)
        again, packed, left = used(lambda: model(*inputs))
    assert packed
    assert not left
    assert rel_rms(again, result) < 1e-6


def test_tracers_see_a_plain_layer(used):
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    dk.pack(layer)
    with torch.no_grad():
        assert used(lambda: layer(x))[1] == 1
        for traced in (torch.jit.trace(layer, x), make_fx(layer)(x)):
            assert rel_rms(traced(2 * x), layer(2 * x)) < 1e-6
        assert used(lambda: make_fx(layer)(x))[1] == 0


def test_layers_of_any_bias_and_without_outputs():
    layer = nn.Linear(5, 7)
    layer.bias = nn.Parameter(torch.randn(14)[::2])
    x = torch.randn(3, 5)
    with torch.no_grad():
        plain = layer(x)
        assert rel_rms(dk.pack(layer)(x), plain) < 1e-6
        empty = nn.Sequential(layer, nn.Linear(7, 0))
        assert dk.pack(empty)(x).shape == (3, 0)


def test_the_library_multiplies_where_that_is_asked_for(used):
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    with torch.no_grad(), dk.backend("auto", products="library"):
        dk.pack(layer)
        assert _packed.packed(layer.weight, _packed.ONEDNN) is not None
        assert used(lambda: layer(x))[1] == 1


def test_without_onednn_the_originals_run(used, monkeypatch):
    monkeypatch.setattr(_gemm, "_multiplies", lambda *_: False)
    model, inputs = fused("FCDM")
    dk.pack(model)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        assert used(lambda: model(*inputs))[1] == 0


def test_under_autocast_the_cast_weights_run(used):
    model, inputs = fused("DiCo")
    dk.pack(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert used(lambda: model(*inputs))[1] == 0


def test_memory_goes_with_the_model_and_with_unpack():
    gc.collect()
    before = len(_packed._PACKED)
    model, _ = fused("DiCo")
    dk.pack(model)
    assert len(_packed._PACKED) > before
    assert dk.unpack(model) is model
    assert len(_packed._PACKED) == before
    dk.pack(model)
    del model
    gc.collect()
    assert len(_packed._PACKED) == before


@pytest.mark.parametrize("why", [{"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_nothing_to_pack_is_said(why):
    model = dk.fuse(hard("DiCo")[0]).to(**why)
    with pytest.warns(RuntimeWarning, match="nothing was packed: expected convolutions or linear layers"):
        dk.pack(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dk.unpack(model)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("setting", [("padding_mode", "circular"), ("padding", "same"), ("dilation", (2, 2))])
def test_settings_of_a_packed_layer_are_read(setting, channels):
    layer, x = nn.Conv2d(channels, 16, 3, padding=1), torch.randn(2, channels, 8, 8)
    dk.pack(layer)
    setattr(layer, *setting)
    if setting[0] == "padding_mode":
        layer._reversed_padding_repeated_twice = [1, 1, 1, 1]
    with torch.no_grad():
        result = layer(x)
        assert rel_rms(result, dk.unpack(layer)(x)) < 1e-6


def test_a_parametrization_survives_unpack():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    expected = 2 * (model(x) - model[0].bias) + model[0].bias
    dk.pack(model)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", Double())
    with torch.no_grad():
        assert rel_rms(model(x), expected) < 1e-6
        assert rel_rms(dk.unpack(model)(x), expected) < 1e-6


@pytest.mark.parametrize("products", ["library", "auto"])
def test_the_way_up_is_packed_for_whoever_multiplies(products, used):
    torch.manual_seed(0)
    layer = dk.nn.SkipUpsample(16)
    x, skip = torch.randn(1, 16, 4, 4), torch.randn(1, 8, 8, 8)
    with torch.no_grad(), dk.backend("auto", products=products):
        plain = layer(x, skip)
        dk.pack(layer)
        y, packed, left = used(lambda: layer(x, skip))
    assert (packed, left) == (2, 0)  # the dense convolution's, and the 1x1's
    assert type(layer.reduce) is torch.nn.Conv2d  # or the op would be left, and the pixels shuffled in memory
    assert rel_rms(y, plain) < 1e-6
