"""Proof that a candidate's own forward is what the fused one computes.

Both run on a shadow of the module: objects of the same classes and settings that hold random weights of the same
shapes, so that the model's parameters are neither read nor written. The fused forward runs as it will, on
``reference.functional`` in place of the ops. Two regimes: "hard" weights, where every path carries signal, with every
gradient compared, in training mode; and "tiny" inputs and biases, where each eps decides the result, in evaluation.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dico_kernels._candidates import CALLED, Candidate, original_class
from dico_kernels.nn._fused import Fused
from dico_kernels.nn._state import EVERY_MODULE
from dico_kernels.reference import functional

# A forward may compute parts in float32, and wide ones are run in it. A tanh GELU is off by 1e-4 and more.
TOLERANCE = 1e-5
_WIDE = 256  # channels from which float32 is used: as exact as it need be, and several times cheaper
_LARGE = 1 << 18  # elements from which a weight's own gradient is not compared
_PERIOD = 65_537  # prime, so that no two rows of a weight are alike
_TINY = 1e-3  # squared, the eps of LayerNorm


@dataclass(frozen=True)
class Proof:
    """What the probe found.

    Attributes:
        figure: the largest relative error (rms) of any output or gradient; NaN where the forward did not run.
        where: what had it, or the exception.
        checkpoints: whether the own forward, a block's, keeps hardly anything for backward, because it checkpoints.
    """

    figure: float
    where: str
    checkpoints: bool = False

    @property
    def holds(self) -> bool:
        """Whether the two agree."""
        return self.figure <= TOLERANCE


@functools.cache
def _pool(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(20251121)
    return torch.randn(_PERIOD, generator=generator, dtype=torch.float64, device="cpu").to(dtype)


class _Numbers:
    """Normal numbers by the million, cheaply: one pool, read round and round from another start each time."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.start = dtype, 0

    def __call__(self, *shape: int, gain: float = 1.0) -> Tensor:
        pool, count = _pool(self.dtype), math.prod(shape)
        self.start = (self.start + 7919) % _PERIOD
        if self.start + count > _PERIOD:
            pool = pool.repeat(-(-(self.start + count) // _PERIOD))
        return pool[self.start : self.start + count].reshape(shape) * gain


class _Modulation(nn.Module):
    """Stands for adaLN_modulation: its output depends on c, so that a c changed on the way is noticed."""

    def __init__(self, base: Tensor, dependence: float) -> None:
        super().__init__()
        self.base, self.dependence = base, dependence

    def forward(self, c: Tensor) -> Tensor:
        wanted = self.base.shape[1]
        return self.base * (1 + self.dependence * torch.tanh(c).repeat(1, -(-wanted // c.shape[1]))[:, :wanted])


def _weight(numbers: _Numbers, path: str, shape: tuple[int, ...], tiny: bool) -> Tensor:
    if path.startswith("norm") and len(shape) == 1 and path.endswith("weight"):
        return 1 + numbers(*shape, gain=0.3)
    if len(shape) == 4 and max(shape) != math.prod(shape):
        gain = 3.0 if path.startswith("ca.") else 1.0  # so that the sigmoid is not half of everything
        return numbers(*shape, gain=gain / math.sqrt(math.prod(shape[1:])))
    small = tiny and not path.endswith("gamma")
    return numbers(*shape, gain=0.1 * _TINY if small else 0.5)


def _leaf(p: Tensor) -> Tensor:
    return p.requires_grad_(p.numel() < _LARGE)


def _shadow(module: nn.Module, numbers: _Numbers, training: bool, stub: nn.Module, path: str = "") -> nn.Module:
    """The module again, with its settings, without its weights, hooks and adaLN_modulation."""
    clone = object.__new__(original_class(module) if not path else type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__["training"] = training
    prefix = f"{path}." if path else ""
    clone.__dict__["_parameters"] = {
        name: p if p is None else _leaf(_weight(numbers, prefix + name, tuple(p.shape), not training))
        for name, p in module._parameters.items()
    }
    clone.__dict__["_modules"] = {
        name: stub if not path and name == CALLED else child and _shadow(child, numbers, training, stub, prefix + name)
        for name, child in module._modules.items()
    }
    return clone


def _case(candidate: Candidate, training: bool, numbers: _Numbers) -> tuple[Tensor, Tensor]:
    """An input and what adaLN_modulation makes of the conditioning before it depends on c."""
    c, k = candidate.channels, candidate.chunks
    n, h, w = (2, 3, 4) if training else (1, 5, 3)
    shape = (n, h, w, c) if candidate.image_last else (n, c, h, w)
    if training:
        return numbers(*shape), numbers(n, k * c, gain=0.7)
    base = numbers(n, k, c, gain=0.7)
    if candidate.residual:
        # What the second norm of two sees has to stay tiny, and what enters GRN has to be.
        base[:, 2 if k == 6 else slice(0, 0)] *= _TINY
        if k == 3:
            base[:, 0] *= 0.1 * _TINY
            base[:, 1] = -1 + 0.1 * _TINY * base[:, 1]
    return numbers(*shape, gain=_TINY if candidate.residual or candidate.chunks else 0.1 * _TINY), base.reshape(n, -1)


def _error(actual: Tensor, expected: Tensor) -> float:
    """rms(actual - expected) / rms(expected), inf where only one of them is zero or the shapes differ."""
    if actual.shape != expected.shape:
        return math.inf
    size = float(expected.detach().norm())
    difference = float((actual.detach() - expected.detach()).norm())
    return 0.0 if difference == 0 else difference / size if size else math.inf


class _ForeignError(Exception):
    """Somebody else's forward or backward raised; anything may come out of it."""


@contextmanager
def _foreign() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _ForeignError(f"{type(error).__name__}: {error}") from error


def _compare(
    module: nn.Module, candidate: Candidate, fused: type[Fused], training: bool, dtype: torch.dtype, kept: list[Tensor]
) -> Iterator[tuple[str, float]]:
    """Each thing compared, with its error; gradients in training mode. Adds what the own forward keeps for these."""
    numbers = _Numbers(dtype)
    x, base = (v.requires_grad_() for v in _case(candidate, training, numbers))
    shadow = _shadow(module, numbers, training, _Modulation(base, 0.5 if training else 0.0))
    inputs = (x, numbers(x.shape[0], _conditioning_width(module, candidate))) if candidate.chunks else (x,)

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with _foreign(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        own = original_class(module).forward(shadow, *inputs)
        if not isinstance(own, Tensor) or not own.requires_grad:
            raise TypeError(f"it returns {type(own).__name__}, without a gradient")
    shadow.__class__ = fused
    with _foreign():  # ours, of whatever the module holds
        expected = fused.compute(shadow, functional, *inputs)  # type: ignore[arg-type]
    through = x.detach() if candidate.residual and own.shape == x.shape else 0
    given = {t.untyped_storage().data_ptr() for t in (x, *(p for _, p in _named(shadow)))}
    kept[:] = {t.untyped_storage().data_ptr(): t for t in kept if t.untyped_storage().data_ptr() not in given}.values()
    mode = "hard weights" if training else "tiny inputs"
    yield f"the output ({mode})", _error(own - through, expected - through)
    if not training or own.shape != expected.shape:
        return
    leaves = {"x": x, **({"the conditioning": base} if candidate.chunks else {}), **dict(_named(shadow))}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    upstream = numbers(*expected.shape)
    with _foreign():
        theirs = torch.autograd.grad((own * upstream).sum(), list(leaves.values()), allow_unused=True)
    ours = torch.autograd.grad((expected * upstream).sum(), list(leaves.values()), allow_unused=True)
    for (name, leaf), a, b in zip(leaves.items(), theirs, ours, strict=True):
        zero = torch.zeros_like(leaf)
        yield f"the gradient of {name}", _error(zero if a is None else a, zero if b is None else b)


def _conditioning_width(module: nn.Module, candidate: Candidate) -> int:
    """Width of the c that the module is made for; nobody asks for it but the stub."""
    head = module._modules.get(CALLED)
    linears = [m.in_features for m in head.modules() if isinstance(m, nn.Linear)] if head is not None else []
    return linears[0] if linears else candidate.channels


def _named(shadow: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, p in shadow._parameters.items():
        if p is not None:
            yield prefix + name, p
    for name, child in shadow._modules.items():
        if child is not None:
            yield from _named(child, f"{prefix}{name}.")


@contextmanager
def _one_thread() -> Iterator[None]:
    """A few pixels are not worth waking threads for, and waiting for them on a busy machine takes seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(module: nn.Module, candidate: Candidate, fused: type[Fused], modes: tuple[bool, ...]) -> Proof:
    dtypes = [torch.float32] if candidate.channels > _WIDE else [torch.float64, torch.float32]
    # Whatever surrounds the caller: meta or GPU as the default device, no_grad, autocast, a seed that must not move.
    with (
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
        _one_thread(),
    ):
        warnings.simplefilter("ignore")
        for dtype in dtypes:  # float32 again where a forward fixes it
            found = Proof(0.0, "nothing")
            try:
                for training in modes:
                    kept: list[Tensor] = []
                    for where, error in _compare(module, candidate, fused, training, dtype, kept):
                        if not error <= found.figure:
                            found = replace(found, figure=error, where=where)
                    if training and candidate.residual:  # a block: it keeps many images, or one at most
                        image = math.prod(_case(candidate, training, _Numbers(dtype))[0].shape)
                        found = replace(found, checkpoints=sum(t.numel() for t in kept) <= image)
                break
            except _ForeignError as error:
                found = Proof(math.nan, str(error))
    return found


def _relative(value: Any, channels: int) -> Any:
    """A setting, as a multiple of the width where it is one."""
    if isinstance(value, (tuple, list)):
        return tuple(_relative(v, channels) for v in value)
    if isinstance(value, dict):
        return tuple((k, _relative(v, channels)) for k, v in value.items())
    whole = isinstance(value, int) and not isinstance(value, bool)
    return ("width", value // channels) if whole and value >= channels >= 8 and value % channels == 0 else value


def _settings(module: nn.Module, channels: int, path: str = "") -> Iterator[Any]:
    """Everything that tells this module from another of its class, but for its width."""
    yield path, type(module)
    for name, p in module._parameters.items():
        yield name, None if p is None else _relative(tuple(p.shape), channels)
    for name, value in module.__dict__.items():
        if name not in EVERY_MODULE:
            yield name, _relative(value, channels)
    for name, child in module._modules.items():
        if child is not None and (path or name != CALLED):
            yield from _settings(child, channels, f"{path}.{name}")


_PROOFS: weakref.WeakKeyDictionary[type, dict[Any, Proof]] = weakref.WeakKeyDictionary()


def prove(module: nn.Module, candidate: Candidate, fused: type[Fused]) -> Proof:
    """Run the probe, or remember it.

    In full once a class and its settings; at every other width, its output alone.

    Args:
        module: the candidate; neither it nor the random state is touched.
        candidate: what it was nominated for.
        fused: the class it would become.
    """
    cls = original_class(module)
    known = _PROOFS.setdefault(cls, {})
    settings = tuple(_settings(module, candidate.channels))
    key = (cls.forward, replace(candidate, channels=0), settings)
    try:
        hash(key)
    except TypeError:  # a setting that cannot be compared
        return _run(module, candidate, fused, (True, False))
    full = known.get(key)
    if full is None:
        full = known[key] = known[(*key, candidate.channels)] = _run(module, candidate, fused, (True, False))
    if not full.holds:
        return full
    exact = (*key, candidate.channels)
    if exact not in known:
        known[exact] = replace(_run(module, candidate, fused, (False,)), checkpoints=full.checkpoints)
    return known[exact]
