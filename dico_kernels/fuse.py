"""fuse and unfuse: swap the classes of modules that are proven to compute what a fused one does.

An instance's ``__class__`` becomes a subclass of its own class, with a forward on ops. Nothing else changes: the
same object holds the same parameters under the same keys, ``isinstance`` holds, and setting the class back undoes it.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dico_kernels._candidates import UnfitError, nominate
from dico_kernels._probe import TOLERANCE, Proof, prove
from dico_kernels.nn._fused import Fused
from dico_kernels.nn._state import forget

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Verdict:
    """What fuse makes of one module.

    Attributes:
        module: its name in the model.
        family: what it looks like.
        fused: whether it runs fused now.
        reason: why it does not; "" where it does.
        figure: the probe's largest relative error, None where structure decided.
        fits: whether fuse() would fuse it, or has.
        recomputes: whether it was fused with ``recompute``.
        checkpoints: whether it is checkpointed in training, as its own forward was.
    """

    module: str
    family: str
    fused: bool
    reason: str
    figure: float | None
    fits: bool
    recomputes: bool = False
    checkpoints: bool = False


_CLASSES: dict[tuple[Any, ...], type[Fused]] = {}


def fused_class(original: type[nn.Module], mixin: type[Fused], options: tuple[tuple[str, Any], ...]) -> type[Fused]:
    """The subclass of a class that runs its forward on ops; made once."""
    key = (original, mixin, options)
    if key not in _CLASSES:
        _CLASSES[key] = _subclass(*key)
    return _CLASSES[key]


def _subclass(original: type[nn.Module], mixin: type[Fused], options: tuple[tuple[str, Any], ...]) -> type[Fused]:
    inputs: tuple[str, ...] = dict(options)["fused_inputs"]
    arity, checkpoints = mixin.fused_arity, dict(options).get("fused_checkpoints", False)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = args + tuple(kwargs[name] for name in inputs[len(args) : arity] if name in kwargs)
        if len(given) == arity == len(args) + len(kwargs) and isinstance(self, mixin):
            if checkpoints and not self.fused_recompute and self.training and torch.is_grad_enabled():
                return checkpoint(functools.partial(mixin.forward, self), *given, use_reentrant=False)
            return mixin.forward(self, *given)
        # Arguments that the fused form does not know; or a bound forward that outlived unfuse.
        return original.forward(self, *args, **kwargs)

    # Code of its own: torch.compile counts recompilations by code object, and unlike classes would share one limit.
    forward.__code__ = forward.__code__.replace(co_name="forward")
    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    forward.__doc__ = original.forward.__doc__

    def reduce_ex(self: Any, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = original.__reduce_ex__(self, max(int(protocol), 2))
        function, args, *rest = reduced
        args = tuple(original if a is cls else a for a in args)
        return (_rebuild, (original, mixin, options, function, args), *rest)

    def fill(namespace: dict[str, Any]) -> None:
        namespace.update(options)
        namespace.update(
            fused_original=original,
            forward=forward,
            __reduce_ex__=reduce_ex,
            _get_name=lambda self: f"{original.__name__}[fused]",
            __module__=original.__module__,
            __qualname__=original.__qualname__,
            __doc__=original.__doc__,
        )

    cls = types.new_class(original.__name__, (mixin, original), exec_body=fill)
    return cls


def _rebuild(
    original: type[nn.Module],
    mixin: type[Fused],
    options: tuple[tuple[str, Any], ...],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> nn.Module:
    """Undo reduce_ex: what copy, pickle and torch.load call."""
    module: nn.Module = function(*args)
    module.__class__ = fused_class(original, mixin, options)
    return module


def is_swapped(module: nn.Module) -> bool:
    """Whether fuse() changed the module's class, wrapped in FSDP2 since or not."""
    return getattr(type(module), "fused_original", None) is not None


def _figure(module: Fused) -> float | None:
    """What the probe found of a module when it was fused; None for one of dico_kernels.nn, or changed since."""
    try:
        candidate = nominate(module) if is_swapped(module) else None
    except UnfitError:
        return None
    return None if candidate is None or candidate.known else prove(module, candidate, type(module)).figure


def _bypassed(form: type[nn.Module]) -> set[str]:
    """Names of the children whose forward a fused class does not call."""
    return {*(path[0] for path, *_ in form.fused_layout), *form.fused_joined} if issubclass(form, Fused) else set()


def _judge(module: nn.Module, sharded: bool) -> tuple[Verdict, type[nn.Module] | None] | None:
    """What to make of a module, and the class to give it; None where it is no candidate."""
    if isinstance(module, Fused):
        reason = module.why_unfused(sharded)
        how = bool(module.fused_recompute), module.fused_checkpoints and not module.fused_recompute
        return Verdict("", module.fused_family, reason is None, reason or "", _figure(module), True, *how), None
    figure: float | None = None
    try:
        candidate = nominate(module)
        if candidate is None:
            return None
        family, cls = candidate.mixin.fused_family, fused_class(type(module), candidate.mixin, candidate.options)
        proof = prove(module, candidate, cls) if not candidate.known else Proof(0.0, "nothing")
        figure = None if candidate.known else proof.figure
    except UnfitError as error:
        family, reason = error.family, str(error)
    except TypeError as error:  # a metaclass or __init_subclass__ that does not want subclasses
        family, reason = type(module).__name__, f"its class cannot be extended ({error})"
    else:
        if proof.holds:
            if proof.checkpoints:
                options = dict(candidate.options) | {"fused_checkpoints": True}
                cls = fused_class(type(module), candidate.mixin, tuple(sorted(options.items())))
            return Verdict("", family, False, "not fused yet: call dico_kernels.fuse", figure, True), cls
        if math.isnan(proof.figure):
            reason = f"the probe could not run it: {proof.where}"
        else:
            reason = f"the probe found {proof.where} off by {proof.figure:.1e} (tolerance {TOLERANCE:.0e})"
    return Verdict("", family, False, reason, figure, False), None


def survey(
    module: nn.Module, name: str = "", seen: set[int] | None = None, sharded: bool = False
) -> Iterator[tuple[nn.Module, Verdict, type[nn.Module] | None]]:
    """Candidates from the outside in, each module once, without the inner layers that a fused form bypasses."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    sharded = sharded or isinstance(module, _fsdp())
    judged, skipped = _judge(module, sharded), set[str]()
    if judged is not None:
        verdict, cls = judged
        skipped = _bypassed(cls or type(module)) if verdict.fits else skipped
        yield module, replace(verdict, module=name), cls
    for key, child in module._modules.items():
        if child is not None and key not in skipped:
            yield from survey(child, f"{name}.{key}" if name else key, seen, sharded)


def _checked(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected an nn.Module")


def _fsdp() -> tuple[type, ...]:
    """FSDP's classes. Nothing is wrapped by what nobody has imported, and importing it takes a second."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()


def _refuse_sharded(model: nn.Module) -> None:
    tensor = sys.modules.get("torch.distributed.tensor")
    sharded = (tensor.DTensor,) if tensor else ()
    remedy = "fuse before wrapping: dico_kernels.fuse(model), then fully_shard(model) or parallelize_module(model, ...)"
    for name, module in model.named_modules():
        if isinstance(module, _fsdp()):
            raise RuntimeError(f"{name or 'model'} is wrapped in FSDP: {remedy}")
        for key, p in module._parameters.items():
            if isinstance(p, sharded):
                raise RuntimeError(f"{name}.{key} is a DTensor: {remedy}")


def fuse(model: Model, *, recompute: bool = False) -> Model:
    """Make every block that is proven equal to a fused one run fused, in place.

    Candidates are found by structure: DiCo's and FCDM's blocks by the published names of their layers, ours, the
    published code's or anyone's, at any width; DiCo's block without conditioning; final layers; GRN in the three
    published layouts. Each is then run against the reference on random weights, once a class and its settings, and
    left alone unless outputs and gradients agree to 1e-5. Nothing is done to a class, only to instances; parameters,
    keys, hooks, ``isinstance``, pickle and deepcopy stay as they were.

    On a CPU dense 3x3 convolutions of 192 pixels or more may go by Winograd's algorithm, in float32 with a smaller
    error, but an infinity in their input may become NaN. A thread that runs the model keeps up to 64 MiB for it.

    Args:
        model: any module, on any device or "meta".
        recompute: have the blocks keep less for backward and compute that anew there: of a feed-forward half, or of
            FCDM's block, the input alone. One product more a block in a training step, for two fifths of what DiCo's
            keeps and three quarters of what FCDM's does. Applies to every block of the model, fused now or before.

    Returns:
        The model itself. Fusing it again in the same way changes nothing.

    Raises:
        TypeError: model is not an nn.Module.
        RuntimeError: model is already sharded (FSDP, tensor parallel): fuse it before.

    Warns:
        RuntimeWarning: candidates were left alone. ``explain(model)`` has every reason.
    """
    _checked(model)
    _refuse_sharded(model)
    left: list[Verdict] = []
    for module, verdict, cls in survey(model):
        if cls is not None:
            try:
                module.__class__ = cls
            except TypeError as error:
                verdict = replace(verdict, fits=False, reason=f"its class cannot be swapped ({error})")
        if not verdict.fits:
            left.append(verdict)
        elif isinstance(module, Fused):
            _set_recompute(module, recompute)
    if left:
        first, more = left[0], f"; and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(
            f"left unfused: {first.module or 'model'}: {first.reason}{more}. explain(model) lists all",
            RuntimeWarning,
            stacklevel=2,
        )
    return model


def _set_recompute(module: Fused, wanted: bool) -> None:
    module.__dict__.pop("fused_recompute", None)
    if module.fused_recompute is not None and wanted:
        module.fused_recompute = True


def unfuse(model: Model) -> Model:
    """Undo fuse, in place: every module has its own class again.

    Args:
        model: any module. Modules built from ``dico_kernels.nn`` stay what they are.

    Returns:
        The model itself.

    Raises:
        TypeError: model is not an nn.Module.
        RuntimeError: a fused module was wrapped in FSDP2 since.
    """
    _checked(model)
    swapped = [(name, m) for name, m in model.named_modules() if is_swapped(m)]
    for name, module in swapped:
        if "fused_original" not in type(module).__dict__:
            raise RuntimeError(f"{name or 'model'} was wrapped after fuse ({type(module).__name__}): unfuse before")
    for module in model.modules():
        if isinstance(module, Fused):
            _set_recompute(module, False)
    for _, module in swapped:
        forget(module)
        module.__class__ = type(module).fused_original
    return model


__all__ = ["Verdict", "fuse", "survey", "unfuse"]
