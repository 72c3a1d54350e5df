"""Who multiplies in the branches, as ``dico_kernels.tune`` measured it: a table, and where it is asked.

A branch (conv_half, ffn_half, fcdm_block) multiplies by the library, or by a backend's own products in one or two
forms; which is the fastest depends on the device, the shape and the batch. Where "auto" is to choose and the table
knows the case, it does as the table says.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from dico_kernels import native
from dico_kernels.dtypes import tf32_products
from dico_kernels.info import cpu_name
from dico_kernels.ops._backends import current, holding, multiplying, owner, usual_products

Op = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """What a choice is good for, at any number of images.

    Attributes:
        branch: "conv_half", "ffn_half" or "fcdm_block".
        device: its name; of a CPU with the instruction set and threads.
        backend: whose own products stand against the library's.
        dtype: of the weights.
        stream: dtype of x.
        channels, hidden: of x, and of the first product's output.
        height, width: of x.
        tf32: whether the products are float32's and may use TF32.
        saving: whether the call keeps what a backward pass wants.
        recomputing: whether it leaves what is large of that to be computed anew.
    """

    branch: str
    device: str
    backend: str
    dtype: str
    stream: str
    channels: int
    hidden: int
    height: int
    width: int
    tf32: bool
    saving: bool
    recomputing: bool


@dataclass(frozen=True)
class Occasion:
    """A call whose choice is to be measured: its case, images, device, "auto"'s choice unmeasured, and itself."""

    case: Case
    images: int
    device: torch.device
    usual: str
    call: Callable[[], Any]


Measure = Callable[[Occasion], None]


class _State:
    def __init__(self) -> None:
        self.table: dict[Case, dict[int, str]] = {}
        self.measure: Measure | None = None
        self.generation = 0
        self.ignored = False
        self.found: dict[tuple[Any, ...], str | None] = {}  # what was looked up since the table last changed


_STATE = _State()
_LOCK = threading.Lock()


def generation() -> int:
    """A number that changes whenever a choice may: what was recorded before is out of date."""
    return -1 if _STATE.ignored else _STATE.generation


def put(case: Case, images: int, products: str) -> None:
    """Have a case run on ``products`` from now on."""
    with _LOCK:
        measured = _STATE.table.setdefault(case, {})
        if measured.get(images) == products:
            return
        measured[images] = products
        _STATE.found = {}
        _STATE.generation += 1


def forget() -> None:
    """Empty the table."""
    with _LOCK:
        _STATE.table, _STATE.found = {}, {}
        _STATE.generation += 1


def chosen(case: Case, images: int) -> str | None:
    """What was measured at the number of images that is nearest by ratio, or None where nothing was."""
    with _LOCK:
        measured = dict(_STATE.table.get(case, {}))
    best = min(measured, key=lambda n: (abs(math.log(n / images)), n), default=None)
    return None if best is None else measured[best]


def measuring(measure: Measure) -> AbstractContextManager[None]:
    """Within the context, every branch that "auto" is to choose for is handed to ``measure`` before it runs."""
    return holding(_STATE, "measure", measure)


def ignored() -> AbstractContextManager[None]:
    """Within the context, the rule chooses, whatever was measured."""
    return holding(_STATE, "ignored", True)


def device_name(device: torch.device) -> str:
    """What a choice is tied to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    isa = native.extension().selected_isa() if native.available() else "no native kernels"
    return f"{_processor()} ({isa}), {torch.get_num_threads()} threads"


_processor = functools.cache(cpu_name)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_measuring() -> bool:
    """Whether calls are made to be measured: a replayed graph would call no branch."""
    return _STATE.measure is not None


def tunable(branch: str, kernel: Op, *, weight: int, flags: int) -> Op:
    """A branch's implementation, on the products that the table has for it.

    Args:
        branch: its name.
        kernel: the implementation, of an image x and whatever follows.
        weight: which of its arguments is the first product's weight.
        flags: how many booleans come last: save, and recompute if there are two.
    """

    def call(*args: Any) -> Any:
        if (not _STATE.table and _STATE.measure is None) or _STATE.ignored or current()[2] != "auto":
            return kernel(*args)
        x, w = args[0], args[weight]
        if x.ndim != 4 or x.numel() == 0 or w.ndim == 0 or (backend := owner(x)) is None:
            return kernel(*args)
        table = _STATE.found
        how = (w.dtype == torch.float32 and tf32_products(), *args[-flags:])
        threads = torch.get_num_threads()
        key = branch, x.shape, w.shape[0], x.dtype, w.dtype, how, x.device, backend, threads
        if _STATE.measure is None and key in table:
            products = table[key]
        else:
            images, channels, height, width = x.shape
            name, dtypes = device_name(x.device), (_name(w.dtype), _name(x.dtype))
            tf32, save, recompute = (*how, False)[:3]
            case = Case(branch, name, backend, *dtypes, channels, w.shape[0], height, width, tf32, save, recompute)
            if _STATE.measure is not None:
                _STATE.measure(Occasion(case, images, x.device, usual_products(x, w), lambda: kernel(*args)))
            table[key] = products = chosen(case, images)
        with multiplying(products):
            return kernel(*args)

    return call
