"""Registration: one place where an op gets its schema, kernels, fake, gradient, autocast and refusals.

Through ``torch.library.Library`` and not ``custom_op``: a call costs about a third less. Every op is functional and
returns tensors of its own. A ``*_backward`` op gets a gradient formula that refuses: without one, differentiating it
twice would only warn, and a gradient penalty would come out as if it were absent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from dico_kernels._recording import is_recording

NAMESPACE = "dico_kernels"
_LIB = Library(NAMESPACE, "DEF")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

Op = Callable[..., Any]
_unpack_dual: Op = forward_ad.unpack_dual
_pre_dispatch_modes: Op = torch._ops._len_torch_dispatch_stack_pre_dispatch


def register(
    schema: str,
    kernel: Op,
    fake: Op,
    *,
    setup_context: Op | None = None,
    backward: Op | None = None,
    autocast: str | None = None,
) -> Op:
    """Register an op as ``torch.ops.dico_kernels.NAME`` and return a function that calls it.

    Args:
        schema: ``NAME(arguments) -> results`` in torch's schema language.
        kernel: the implementation for CPU and CUDA tensors; chooses the backend itself.
        fake: the same results' shapes, dtypes and strides without data; validates as the kernel does.
        setup_context: saves what backward needs; without backward, differentiating the op is refused.
        backward: gradient formula; called only if an output has a gradient, the others' are None.
        autocast: "activation": every floating tensor follows the first one's dtype, as torch's promoting elementwise
            ops do; "lower": all are cast to autocast's dtype, as its matrix products are; "branch": all but the first
            are, the residual stream, which keeps its own, by the op itself, whose last argument is that dtype, None for
            the tensors' own: a training step then keeps what it was given, and weights' gradients come unrounded;
            None: nothing is, as in a backward pass, whose tensors have their dtypes, and autocast is kept from the
            products inside.
    """
    name = schema.split("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    if autocast == "branch":
        kernel, fake = _narrowing(kernel), _narrowing(fake)
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: Any = getattr(torch.ops.dico_kernels, name).default
    arguments = op._schema.arguments
    for key in ("CPU", "CUDA"):
        _LIB.impl(name, _refuse_forward_mode(name, _refuse_none(arguments, kernel)), key)
    torch.library.register_fake(qualified, _refuse_none(arguments, fake), lib=_LIB)
    setup_context = setup_context or _save_nothing
    if backward is None:
        backward = _refuse_second_derivative(name)
    else:
        setup_context, backward = _without_zeros(setup_context, backward)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIB)
    torch.library.register_vmap(qualified, _refuse_vmap(name), lib=_LIB)
    for device, key in _AUTOCAST_KEYS.items():
        _LIB.impl(name, _refuse_none(arguments, _autocast(op, device, key, autocast)), key)
    # In the kernel, too: torch.func.jvp strips tangents before the kernel, a caller of torch.ops skips this one.
    checked = _refuse_none(arguments, _refuse_forward_mode(name, op))
    differentiable = _differentiable(name, kernel, setup_context, backward)
    takes = tuple(_TAKES[str(argument.real_type)] for argument in arguments)

    def call(*args: Any) -> Any:
        # Who records wants to see what the kernel does, and has made sure that nothing else takes part. Where nothing
        # else does, the dispatcher would come to the same kernel, by way of 4 to 6 us more of Python, and of 25 more
        # where autograd takes part.
        if torch.compiler.is_compiling():
            return checked(*args)
        if is_recording():
            return kernel(*args)
        if not _comes_to_the_kernel(args, takes):
            return checked(*args)
        return differentiable(*args) if _differentiates(args) else kernel(*args)

    return call


def _differentiable(name: str, kernel: Op, setup_context: Op, backward: Op) -> Op:
    """The kernel with its gradient, as torch.library would have it, without the dispatcher."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = kernel(*args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    apply: Op = function.apply
    return apply


def _lowered(value: Any, dtype: torch.dtype | None) -> Any:
    """A floating tensor in a dtype, if there is one; float64 is left alone, as torch's own autocast does."""
    if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


def _narrowing(kernel: Op) -> Op:
    """The kernel of a branch, for which all but its first argument are cast to the last, a dtype, if there is one."""

    def call(*args: Any) -> Any:
        *given, dtype = args
        return kernel(*given) if dtype is None else kernel(given[0], *(_lowered(a, dtype) for a in given[1:]))

    return call


def kept(ctx: Any, inputs: int) -> list[Any]:
    """What a branch saved, of which so many are its arguments: all but the first as its kernel had them.

    ctx.dtype is the branch's last argument. Where it is one, gradients are wide, and autograd casts those of arguments
    that are not.
    """
    return [_lowered(t, ctx.dtype) if 0 < i < inputs else t for i, t in enumerate(ctx.saved_tensors)]


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _differentiates(args: tuple[Any, ...]) -> bool:
    """Whether autograd would note a call: not within an op of somebody's that has a gradient of its own."""
    if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*args):
        return False
    return not torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


PLAIN: set[type] = {Tensor, torch.nn.Parameter}
_NUMBERS: set[type] = {int, float, bool}
# The types that the kernel may be given where a schema names these. The dispatcher takes others: it makes a number of
# a number's tensor, and refuses what it cannot make one of.
_TAKES: dict[str, set[type]] = {
    "Tensor": PLAIN,
    "Optional[Tensor]": PLAIN | {type(None)},
    "float": _NUMBERS,
    "bool": _NUMBERS,
    "Optional[ScalarType]": {torch.dtype, type(None)},
}


def _comes_to_the_kernel(args: tuple[Any, ...], takes: tuple[set[type], ...]) -> bool:
    """Whether no mode, profiler, tracer or transform sees a call, and the dispatcher has at most autograd to ask.

    takes: the types that each argument may have for that.
    """
    if len(args) != len(takes) or not _unwatched():
        return False
    if torch._C._len_torch_function_stack() or torch._C._autograd._profiler_enabled():
        return False
    device = None
    for a, types in zip(args, takes, strict=True):
        if type(a) not in types:
            return False
        if type(a) in PLAIN:
            found = _device_of(a)
            if found is None or found != (device or found):
                return False
            device = found
    return device is not None and not torch.is_autocast_enabled(device)


# The device of tensors that have these dispatch keys and are their memory.
_PLAIN_KEYS: dict[int, str] = {}


def _device_of(x: Tensor) -> str | None:
    """The kind of x's device; None if x is not its memory: sparse, negated, all zero, or batched by torch.vmap."""
    keys = torch._C._dispatch_keys(x).raw_repr()
    found = _PLAIN_KEYS.get(keys)
    if found is None and x.device.type in _AUTOCAST_KEYS and x.device.type not in _PLAIN_KEYS.values():
        for inference in (False, True):
            with torch.inference_mode(inference):
                plain = torch.empty(0, device=x.device.type)
            _PLAIN_KEYS[torch._C._dispatch_keys(plain).raw_repr()] = x.device.type
        found = _PLAIN_KEYS.get(keys)
    return found


def only_numbers(x: Any, *more: Any) -> bool:
    """Whether a call on these, of one device, is for numbers alone: no gradients, autocast, tracing or transforms."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not {type(x), *map(type, more)} <= PLAIN:
        return False
    return _unwatched() and not autocasting(x)


def _unwatched() -> bool:
    """Whether no transform, tracer or mode wants to see what is called; for where torch.compile is not at work."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch._C._get_tracing_state() is not None or _pre_dispatch_modes():
        return False
    return torch._C._len_torch_dispatch_stack() <= int(is_recording())


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for x's kind of device."""
    device = x.device.type
    return device in _AUTOCAST_KEYS and torch.is_autocast_enabled(device)


def _autocast(op: Op, device: str, key: str, policy: str | None) -> Op:
    """torch.library.register_autocast fixes one dtype; this one asks what autocast's is at the call."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def call(*args: Any) -> Any:
        if policy is None:
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*args)
        first: Tensor = args[0]
        dtype = first.dtype if policy == "activation" else torch.get_autocast_dtype(device)
        if not first.is_floating_point() or first.dtype == torch.float64:
            dtype = first.dtype  # as torch's own autocast: float64 is left alone

        with torch._C._ExcludeDispatchKeyGuard(excluded):
            if policy == "branch":
                stream = first if first.dtype == torch.float32 else _lowered(first, dtype)
                tensors = [a for a in args[1:] if isinstance(a, Tensor)]
                return op(stream, *args[1:-1], None if all(t.dtype == dtype for t in tensors) else dtype)
            return op(*(_lowered(a, dtype) for a in args))

    return call


def _without_zeros(setup_context: Op, backward: Op) -> tuple[Op, Op]:
    """Spare autograd the zeros that it would make, in full size, as the gradients of what an op saves."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup_context(ctx, inputs, output)

    def gradient(ctx: Any, *grads: Tensor | None) -> Any:
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    return setup, gradient


def _refuse_second_derivative(name: str) -> Op:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"dico_kernels.{name} cannot be differentiated: second derivatives of fused ops are not supported. "
            "Run the part that needs them under dico_kernels.reference, or unfused."
        )

    return backward


def _refuse_none(arguments: Any, kernel: Op) -> Op:
    """The dispatcher takes None for any tensor, as an undefined one; the kernel would fail without naming it."""
    required = tuple((i, a.name) for i, a in enumerate(arguments) if str(a.type) == "Tensor")

    def checked(*args: Any) -> Any:
        for i, name in required:
            if args[i] is None:
                raise TypeError(f"{name} is None: expected a tensor")
        return kernel(*args)

    return checked


def _refuse_forward_mode(name: str, kernel: Op) -> Op:
    """Without this, forward-mode AD would go on with the tangents dropped, as if the op were a constant."""

    def checked(*args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(
            isinstance(a, Tensor) and _unpack_dual(a).tangent is not None for a in args
        ):
            raise RuntimeError(
                f"dico_kernels.{name} does not support forward-mode AD (jvp); use reverse mode, or "
                "dico_kernels.reference"
            )
        return kernel(*args)

    return checked


def _refuse_vmap(name: str) -> Op:
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise RuntimeError(
            f"dico_kernels.{name} does not support torch.func.vmap; its batch dimension N already is one, or use "
            "dico_kernels.reference"
        )

    return vmap


def reduce_to(gradient: Tensor, like: Tensor) -> Tensor:
    """A per-sample gradient (N, C) as that of a conditioning vector: summed if it was broadcast, in its dtype."""
    if like.shape[0] == 1 and gradient.shape[0] != 1:
        gradient = gradient.sum(0, keepdim=True)
    return gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)


def only_needed(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients, None where nobody asked."""
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=True))
