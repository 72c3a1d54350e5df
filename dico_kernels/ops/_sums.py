"""Sums over pixels, as backends give them, and the gradients that they are.

A backend returns such a sum finished, (N, C), or in parts, (N, parts, C), all in the accumulation dtype. What reads it
by way of a kernel takes it as it is; the rest adds it up here, those of one backward together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.ops._backends import optional


def total(sums: Tensor) -> Tensor:
    """(N, C), finished."""
    if sums.ndim != 3:
        return sums
    kernel = optional("add_up", sums)
    found: Tensor = sums.sum(1) if kernel is None else kernel([sums], sums.dtype)[0]
    return found


def gradients(dtype: torch.dtype, *wanted: tuple[Tensor, Sequence[int]]) -> list[Tensor]:
    """What each tensor adds up to, as the gradient of a parameter of a shape, in a dtype.

    A tensor is a sum over pixels, or (1, parts, elements) of the parameter's own, or finished. A shape that has a
    sample's elements and not the batch's is a parameter's, or that of a vector which was broadcast: samples are added
    up too.
    """
    kernel = optional("add_up", wanted[0][0])
    if kernel is None:
        return [_added(sums, shape).reshape(tuple(shape)).to(dtype) for sums, shape in wanted]
    finished = [s.dtype == dtype and s.numel() == torch.Size(shape).numel() for s, shape in wanted]
    found = iter(kernel([_grouped(*w) for w, done in zip(wanted, finished, strict=True) if not done], dtype))
    return [
        (sums if done else next(found)).reshape(tuple(shape))
        for (sums, shape), done in zip(wanted, finished, strict=True)
    ]


def of_samples(x: Tensor, *sums: Tensor) -> list[Tensor]:
    """Sums over the pixels of x, or of what has its shape, finished: (N, C) each, accumulation dtype."""
    if all(s.ndim == 2 for s in sums):
        return list(sums)
    return gradients(accumulation_dtype(x.dtype), *((s, x.shape[:2]) for s in sums))


def _added(sums: Tensor, shape: Sequence[int]) -> Tensor:
    sums = total(sums)
    return sums if sums.numel() == torch.Size(shape).numel() else sums.sum(0)


def _grouped(sums: Tensor, shape: Sequence[int]) -> Tensor:
    """(groups, parts, C) of which the middle is to be added up."""
    c = sums.shape[-1] if sums.ndim in (2, 3) else sums.numel()
    return sums.reshape(torch.Size(shape).numel() // c, -1, c)


__all__ = ["gradients", "of_samples", "total"]
