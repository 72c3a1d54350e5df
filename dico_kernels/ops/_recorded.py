"""Ops' implementations as recordings: what a training step on a CPU does, without the Python that decides it.

Blocks in inference are recorded whole, see nn._state; with gradients, an op at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dico_kernels import native
from dico_kernels._recording import Recordings, is_recording
from dico_kernels.ops._backends import current, is_observed, on_or_off
from dico_kernels.ops._tuning import generation, is_measuring

VARIABLE = "DICO_KERNELS_RECORD"
_ENABLED = on_or_off(VARIABLE, True)
# Kinds of calls of an op that recordings are kept for: a model has some three a level.
_MOST = 64
# Bytes between inputs and outputs up to which a call is recorded: glibc asks the system for a larger piece anew each
# time, at a page fault each 4 KiB, and what needs more takes so long that the Python around it does not show.
_BETWEEN = 24 << 20
_PLAIN = {Tensor, torch.nn.Parameter}
_RECORDINGS: dict[str, Recordings] = {}  # of each op

Op = Callable[..., Any]


def enabled() -> bool:
    """Whether anything is to be recorded in this process."""
    return _ENABLED


def recorded(name: str, kernel: Op, wanted: Callable[[tuple[Any, ...]], bool]) -> Op:
    """An op's implementation, which depends on nothing but its arguments and the process's choices.

    From the third call of a kind on, on a CPU, as a recording of the second, if it can be recorded.

    Args:
        name: the op's.
        kernel: the implementation.
        wanted: of the arguments: whether a call may be recorded. Not where it reads packed weights: those may go.
    """
    recordings = _RECORDINGS[name] = Recordings(_MOST)

    def call(*args: Any) -> Any:
        kind = _kind(args) if wanted(args) else None
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
    choice = current()
    if not enabled() or choice[0] not in ("auto", "native") or not native.available():
        return None
    if is_recording() or is_observed() or is_measuring() or not args[0].numel():
        return None
    kinds: list[Any] = [choice, generation(), native.extension().selected_isa(), torch.get_num_threads()]
    for a in args:
        if type(a) in _PLAIN:
            if not a.is_cpu:
                return None
            kinds.append((a.shape, a.stride(), a.dtype))
        elif isinstance(a, Tensor):
            return None
        else:
            kinds.append(a)
    return tuple(kinds)


__all__ = ["enabled", "recorded"]
