"""Weights in oneDNN's own layouts, kept beside the originals for as long as these live and stay as they are."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from dico_kernels._linear import onednn_multiplies


@dataclass(frozen=True)
class _Packed:
    """A packed weight, and which state of the weight that was."""

    tensor: Tensor
    version: int
    pointer: int
    storage: StorageWeakRef  # while it is held, no other storage has its address: another's memory may have had


_PACKED: MutableMapping[Tensor, _Packed] = WeakIdKeyDictionary()


def keep(weight: Tensor, reorder: Callable[[Tensor], Tensor]) -> bool:
    """Keep what ``reorder`` makes of a weight.

    Returns:
        Whether that was possible: a plain float32 or bfloat16 tensor on a CPU whose torch has oneDNN.
    """
    if not onednn_multiplies(weight) or weight.is_inference() or type(weight) not in (Tensor, torch.nn.Parameter):
        return False
    with torch.no_grad():
        tensor = reorder(weight.detach())
    storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
    _PACKED[weight] = _Packed(tensor, weight._version, weight.data_ptr(), storage)
    return True


def forget(weight: Tensor) -> None:
    """Undo keep."""
    _PACKED.pop(weight, None)


def packed(weight: Tensor) -> Tensor | None:
    """What was kept of a weight that has not changed since, to be given to oneDNN in its stead; else None."""
    kept = _PACKED.get(weight) if _PACKED else None
    if kept is None or not torch.backends.mkldnn.enabled or kept.tensor.dtype != weight.dtype:
        return None
    now = weight._version, weight.data_ptr(), weight.untyped_storage()._cdata
    return kept.tensor if now == (kept.version, kept.pointer, kept.storage.cdata) else None
