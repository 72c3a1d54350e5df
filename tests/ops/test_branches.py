"""What only the whole branches have: two dtypes, what is saved, recomputing, and products fused into the kernels."""

from __future__ import annotations

import ops_cases
import pytest
import torch
from ops_cases import BRANCHES, CASES, backends, check_against_float64, device_of, outputs_and_gradients
from support import rel_rms, saved_bytes
from torch.utils._python_dispatch import TorchDispatchMode

import dico_kernels as dk
from dico_kernels.ops._backends import BackendError
from dico_kernels.reference import functional as R


@pytest.fixture(params=BRANCHES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [b for b in backends() if b != "triton"])  # Triton's backend has one way only
@pytest.mark.usefixtures("poisoned")
def test_images_large_enough_for_per_sample_products(case, name, dtype):
    """From 64 pixels on the gate's gradient takes another way."""
    with dk.backend(name, strict=True):
        check_against_float64(case, case.arguments((2, 9, 12, 9)), dtype, device_of(name))


def _mixed(case, dtype, shape=(2, 12, 4, 5)):
    x, *rest = case.arguments(shape)
    return [x.float(), *(a.to(dtype) for a in rest)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 4, 5), (2, 7, 12, 9)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_a_float32_stream_beside_narrow_weights(case, backend, device, dtype, shape):
    """The stream keeps float32's digits: with the gate at zero it passes through exactly, and so does its gradient."""
    if backend == "triton" and shape[1] == 7:
        shape = (1, 7, 3, 3)
    arguments = [a.to(device) for a in _mixed(case, dtype, shape)]
    ours = outputs_and_gradients(case.op, arguments)
    truth = outputs_and_gradients(case.definition, [a.double().cpu() for a in arguments])
    narrow = outputs_and_gradients(case.definition, [a.to(dtype).cpu() for a in arguments])
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert all(g.dtype == dtype for g in ours[2:])
    for o, e, t in zip(ours, narrow, truth, strict=True):
        assert rel_rms(o.cpu(), t) <= 2 * rel_rms(e, t) + case.roundings * torch.finfo(dtype).eps / 2
    x, shift, scale, gate, *weights = arguments
    out = case.op(x.requires_grad_(), shift, scale, torch.zeros_like(gate), *weights)
    assert torch.equal(out, x)
    dy = torch.randn_like(out)
    out.backward(dy)
    assert torch.equal(x.grad, dy)


def test_recompute_keeps_less_and_changes_nothing(backend, device):
    for name in ("ffn_half", "fcdm_block"):
        case = CASES[name]
        arguments = [a.to(device) for a in case.arguments((2, 6, 3, 4))]
        sizes = []
        for recompute in (False, True):

            def run(*a, case=case, recompute=recompute):
                return case.op(*a, recompute=recompute)

            results = outputs_and_gradients(run, arguments)
            for a, b in zip(results, outputs_and_gradients(case.op, arguments), strict=True):
                assert rel_rms(a, b) < 1e-13
            leaves = [a.clone().requires_grad_() for a in arguments]
            sizes.append(saved_bytes(run, leaves, leaves[1:]))
        assert sizes[1] < sizes[0]


def test_autocast_keeps_no_copies_of_the_weights(case):
    """Nor of vectors: a training step keeps what it does of a float32 stream beside narrow weights."""
    narrow = [a.requires_grad_() for a in _mixed(case, torch.bfloat16, (2, 16, 4, 5))]
    wide = [a.detach().float().requires_grad_() for a in narrow]
    expected = saved_bytes(case.op, narrow, narrow)
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(case.op, wide, wide) == expected


@pytest.mark.parametrize("shape", [(2, 12, 3, 4), (2, 12, 8, 9)], ids=str)
def test_under_autocast_gradients_have_their_own_dtypes(case, backend, device, shape):
    """Also where conditioning comes from a layer in autocast's; from native's kernels weights' come unrounded."""
    if backend == "triton":
        shape = (1, 7, 3, 3)
    x, *vectors_and_weights = (a.to(device) for a in _mixed(case, torch.bfloat16, shape))
    vectors, weights = vectors_and_weights[:3], [a.float() for a in vectors_and_weights[3:]]
    leaves = [a.requires_grad_() for a in (x, *vectors, *weights)]
    dy = torch.randn(shape, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = case.op(*leaves)
    out.backward(dy)
    narrow = [x, *vectors, *(w.to(torch.bfloat16) for w in weights)]
    narrow = [a.detach().requires_grad_() for a in narrow]
    expected = case.op(*narrow)
    expected.backward(dy)
    assert torch.equal(out, expected)
    for leaf, other in zip(leaves, narrow, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert rel_rms(leaf.grad, other.grad) < 4e-3
    last = [w.grad for w in weights if w.ndim == 4][-1]
    if backend == "native":
        assert not torch.equal(last.bfloat16().float(), last)


def test_nothing_is_saved_without_gradients(case, backend, device):
    arguments = [a.to(device) for a in case.arguments((1, 4, 3, 3))]
    defaults = {"conv_half": (1e-6, False), "ffn_half": (1e-6, False, False)}.get(case.name, (1e-6, 1e-6, False, False))
    defaults = *defaults, None
    out, *saved = getattr(torch.ops.dico_kernels, case.name)(*arguments, *defaults)
    assert out.shape == arguments[0].shape
    assert all(s.numel() == 0 for s in saved)
    arguments[0].requires_grad_()
    out = getattr(torch.ops.dico_kernels, case.name)(*arguments, *defaults)[0]
    with pytest.raises(RuntimeError, match=rf"{case.name} was called with save=False.*pass save=True"):
        out.sum().backward()


@pytest.mark.parametrize(("width", "side"), [(128, 16), (416, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_saved_by_a_block(width, side, dtype):
    """At most 0.33 of eager's for DiCo's, 0.31 for FCDM's, and 0.2 with recomputing."""

    def bytes_of(module, recompute=False):
        def dico(x, shift, scale, gate, *w):
            x = module.conv_half(x, shift, scale, gate, *w[:8])
            options = {"recompute": recompute} if module is dk.ops else {}
            return module.ffn_half(x, shift, scale, gate, *w[8:], **options)

        def fcdm(*args):
            return module.fcdm_block(*args, **({"recompute": recompute} if module is dk.ops else {}))

        def of(fn, shapes):
            arguments = [torch.randn(s).to(dtype) / 8 for s in shapes]
            image = arguments[0].contiguous(memory_format=torch.channels_last).requires_grad_()
            weights = [a.requires_grad_() for a in arguments[1:]]
            return saved_bytes(fn, [image, *weights], weights)

        n, c = 2, width
        stream = [(n, c, side, side), (n, c), (n, c), (n, c)]
        conv = [(c, c, 1, 1), (c,), (c, 1, 3, 3), (c,), (c, c, 1, 1), (c,), (c, c, 1, 1), (c,)]
        ffn = [(2 * c, c, 1, 1), (2 * c,), (c, 2 * c, 1, 1), (c,)]
        norm = [(1, 3 * c, 1, 1), (1, 3 * c, 1, 1)]
        block = [(c, 1, 7, 7), (c,), (3 * c, c, 1, 1), (3 * c,), *norm, (c, 3 * c, 1, 1), (c,)]
        return of(dico, [*stream, *conv, *ffn]), of(fcdm, [*stream, *block])

    eager, ours, less = bytes_of(R), bytes_of(dk.ops), bytes_of(dk.ops, recompute=True)
    for index, (limit, limit_less) in enumerate([(0.33, 0.2), (0.31, 0.2)]):
        assert ours[index] <= limit * eager[index], (ours[index] / eager[index], index)
        assert less[index] <= limit_less * eager[index], (less[index] / eager[index], index)


@pytest.mark.parametrize("products", ["fused", "library"])
@pytest.mark.skipif("native" not in backends(), reason="the extension is not built")
class TestNativeProducts:
    """Both ways to multiply on a CPU: which one "auto" takes depends on processor and dtype."""

    @pytest.fixture(autouse=True)
    def way(self, products):
        with dk.backend("native", strict=True, products=products):
            yield

    @pytest.mark.parametrize("shape", [(2, 24, 5, 6), (3, 17, 8, 8), (1, 5, 1, 1), (2, 64, 12, 9)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.usefixtures("poisoned")
    def test_against_float64(self, case, shape, dtype):
        check_against_float64(case, case.arguments(shape), dtype, "cpu")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_a_float32_stream_beside_narrow_weights(self, case, dtype):
        test_a_float32_stream_beside_narrow_weights(case, "native", "cpu", dtype, (2, 12, 4, 5))

    def test_without_gradients_the_same(self, case):
        arguments = [a.float() for a in case.arguments((2, 24, 5, 6))]
        with torch.no_grad():
            alone = case.op(*arguments)
        assert rel_rms(alone, case.op(*(a.requires_grad_() for a in arguments))) < 1e-6

    def test_the_choice_is_explained(self, case, products):
        arguments = [a.float() for a in case.arguments((1, 16, 4, 4))]
        entries = [row.choice.entry for row in dk.explain(case.op, *arguments)]
        assert ("pointwise" in entries, "adaln_modulate" in entries) == (products == "fused", products == "library")


class TestTritonProducts:
    """Triton's own products with all that surrounds them inside, or with what comes behind them."""

    device = "cuda" if torch.cuda.is_available() else "cpu"

    @pytest.fixture(autouse=True, params=["fused", "mixed"])
    def products(self, request):
        pytest.importorskip("triton", reason="Triton is not installed")
        with dk.backend("triton", strict=True, products=request.param):
            yield request.param

    @pytest.mark.parametrize("shape", [(2, 24, 5, 6), (3, 16, 8, 8), (1, 5, 1, 1)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.usefixtures("poisoned")
    def test_against_float64(self, case, shape, dtype):
        check_against_float64(case, case.arguments(shape), dtype, self.device)

    def test_the_choice_is_explained(self, case, products):
        arguments = [a.float().to(self.device) for a in case.arguments((1, 16, 4, 4))]
        choices = [row.choice for row in dk.explain(case.op, *arguments)]
        assert {choice.backend for choice in choices} == {"triton"}
        entries = [choice.entry for choice in choices]
        if products == "fused":
            assert entries == [f"{case.name}_forward"]
        else:
            assert "pointwise" in entries
            assert not {"gelu", "gated_residual", "channel_affine"} & set(entries)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_a_float32_stream_beside_narrow_weights(self, case, dtype):
        test_a_float32_stream_beside_narrow_weights(case, "triton", self.device, dtype, (2, 12, 4, 5))

    def test_without_gradients_the_same(self, case):
        arguments = [a.float().to(self.device) for a in case.arguments((2, 24, 5, 6))]
        with torch.no_grad():
            alone = case.op(*arguments)
        assert torch.equal(alone, case.op(*(a.requires_grad_() for a in arguments)))
        alone.add_(1)  # an output of its own, not a view

    def test_what_may_be_absent(self, case):
        """Biases: the products then have other epilogues."""
        arguments = case.arguments((2, 12, 4, 5))

        def without(fn):
            def call(*given):
                rest = iter(given)
                return fn(*(None if a.ndim == 1 else next(rest) for a in arguments))

            return call

        given = [a for a in arguments if a.ndim != 1]
        assert len(given) < len(arguments)
        ours = outputs_and_gradients(without(case.op), [a.to(self.device) for a in given])
        for o, t in zip(ours, outputs_and_gradients(without(case.definition), given), strict=True):
            assert rel_rms(o.cpu(), t) < 1e-12


def test_products_of_nobody_are_refused(case):
    with (
        dk.backend("reference", strict=True, products="fused"),
        pytest.raises(BackendError, match=r"products='fused': no backend has"),
    ):
        case.op(*(a.float() for a in case.arguments((1, 8, 4, 4))))


def test_unknown_products_are_refused():
    with (
        pytest.raises(ValueError, match=r"products='blas': expected one of auto, library, mixed, fused"),
        dk.backend("auto", products="blas"),
    ):
        pass


# D, 2D and 4D of every DiCo and every FCDM.
_BOTH = [(width, torch.bfloat16) for width in (128, 256, 512, 1024)] + [(416, torch.float32)]


@pytest.mark.parametrize(("width", "dtype"), [*_BOTH, *[(w, torch.bfloat16) for w in (352, 416, 704, 832, 1408, 1664)]])
def test_dico_at_the_width_of_every_level(width, dtype):
    with dk.backend("native", strict=True):
        for name, k in (("conv_half", width), ("ffn_half", 2 * width)):
            _check_width(name, width, k, dtype)


@pytest.mark.parametrize(("width", "dtype"), [*_BOTH[:-1], (2048, torch.bfloat16), (512, torch.float32)])
def test_fcdm_at_the_width_of_every_level(width, dtype):
    with dk.backend("native", strict=True):
        _check_width("fcdm_block", width, 3 * width, dtype)


def _check_width(name, width, k, dtype):
    """On an 8x8 image, the innermost level's at 256 pixels."""
    shapes = {"conv_half": ops_cases.conv_half, "ffn_half": ops_cases.ffn_half, "fcdm_block": ops_cases.fcdm_block}
    case = ops_cases.Case(name, CASES[name].roundings, lambda n, c, h, w: shapes[name](n, c, h, w, k))
    check_against_float64(case, case.arguments((1, width, 8, 8)), dtype, "cpu")


class _Zeros(TorchDispatchMode):
    """Collects the shapes of the tensors of zeros that are made."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.zeros.default, torch.ops.aten.zeros_like.default):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("name", sorted(CASES))
def test_no_zeros_are_made_for_what_is_saved(name):
    """Autograd would, as the gradients of outputs that nobody differentiates, each of an activation's size."""
    case = CASES[name]
    arguments = [a.float().requires_grad_() for a in case.arguments((2, 5, 4, 4))]
    out = case.op(*arguments)
    out = out if isinstance(out, tuple) else (out,)
    grads = [torch.ones_like(o) for o in out]
    with dk.backend("reference"), _Zeros() as made:
        torch.autograd.backward(out, grads)
    assert not [s for s in made.shapes if len(s) == 4], made.shapes
