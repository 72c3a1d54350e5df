"""Dense convolutions as an op: what runs, their gradients, and that nobody notices in a model."""

from __future__ import annotations

import copy

import pytest
import torch
from support import rel_rms
from torch.nn import functional as F

import dico_kernels as dk
from dico_kernels import native
from dico_kernels._linear import loops
from dico_kernels.ops._backends import recording
from dico_kernels.ops.convolution import convolution, pays

# Of 2 images: height, width and outputs where forward and backward are native, only backward, none
BOTH, BACKWARD, NEITHER = (2, 3, 52), (3, 4, 40), (4, 5, 39)


def given(shape, dtype=torch.float64, k=3, bias=False, c=12):
    h, w, outputs = shape
    x = torch.randn(2, c, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    vectors = [torch.randn(outputs, dtype=dtype).requires_grad_()] if bias else []
    return x.requires_grad_(), (torch.randn(outputs, c, k, k, dtype=dtype) / 10).requires_grad_(), *vectors


def gradients(y, *inputs):
    return torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))


@pytest.mark.parametrize("shape", [BOTH, BACKWARD, NEITHER], ids=["both", "backward", "neither"])
@pytest.mark.parametrize(("k", "bias"), [(3, False), (5, True)])
@pytest.mark.parametrize("name", ["native", "reference"])
def test_gradients_and_what_runs(name, k, bias, shape):
    inputs = given(shape, k=k, bias=bias, c=3)
    with dk.backend(name, products="fused"):
        seen = []
        with recording(lambda choice: seen.append(choice.entry)):
            gradients(convolution(*inputs), *inputs)
        results = convolution(*inputs), *gradients(convolution(*inputs), *inputs)
    y = F.conv2d(*inputs, padding=k // 2)
    for ours, exact in zip(results, (y, *gradients(y, *inputs)), strict=True):
        assert rel_rms(ours, exact) < 1e-14
    backward = ["convolution_gradient", "convolution_weight_gradient"]
    expected = {BOTH: ["convolution", *backward], BACKWARD: backward}
    assert seen == (expected.get(shape, []) if name == "native" else [])
    with dk.backend(name, products="fused"):
        assert torch.autograd.gradcheck(convolution, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [BOTH, BACKWARD, NEITHER], ids=["both", "backward", "neither"])
@pytest.mark.parametrize("layout", ["channels_last", "nchw"])
def test_opcheck(shape, dtype, layout):
    x, weight, bias = given(shape, dtype, bias=True)
    if layout == "nchw":
        x = x.detach().contiguous().requires_grad_()
    with dk.backend("auto", products="fused"):
        torch.library.opcheck(torch.ops.dico_kernels.convolution.default, (x, weight, bias))
        dy = torch.randn(2, shape[-1], *shape[:2], dtype=dtype)
        torch.library.opcheck(
            torch.ops.dico_kernels.convolution_backward.default,
            (dy, x.detach(), weight.detach(), True, True),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )


def test_bad_arguments_are_named():
    x, weight = (v.detach() for v in given(BOTH))
    for arguments, named in [
        ((x[0], weight), "x has shape"),
        ((x, weight[:, :5]), r"weight has shape \(52, 5, 3, 3\): expected \(K, 12, k, k\)"),
        ((x, weight[..., :2, :2]), "weight has a 2x2 kernel: expected an odd size"),
        ((x, weight.float()), "weight has dtype torch.float32"),
        ((x, weight, torch.zeros(51)), r"bias has shape \(51,\): expected \(52,\)"),
        ((x, weight, torch.zeros(52)), "bias has dtype torch.float32"),
    ]:
        with pytest.raises(ValueError, match=named):
            convolution(*arguments)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(
    "change", [None, "hook", "patched", "bias", "groups", "strided weight", "dilated", "compiled", "packed"]
)
def test_the_way_up_of_a_model(change, amp):
    """The same output and gradients as of the layers by themselves; whatever is not a plain layer is called."""
    torch.manual_seed(0)
    up = dk.nn.SkipUpsample(32)
    conv = up.up.body[0]
    if change == "hook":
        conv.register_forward_hook(lambda module, args, out: 2 * out)
    elif change == "patched":  # as who wants seamless tiles does
        plain_forward = conv._conv_forward
        conv._conv_forward = lambda x, weight, bias: 2 * plain_forward(x, weight, bias)
    elif change in ("bias", "groups", "dilated"):
        options = {"bias": {"bias": True}, "groups": {"groups": 4}, "dilated": {"dilation": 2, "padding": 2}}[change]
        up.up.body[0] = conv = torch.nn.Conv2d(32, 64, 3, **{"padding": 1, "bias": False, **options})
    elif change == "strided weight":
        conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    elif change == "packed":
        dk.pack(up)
    x, skip = torch.randn(1, 32, 3, 5), torch.randn(1, 16, 6, 10)
    parameters = list(up.parameters())
    call = torch.compile(up, fullgraph=True, backend="aot_eager") if change == "compiled" else up
    with torch.autocast("cpu", enabled=amp), dk.backend("auto", products="fused"):
        seen = []
        with recording(lambda choice: seen.append(choice.entry)), torch.no_grad():
            assert rel_rms(call(x, skip), up.reduce(torch.cat([up.up(x), skip], 1))) < (1e-2 if amp else 1e-6)
        later = []
        with recording(lambda choice: later.append(choice.entry)):
            y = call(x, skip)
        plain = up.reduce(torch.cat([up.up(x), skip], 1))
    slow = amp and loops(torch.bfloat16)
    bypassed = change in (None, "bias", "packed") or (change == "strided weight" and slow)
    # Without gradients packed weights are used, and, where the library has products of autocast's dtype, what PyTorch
    # keeps of weights.
    assert ("convolution" in seen) == (bypassed and (slow or not (amp or change == "packed")))
    assert ("convolution" in later) == bypassed
    for ours, exact in zip(gradients(y, *parameters), gradients(plain, *parameters), strict=True):
        assert rel_rms(ours, exact) < (1e-2 if amp else 1e-5)


DOWN = ("fused", "hook on the pair", "another kernel", "another shuffle", "compiled")


@pytest.mark.parametrize("change", DOWN)
@pytest.mark.parametrize("name", ["DiCo-S", "FCDM-S"])
def test_the_way_down_of_a_model(name, change, monkeypatch):
    """In a dtype that the library multiplies by loops, or as if it did, all plain convolutions of a size are ours."""
    monkeypatch.setattr("dico_kernels.ops.convolution.loops", lambda dtype: dtype == torch.float32)
    model = dk.create_model(name, hidden_size=8, depth=(0,) * 5, num_classes=3).eval()
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    pair = model.down1_2[0]
    if change == "hook on the pair":
        pair.register_forward_hook(lambda module, args, out: 2 * out)
    elif change == "another kernel":
        pair[0] = torch.nn.Conv2d(8, 4, 5, padding=2, bias=False)
    elif change == "another shuffle":
        pair[1] = torch.nn.Sequential(pair[1], torch.nn.Tanh())
    inputs = torch.randn(2, 4, 8, 12), torch.tensor([3, 5]), torch.tensor([0, 2])
    plain = dk.unfuse(copy.deepcopy(model))
    call = torch.compile(model, backend="aot_eager") if change == "compiled" else model
    seen = []
    with dk.backend("auto", products="fused"), recording(lambda choice: seen.append(choice.entry)):
        y = call(*inputs)
    exact = plain(*inputs)
    assert rel_rms(y, exact) < 1e-6
    weights, same = ([p for p in m.parameters() if p.ndim == 4] for m in (model, plain))
    for ours, theirs in zip(gradients(y, *weights), gradients(exact, *same), strict=True):
        assert rel_rms(ours, theirs) < 1e-5
    # Two ways up and two down; of FCDM its first one and the last but for the final layer's.
    everywhere = 4 if name == "DiCo-S" else 6
    assert seen.count("convolution") == {"fused": everywhere, "compiled": 0}.get(change, everywhere - 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["usual", "channels_last"])
def test_many_pixels(layout):
    """By Winograd's algorithm, whatever the weight's layout."""
    weight = torch.randn(64, 32, 3, 3).div(10).to(memory_format=layout).requires_grad_()
    x, bias = torch.randn(2, 32, 16, 16, requires_grad=True), torch.randn(64, requires_grad=True)
    with dk.backend("auto", products="fused"):
        entries = ["convolution", "convolution_gradient", "convolution_weight_gradient"]
        own = native.available() and native.multiplies(weight)
        assert pays(x, weight) == own
        with torch.no_grad():
            assert pays(x, weight) == own
            assert not pays(x[:1, :, :11], weight)
            assert not pays(x.double(), weight.double())
        with torch.autocast("cpu"):
            assert pays(x, weight) == loops(torch.bfloat16)
        seen = []
        with recording(lambda choice: seen.append(choice.entry)):
            y = convolution(x, weight, bias)
            found = gradients(y, x, weight, bias)
        assert seen == (entries if own else [])
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert rel_rms(y, exact) < 1e-6
    for ours, theirs in zip(found, gradients(exact, x, weight, bias), strict=True):
        assert rel_rms(ours, theirs) < 1e-6
    with dk.backend("auto", products="library"):
        assert not pays(x, weight)


def test_pays_where_pixels_are_few(monkeypatch):
    weight = torch.empty(256, 32, 5, 5)  # for which there is no other way
    with dk.backend("auto", products="fused"):
        for x in (torch.empty(1, 32, 8, 8), torch.empty(4, 32, 8, 8, requires_grad=True)):
            assert pays(x, weight)
            with torch.autocast("cpu"):
                # PyTorch keeps cast weights from call to call.
                assert pays(x, weight) == (x.requires_grad or loops(torch.bfloat16))
        for x in (
            *(torch.empty(4, 32, 8, 8), torch.empty(4, 32, 8, 9, requires_grad=True), torch.empty(0, 32, 8, 8)),
            *(torch.empty(32, 8, 8), torch.empty(1, 8, 8, 8), torch.empty(1, 32, 8, 8, dtype=torch.bfloat16)),
            torch.empty(1, 32, 8, 8, device="meta"),
        ):
            assert not pays(x, weight)
        strided = weight.to(memory_format=torch.channels_last)
        assert not pays(torch.empty(1, 32, 8, 8), strided)
        monkeypatch.setattr("dico_kernels.ops.convolution.loops", lambda dtype: dtype == torch.float32)
        for x in (torch.empty(4, 32, 8, 8), torch.empty(1, 32, 8, 8)):
            assert pays(x, weight)
            assert pays(x, strided)
    for name, products in (("auto", "library"), ("reference", "fused")):
        with dk.backend(name, products=products):
            assert not pays(torch.empty(1, 32, 8, 8), weight)
    assert not pays(torch.empty(1, 32, 8, 8).double(), weight.double())


@pytest.mark.parametrize("shape", [BOTH, NEITHER], ids=["native", "library"])
def test_gradients_nobody_asked_for_are_not_computed(shape):
    x, weight = given(shape)
    entries = ["convolution_gradient", "convolution_weight_gradient"]
    for frozen, left, entry in ((x, weight, entries[1]), (weight, x, entries[0])):
        frozen.requires_grad_(False)
        seen = []
        with dk.backend("auto", products="fused"), recording(seen.append):
            (found,) = gradients(convolution(x, weight), left)
        assert rel_rms(found, gradients(F.conv2d(x, weight, padding=1), left)[0]) < 1e-14
        assert [choice.entry for choice in seen[1:]] == ([entry] if shape == BOTH else [])
        frozen.requires_grad_()
    x, weight, bias = (v.detach() for v in given(shape, bias=True))
    (found,) = gradients(y := convolution(x, weight, bias.requires_grad_()), bias)
    assert rel_rms(found, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape).sum((0, 2, 3))) < 1e-14


@pytest.mark.parametrize("shape", [(1, 1, 60), (1, 1, 1), (4, 3, 1), (3, 4, 60)], ids=str)
def test_strides_where_dimensions_of_one_leave_them_open(shape):
    h, w, outputs = shape
    x, weight = torch.randn(2, 1, h, w, requires_grad=True), torch.randn(outputs, 1, 3, 3, requires_grad=True)
    for products in ("library", "fused"):
        with dk.backend("auto", products=products):
            torch.library.opcheck(torch.ops.dico_kernels.convolution.default, (x, weight, None))
            given = torch.randn(2, outputs, h, w), x.detach(), weight.detach(), True, True
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(torch.ops.dico_kernels.convolution_backward.default, given, test_utils=tests)


def test_no_images():
    y = convolution(
        torch.empty(0, 12, 3, 4, requires_grad=True), weight := torch.randn(8, 12, 3, 3, requires_grad=True)
    )
    assert y.shape == (0, 8, 3, 4)
    assert not torch.autograd.grad(y.sum(), weight)[0].any()
