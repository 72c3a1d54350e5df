"""The ops as torch sees them: opcheck, compilation, autocast, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from ops_cases import BRANCHES, CASES, outputs_and_gradients, tuple_of
from support import rel_rms
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dico_kernels as dk

# What the public functions add: eps, and of the branches whether to save, whether to recompute, and autocast's dtype.
DEFAULTS = {
    **dict.fromkeys(("adaln_modulate", "gated_residual_adaln", "depthwise_adaln", "grn"), (1e-6,)),
    "conv_half": (1e-6, True, None),
    "ffn_half": (1e-6, True, False, None),
    "fcdm_block": (1e-6, 1e-6, True, False, None),
}


def torch_op(case):
    return getattr(torch.ops.dico_kernels, case.name).default


def with_defaults(case, arguments):
    return (*arguments, *DEFAULTS.get(case.name, ()))


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(case, place, layout, dtype):
    def prepare(a):
        a = a.to(place, dtype)
        if a.ndim == 4 and layout == "channels_last":
            a = a.contiguous(memory_format=torch.channels_last)
        elif a.ndim == 4 and layout == "permuted":
            a = a.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
        return a.requires_grad_()

    arguments = [prepare(a) for a in case.arguments((2, 6, 3, 4))]
    torch.library.opcheck(torch_op(case), with_defaults(case, arguments))


@pytest.mark.parametrize("name", BRANCHES)
def test_opcheck_with_the_dtype_of_autocast(name, place):
    case = CASES[name]
    arguments = [a.to(place, torch.float32).requires_grad_() for a in case.arguments((2, 6, 3, 4))]
    torch.library.opcheck(torch_op(case), (*arguments, *DEFAULTS[name][:-1], torch.bfloat16))


@pytest.mark.parametrize("shape", [(2, 6, 3, 4), (1, 1, 1, 1)], ids=str)
def test_opcheck_of_the_backward_ops(case, place, shape):
    """Their arguments, as autograd hands them over."""
    seen = []
    name = f"{case.name}_backward"
    op = getattr(torch.ops.dico_kernels, name).default

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is op:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Catch():
        outputs_and_gradients(case.op, [a.to(place).float() for a in case.arguments(shape)])
    assert len(seen) == 1
    torch.library.opcheck(op, seen[0], test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


def test_compiles_whole_with_new_batch_and_resolution(case, place):
    torch._dynamo.reset()
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3, 8, 4, 6), (2, 8, 6, 10), (5, 8, 3, 7)):
        arguments = [a.to(place).float() for a in case.arguments(shape)]
        ours = outputs_and_gradients(compiled, arguments)
        for a, b in zip(ours, outputs_and_gradients(case.op, arguments), strict=True):
            assert torch.equal(a, b)


def test_compiles_with_inductor(place):
    torch._dynamo.reset()

    def chain(x, weight, bias, shift, scale, gate):
        h = dk.ops.adaln_modulate(x * 1.5, shift, scale)
        h = dk.ops.cca_gate(h, weight, bias)
        return dk.ops.gated_residual(x, h, gate).relu()

    x, weight, bias = (a.to(place).float() for a in CASES["cca_gate"].arguments((2, 8, 4, 6)))
    vectors = [torch.randn(2, 8, device=place) for _ in range(3)]
    arguments = [x, weight, bias, *vectors]
    compiled = outputs_and_gradients(torch.compile(chain, fullgraph=True), arguments)
    for a, b in zip(compiled, outputs_and_gradients(chain, arguments), strict=True):
        assert rel_rms(a, b) < 1e-6


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(case, place, stream):
    """Parameters in float32, activations in either: the dtypes of eager, gradients in each argument's own."""
    lower = case.name in ("pointwise_depthwise_gelu", "depthwise_adaln", "cca_gate", "pixel_shuffle_skip")
    images = {"gated_residual": 2, "gated_residual_adaln": 2, "pixel_shuffle_skip": 2}.get(case.name, 1)
    arguments = [a.to(place) for a in case.arguments((2, 12, 4, 5))]
    arguments = [a.to(stream) if i < images else a.float() for i, a in enumerate(arguments)]
    leaves = [a.clone().requires_grad_() for a in arguments]
    with torch.autocast(place, torch.bfloat16):
        outs = tuple_of(case.op(*leaves))
    truth = tuple_of(case.definition(*(a.double() for a in arguments)))
    for out, exact in zip(outs, truth, strict=True):
        assert out.dtype == (torch.bfloat16 if lower else stream)
        assert rel_rms(out, exact) < 2e-2
    torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype
        assert torch.isfinite(leaf.grad).all()


def test_autocast_leaves_float64_alone(case, place):
    with torch.autocast(place, torch.bfloat16):
        outs = tuple_of(case.op(*(a.to(place) for a in case.arguments((1, 4, 2, 2)))))
    assert all(o.dtype == torch.float64 for o in outs)


def test_outputs_may_be_changed_in_place(case, backend, device):
    """As a model does that adds to its stream in place: outputs are no views."""
    arguments = [a.to(device) for a in case.arguments((2, 4, 3, 3))]
    if case.name == "gated_residual_adaln":  # its backward reads the first output, as a sigmoid's does: refused
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            outputs_and_gradients(lambda *a: tuple(o.mul_(3) for o in case.op(*a)), arguments)
        return
    plain = outputs_and_gradients(lambda *a: tuple(o * 3 for o in tuple_of(case.op(*a))), arguments)
    changed = outputs_and_gradients(lambda *a: tuple(o.mul_(3) for o in tuple_of(case.op(*a))), arguments)
    for a, b in zip(changed, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gradients", [False, True])
def test_who_looks_on_sees_every_op(case, gradients):
    """A call that nobody watches goes past the dispatcher, one that somebody does may not."""
    seen = []

    class Modes(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(str(op))
            return op(*args, **(kwargs or {}))

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    arguments = [a.float().requires_grad_() for a in case.arguments((2, 4, 3, 3))]
    with torch.set_grad_enabled(gradients):
        expected = case.op(*arguments)
        for watch in (Modes(), Functions(), torch.autograd.profiler.profile()):
            seen.clear()
            with watch:
                found = case.op(*arguments)
            if not seen:
                seen += [e.name for e in watch.function_events]
            assert any(f"dico_kernels.{case.name}" in name.replace("::", ".") for name in seen), seen
            assert all(map(torch.equal, tuple_of(found), tuple_of(expected)))


def test_the_same_gradients_past_the_dispatcher(case, place):
    arguments = [a.to(place).float() for a in case.arguments((2, 6, 3, 4))]
    direct = outputs_and_gradients(case.op, arguments)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            return op(*args, **(kwargs or {}))

    with Watch():
        dispatched = outputs_and_gradients(case.op, arguments)
        by_library = tuple_of(case.op(arguments[0].requires_grad_(), *arguments[1:]))[0].grad_fn
    itself = tuple_of(case.op(arguments[0].requires_grad_(), *arguments[1:]))[0].grad_fn
    assert type(itself).__name__ == f"{case.name}Backward" != type(by_library).__name__
    assert all(map(torch.equal, direct, dispatched))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_tensor_may_be_a_number(gradients):
    x, vector = torch.randn(2, 6, 3, 4, requires_grad=gradients), torch.randn(2, 6)
    for eps in (torch.tensor(0.5), torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)):
        assert torch.equal(dk.ops.adaln_modulate(x, vector, vector, eps), dk.ops.adaln_modulate(x, vector, vector, 0.5))


def test_ops_within_somebodys_op_leave_gradients_to_it(case):
    first, *others = (a.float().requires_grad_() for a in case.arguments((2, 4, 3, 3)))

    @torch.library.custom_op(f"dico_tests::around_{case.name}", mutates_args=())
    def around(x: torch.Tensor) -> torch.Tensor:
        return tuple_of(case.op(x, *others))[0]

    assert not around(first.detach()).requires_grad


def test_graphs_of_backward_passes_hold_the_ops():
    from torch.fx.experimental.proxy_tensor import make_fx

    def gradient(x, branch, gate):
        return torch.autograd.grad(dk.ops.gated_residual(x, branch, gate).square().sum(), gate)[0]

    arguments = [a.float() for a in CASES["gated_residual"].arguments((2, 4, 3, 3))]
    arguments[2].requires_grad_()
    for pre_dispatch in (False, True):
        graph = make_fx(gradient, pre_dispatch=pre_dispatch)(*arguments)
        assert torch.allclose(graph(*arguments), gradient(*arguments))


@pytest.mark.parametrize("kind", ["negated", "zero"])
def test_tensors_that_are_not_their_memory(kind):
    x, branch, gate = torch.randn(1, 1, 1, 1), torch.randn(1, 1, 1, 1), torch.randn(1, 1)
    other = torch._neg_view(gate) if kind == "negated" else torch._efficientzerotensor(1, 1)
    expected = x - gate[:, :, None, None] * branch if kind == "negated" else x
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(dk.ops.gated_residual(x.requires_grad_(), branch, other), expected)


def test_batched_gradients():
    x, branch, gate = (torch.randn(s, requires_grad=True) for s in ((2, 3, 4, 4), (2, 3, 4, 4), (2, 3)))
    y, many = dk.ops.gated_residual(x, branch, gate), torch.randn(3, 2, 3, 4, 4)
    found = torch.autograd.grad(y, (x, branch, gate), many, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(many):
        expected = torch.autograd.grad(y, (x, branch, gate), one, retain_graph=True)
        assert all(rel_rms(a[i], b) < 1e-6 for a, b in zip(found, expected, strict=True))


def test_no_tensors_are_refused_by_the_schema(case):
    with torch.no_grad(), pytest.raises(RuntimeError, match=case.name):
        case.op(*([1.0],) * len(case.arguments((2, 4, 3, 3))))


def test_gradients_nobody_asked_for_are_none(case):
    arguments = [a.float() for a in case.arguments((2, 4, 3, 3))]
    for index in range(len(arguments)):
        leaves = [a.clone().requires_grad_(i == index) for i, a in enumerate(arguments)]
        sum(o.sum() for o in tuple_of(case.op(*leaves))).backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == index for i in range(len(leaves))]


class TestRefused:
    def test_second_derivatives(self, case):
        leaves = [a.requires_grad_() for a in case.arguments((1, 3, 2, 2))]
        outs = tuple_of(case.op(*leaves))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # gated_residual's gradient in x is the output's own: only its branch meets the backward op
            of = leaves[1 if case.name == "gated_residual" else 0]
            (gradient,) = torch.autograd.grad(sum(o.square().sum() for o in outs), of, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivatives of fused ops are not supported.*reference"):
            gradient.square().sum().backward()

    def test_vmap(self, case):
        arguments = case.arguments((1, 3, 2, 2))
        batched = [a.expand(2, *a.shape) for a in arguments]
        with pytest.raises(RuntimeError, match=r"does not support torch.func.vmap"):
            torch.func.vmap(case.op)(*batched)

    def test_forward_mode(self, case):
        arguments = tuple(case.arguments((1, 3, 2, 2)))
        with pytest.raises(RuntimeError, match=r"does not support forward-mode AD"):
            torch.func.jvp(case.op, arguments, tuple(torch.ones_like(a) for a in arguments))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"does not support forward-mode AD"):
            case.op(forward_ad.make_dual(arguments[0], torch.ones_like(arguments[0])), *arguments[1:])
