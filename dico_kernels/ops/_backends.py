"""Which implementation runs, and why: one table, one question asked of each backend in turn.

A backend is a set of functions under the names of the kernel interface (``adaln_modulate``, ``depthwise_backward``,
...) and a predicate that selects it or says why not.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dico_kernels import native

VARIABLE = "DICO_KERNELS_BACKEND"
STRICT_VARIABLE = "DICO_KERNELS_STRICT"
PRODUCTS_VARIABLE = "DICO_KERNELS_PRODUCTS"
# Who multiplies in the branches: the library (cuBLAS, oneDNN) with fused passes around it, a backend's own product
# with all of that inside, or its own only where something comes behind a product ("mixed"; native's is the same as
# fused). "auto" is the native product on a CPU for which it is known to be as fast, and the library on a GPU, until one
# has shown per level which is the fastest.
PRODUCTS = ("auto", "library", "mixed", "fused")
_CUDA_ENTRIES = {"adaln_modulate"}  # what csrc/cuda has


class BackendError(RuntimeError):
    """No backend that was allowed can run an op; the message has each one's reason."""


@dataclass(frozen=True)
class Choice:
    """One decision: the entry that was wanted, for what, who runs it and why the others do not."""

    entry: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    backend: str
    refusals: dict[str, str]


@functools.cache
def _triton() -> ModuleType | str:
    """The Triton kernels, or why there are none; at first use, since importing Triton takes a second."""
    try:
        return importlib.import_module("dico_kernels.kernels.entries")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_triton(entry: str, x: Tensor) -> str | None:
    if x.device.type != "cuda" and not interpreting():
        return f"Triton compiles for GPUs; x is on {x.device}"
    kernels = _triton()
    if isinstance(kernels, str):
        return kernels
    return None if hasattr(kernels, entry) else f"has no {entry}"


def _why_not_native(entry: str, x: Tensor) -> str | None:
    if x.device.type != "cpu":
        return f"native kernels run on the CPU; x is on {x.device}"
    if not native.available():
        return native.why_unavailable
    return None if hasattr(native, entry) else f"has no {entry}"


def _why_not_cuda(entry: str, x: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"CUDA kernels run on a GPU; x is on {x.device}"
    if not native.available():
        return native.why_unavailable
    if not native.with_cuda():
        return f"built without CUDA ({native.build()['cuda']})"
    return None if entry in _CUDA_ENTRIES else f"has no {entry}"


def _why_not_reference(entry: str, x: Tensor) -> str | None:
    del entry, x
    return None


def _reference() -> ModuleType:
    return importlib.import_module("dico_kernels.ops._reference")


# In the order "auto" tries them.
_BACKENDS: dict[str, tuple[Callable[[str, Tensor], str | None], Callable[[], Any]]] = {
    "triton": (_why_not_triton, _triton),
    "cuda": (_why_not_cuda, lambda: native),
    "native": (_why_not_native, lambda: native),
    "reference": (_why_not_reference, _reference),
}
NAMES = ("auto", *_BACKENDS)


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}={name!r}: expected one of {', '.join(NAMES)}")
    return name


def _checked_products(name: str, source: str) -> str:
    if name not in PRODUCTS:
        raise ValueError(f"{source}={name!r}: expected one of {', '.join(PRODUCTS)}")
    return name


def on_or_off(variable: str, default: bool) -> bool:
    """What an environment variable says: 0 or 1."""
    value = os.environ.get(variable) or str(int(default))
    if value not in ("0", "1"):
        raise ValueError(f"{variable}={value!r}: expected 0 or 1")
    return value == "1"


# What select found for an entry and a device, as long as the choice stands.
Settled = dict[tuple[str, str], Callable[..., Any] | None]


class _Setting:
    """The process's choice. Not a thread's: autograd runs backward passes on threads of its own."""

    def __init__(self) -> None:
        self.name = _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)
        self.strict = on_or_off(STRICT_VARIABLE, False)
        self.products = _checked_products(os.environ.get(PRODUCTS_VARIABLE) or "auto", PRODUCTS_VARIABLE)
        self.record: Callable[[Choice], None] | None = None
        self.warned: set[tuple[str, str, str]] = set()
        self.tables: dict[tuple[str, bool, str], Settled] = {}
        self.choose(self.name, self.strict, self.products)

    def choose(self, *choice: Any) -> None:
        """Take another (name, strict, products)."""
        # The table along with its choice: another thread sees those of before or these.
        self.chosen = choice[0], self.tables.setdefault(choice, {})
        self.name, self.strict, self.products = choice


_SETTING = _Setting()


@contextmanager
def backend(name: str, strict: bool = False, products: str = "auto") -> Iterator[None]:
    """Within the context, ops prefer one backend; for the whole process, backward passes included.

    Args:
        name: "triton", "native" (C++ on the CPU), "cuda" (C++ on a GPU), "reference" (plain PyTorch), or "auto".
        strict: raise BackendError where that backend cannot run an op. Otherwise the op falls back in auto's order,
            with one warning. With "auto", strict refuses the reference.
        products: who multiplies in conv_half, ffn_half, fcdm_block, native's pixel_shuffle_skip and layers that
            pack() found: "library" (cuBLAS, oneDNN), "fused" (the backend's own product with everything around it
            inside; Triton and native have one), "mixed" (of Triton's: its own where GELU or a gate comes behind, adaLN
            by itself and the library's product behind that), or "auto": native's where it is known to be as fast, else
            the library. pixel_shuffle_skip's is native's own only where it is known to be as fast.

    Raises:
        ValueError: an unknown name.
    """
    before = current()
    _SETTING.choose(_checked(name, "name"), strict, _checked_products(products, "products"))
    try:
        yield
    finally:
        _SETTING.choose(*before)


def current() -> tuple[str, bool, str]:
    """The process's choice now: (name, strict, products) as ``backend`` takes them."""
    return _SETTING.name, _SETTING.strict, _SETTING.products


class _Branch(threading.local):
    """A thread's exception from the process's choice, while it runs a branch for which another one was measured."""

    products: str | None = None


_BRANCH = _Branch()


@contextmanager
def holding(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context, an attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def multiplying(products: str | None) -> AbstractContextManager[None]:
    """Within the context, and in this thread, products are chosen so; None changes nothing."""
    return holding(_BRANCH, "products", products or _BRANCH.products)


def _products() -> str:
    return _BRANCH.products or _SETTING.products


def is_observed() -> bool:
    """Whether decisions are handed to somebody."""
    return _SETTING.record is not None


def recording(record: Callable[[Choice], None]) -> AbstractContextManager[None]:
    """Within the context, every decision is also handed to ``record``."""
    return holding(_SETTING, "record", record)


def select(entry: str, x: Tensor) -> Callable[..., Any]:
    """The function that runs an entry of the kernel interface on x's device.

    Raises:
        BackendError: strict, and what is asked for cannot run.
    """
    (wanted, settled), key = _SETTING.chosen, (entry, "cpu" if x.is_cpu else x.device.type)
    if (found := settled.get(key)) is not None and _SETTING.record is None:
        return found
    order = list(_BACKENDS) if wanted == "auto" else [wanted, *(b for b in _BACKENDS if b != wanted)]
    refusals: dict[str, str] = {}
    for name in order:
        # The interpreter is for tests: nobody falls into it who has not asked for it.
        if name == "triton" and name != wanted and x.device.type != "cuda":
            refusals[name] = f"Triton compiles for GPUs; x is on {x.device}"
            continue
        why_not, functions = _BACKENDS[name]
        reason = why_not(entry, x)
        if reason is None:
            _note(entry, x, name, refusals, wanted)
            function: Callable[..., Any] = getattr(functions(), entry)
            settled[key] = function
            return function
        refusals[name] = reason
    raise AssertionError("the reference runs everything")


def optional(entry: str, x: Tensor) -> Callable[..., Any] | None:
    """An entry that a backend may do without: of the one that select would take, or None."""
    (wanted, settled), key = _SETTING.chosen, (entry + "?", "cpu" if x.is_cpu else x.device.type)
    if key in settled:
        return settled[key]
    settled[key] = found = _optional(entry, x, wanted)
    return found


def _optional(entry: str, x: Tensor, wanted: str) -> Callable[..., Any] | None:
    for name in [*([] if wanted == "auto" else [wanted]), *_BACKENDS]:
        if name == "triton" and name != wanted and x.device.type != "cuda":
            continue
        why_not, functions = _BACKENDS[name]
        if why_not("adaln_modulate_backward", x) is None:
            found: Callable[..., Any] | None = getattr(functions(), entry, None)
            return found
    return None


def multiplies_natively(weight: Tensor, x: Tensor | None = None) -> bool:
    """Whether native's own product is to multiply by a weight, on x's device or its own."""
    own = optional("pointwise", weight if x is None else x)
    return own is native.pointwise and _is_to_multiply(own, weight)


def _is_to_multiply(own: Callable[..., Any] | None, weight: Tensor) -> bool:
    if own is None or _products() == "library":
        return False
    return _products() != "auto" or (own is native.pointwise and native.multiplies(weight))


def owner(x: Tensor) -> str | None:
    """The backend whose own products could multiply in a branch of x; None where there is only the library."""
    found = optional("pointwise", x)
    return None if found is None else "native" if found is native.pointwise else "triton"


def note_optional(entry: str, x: Tensor, function: Callable[..., Any], dtype: torch.dtype | None = None) -> None:
    """Record that a function which optional gave runs; dtype: of the weights, if not x's."""
    if _SETTING.record is not None:
        name = "native" if function is getattr(native, entry, None) else "triton"
        _SETTING.record(Choice(entry, tuple(x.shape), dtype or x.dtype, str(x.device), name, {}))


def usual_products(x: Tensor, weight: Tensor) -> str:
    """What "auto" takes for a branch of x where nothing was measured."""
    own = optional("pointwise", x)
    return "fused" if own is native.pointwise and native.multiplies(weight) else "library"


def own_product(x: Tensor, weight: Tensor) -> Callable[..., Any] | None:
    """A backend's own 1x1 convolution of x with what surrounds it inside, where it is to run; else None."""
    found = optional("pointwise", x)
    if not _is_to_multiply(found, weight):
        return None
    assert found is not None
    note_optional("pointwise", x, found, weight.dtype)
    return found


def fused_products(entry: str, x: Tensor, weight: Tensor) -> Callable[..., Any] | None:
    """A branch as one function of a backend's, its products its own, where that is asked for and can run; else None.

    Raises:
        BackendError: strict, and neither that nor a product of the backend's own can run.
    """
    if _products() != "fused":
        return None
    found = None if x.dtype != weight.dtype else optional(entry, x)
    if found is None and _SETTING.strict and optional("pointwise", x) is None:
        why = f"x is {x.dtype}, weights {weight.dtype}" if x.dtype != weight.dtype else f"no backend has {entry}"
        raise BackendError(f"{entry} on {x.device} with products='fused': {why}")
    if found is not None:
        note_optional(entry, x, found)
    return found


def _note(entry: str, x: Tensor, name: str, refusals: dict[str, str], wanted: str) -> None:
    """Raise or warn where the choice is not what was asked for, and record it."""
    fell_back = (wanted not in ("auto", name)) or (name == "reference" and wanted == "auto")
    if fell_back and _SETTING.strict:
        reasons = "; ".join(f"{b}: {r}" for b, r in refusals.items())
        raise BackendError(f"{entry} on {x.device} ({x.dtype}): {reasons}")
    slow = name == "reference" and wanted != "reference" and (x.device.type == "cuda" or wanted != "auto")
    key = (entry, wanted, x.device.type)
    if (slow or (fell_back and wanted != "auto")) and key not in _SETTING.warned:
        _SETTING.warned.add(key)
        reasons = "; ".join(f"{b}: {r}" for b, r in refusals.items())
        warnings.warn(f"dico_kernels.{entry} runs on {name} instead ({reasons})", RuntimeWarning, stacklevel=2)
    if _SETTING.record is not None:
        _SETTING.record(Choice(entry, tuple(x.shape), x.dtype, str(x.device), name, refusals))
