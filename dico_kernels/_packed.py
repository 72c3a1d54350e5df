"""Weights in layouts that a product reads faster, kept beside the originals for as long as these stay as they are."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from dico_kernels._linear import onednn_multiplies

ONEDNN = "oneDNN"
# Sizes of input, the last ones used, that a weight is kept for: a sampler's guided and plain steps differ in the batch.
_SIZES = 2


@dataclass(frozen=True)
class _Packed:
    """A packed weight, and which state of the weight that was."""

    tensor: Tensor
    form: str
    dtype: torch.dtype
    version: int
    place: tuple[Any, ...]  # its address, strides and shape
    storage: StorageWeakRef  # while it is held, no other storage has its address: another's memory may have had
    by_size: dict[torch.Size, Tensor] = field(default_factory=dict)  # what packed_for made of it since


class _Count:
    value = 0


_COUNT = _Count()
_PACKED: MutableMapping[Tensor, _Packed] = WeakIdKeyDictionary()


def _place(weight: Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.stride(), weight.shape


def _forget_what_stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Forget the packed weights of an optimizer that counts no change of theirs, as those with fused=True do not."""
    for group in optimizer.param_groups if _PACKED else ():
        # Of those that are not packed too: whoever derived something of them asks for the number that this changes.
        for parameter in group["params"] if group.get("fused") else ():
            forget(parameter)


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_forget_what_stepped)


def keep(weight: Tensor, reorder: Callable[[Tensor], Tensor], form: str = ONEDNN) -> bool:
    """Keep what ``reorder`` makes of a weight, in a layout of the name ``form``, in place of what was kept.

    Returns:
        Whether that was possible: a plain tensor on a CPU, for oneDNN of a dtype that this torch's multiplies.
    """
    if not weight.is_cpu or weight.is_inference() or type(weight) not in (Tensor, torch.nn.Parameter):
        return False
    if form == ONEDNN and not onednn_multiplies(weight):
        return False
    with torch.no_grad():
        tensor = reorder(weight.detach())
    _watch_optimizers()
    storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    _COUNT.value += 1
    _PACKED[weight] = _Packed(tensor, form, weight.dtype, weight._version, _place(weight), storage)
    return True


def forget(weight: Tensor) -> None:
    """Undo keep."""
    _COUNT.value += 1
    _PACKED.pop(weight, None)


def holds(weight: Tensor) -> bool:
    """Whether something is kept of a weight, so that its owner has promised not to write to it unseen."""
    return weight in _PACKED


def bytes_of(weight: Tensor) -> Tensor | None:
    """What is kept of a weight, whether it may be used or not, if it is memory of ours and not oneDNN's."""
    kept = _PACKED.get(weight) if _PACKED else None
    return None if kept is None or kept.form == ONEDNN else kept.tensor


def generation() -> int:
    """A number that changes whenever something is kept or forgotten."""
    return _COUNT.value


def _valid(weight: Tensor, form: str) -> _Packed | None:
    """What was kept in a layout of a weight that has not changed since."""
    kept = _PACKED.get(weight) if _PACKED else None
    if kept is None or kept.form != form:
        return None
    if form == ONEDNN and not torch.backends.mkldnn.enabled:
        return None
    now = weight.dtype, weight._version, _place(weight), weight.untyped_storage()._cdata
    if now == (kept.dtype, kept.version, kept.place, kept.storage.cdata):
        return kept
    kept.by_size.clear()
    return None


def packed(weight: Tensor, form: str = ONEDNN) -> Tensor | None:
    """What was kept in a layout of a weight that has not changed since, to be multiplied in its stead; else None."""
    kept = _valid(weight, form)
    return None if kept is None else kept.tensor


def packed_for(size: torch.Size, weight: Tensor, reorder: Callable[[Tensor], Tensor]) -> Tensor | None:
    """As packed, of a convolution's weight that ``reorder`` packs for inputs of a size; made when that is first seen.

    The layout that oneDNN wants depends on the size, and from another packed one it gets there, at each call, by a
    routine that is slow: with AVX2 70 ms instead of 3 for 512 x 256 x 3 x 3. None also for a size that oneDNN refuses.
    """
    kept = _valid(weight, ONEDNN)
    if kept is None:
        return None
    found = kept.by_size.pop(size, None)
    if found is None:
        try:
            with torch.no_grad():
                found = reorder(weight.detach())
        except RuntimeError:
            return None
    kept.by_size[size] = found  # as the last one used
    for old in list(kept.by_size)[:-_SIZES]:
        kept.by_size.pop(old, None)
    return found
