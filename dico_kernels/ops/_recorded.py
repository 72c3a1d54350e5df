"""Ops' implementations as recordings: what a training step on a CPU does, without the Python that decides it.

Blocks in inference are recorded whole, see nn._state; with gradients, an op at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dico_kernels import native
from dico_kernels._linear import onednn_multiplies
from dico_kernels._recording import Recordings, is_recording
from dico_kernels.ops._backends import current, is_observed, multiplies_natively, on_or_off
from dico_kernels.ops._library import PLAIN
from dico_kernels.ops._tuning import generation, is_measuring

VARIABLE = "DICO_KERNELS_RECORD"
_ENABLED = on_or_off(VARIABLE, True)
# Kinds of calls of an op that recordings are kept for: a model has some three a level.
_MOST = 128
# Bytes between inputs and outputs up to which a call is recorded: glibc asks the system for a larger piece anew each
# time, at a page fault each 4 KiB, and what needs more takes so long that the Python around it does not show.
_BETWEEN = 24 << 20
_RECORDINGS: dict[str, Recordings] = {}  # of each op

Op = Callable[..., Any]


def occasion() -> tuple[Any, ...] | None:
    """What any recording depends on, beside its arguments and the number of threads; None for none, now."""
    choice = current()
    if not _ENABLED or choice[0] not in ("auto", "native") or not native.available():
        return None
    if is_recording() or is_observed() or is_measuring():
        return None
    return choice, generation(), native.extension().selected_isa()


def recorded(name: str, kernel: Op, *, weight: int, save: int | None = None) -> Op:
    """An op's implementation, which depends on nothing but its arguments and the process's choices.

    From the third call of a kind on, on a CPU, as a recording of the second, if it can be recorded.

    Args:
        name: the op's.
        kernel: the implementation.
        weight: which of its arguments is the first product's weight.
        save: which of them says that a backward pass will follow. Without, the op may read packed weights, which come
            and go, and blocks are recorded whole, see nn._state.
    """
    recordings = _RECORDINGS[name] = Recordings(_MOST)

    def call(*args: Any) -> Any:
        x, w = args[0], args[weight]
        # oneDNN's products cannot be told where to write.
        kind = None
        if (save is None or args[save]) and (multiplies_natively(w, x) or not onednn_multiplies(w)):
            kind = _kind(args)
        if kind is None:
            return kernel(*args)
        tensors = [a for a in args if isinstance(a, Tensor)]

        def function(*now: Tensor) -> Any:
            left = iter(now)
            return kernel(*[next(left) if isinstance(a, Tensor) else a for a in args])

        return recordings.call(kind, name, function, tensors, between=_BETWEEN)

    return call


def _kind(args: tuple[Any, ...]) -> Any:
    """All that a recording depends on; None for a call that is to run as it is."""
    now = occasion()
    if now is None or not args[0].numel():
        return None
    kinds: list[Any] = [now, torch.get_num_threads()]
    for a in args:
        if type(a) in PLAIN:
            if not a.is_cpu:
                return None
            kinds.append((a.shape, a.stride(), a.dtype))
        elif isinstance(a, Tensor):
            return None
        else:
            kinds.append(a)
    return tuple(kinds)


__all__ = ["occasion", "recorded"]
