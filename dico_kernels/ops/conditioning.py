"""The conditioning of a whole level at once: Linear(SiLU(c)) of every block that is given the same c.

Not an op: for inference, where the models' blocks would each call a head of two small kernels for the same vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dico_kernels.ops._backends import note_optional, optional
from dico_kernels.ops._library import only_numbers

# Vectors up to which a launch for all heads is worth more than the library's rate on each.
_FEW = 64


def at_once(c: Tensor) -> bool:
    """Whether a backend computes in one kernel what a level's heads make of c, and numbers are all that is wanted."""
    if not only_numbers(c) or c.ndim != 2 or not 0 < c.shape[0] <= _FEW:
        return False
    return optional("conditioning", c) is not None


def _readable(v: Tensor | None, shape: tuple[int, ...], c: Tensor) -> bool:
    if v is None or type(v) not in (torch.nn.Parameter, Tensor):
        return False
    return v.shape == shape and v.is_contiguous() and v.dtype == c.dtype and v.device == c.device


def conditioning(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """Linear(SiLU(c)) for each weight and bias, or None where that is to be left to each head.

    Args:
        c: (N, C), of which at_once holds.
        weights: (K, C) each.
        biases: (K,) each.

    Returns:
        (heads, N, K).
    """
    kernel = optional("conditioning", c)
    if kernel is None or len(weights) < 2:
        return None
    k = weights[0].shape[0]
    if not all(_readable(w, (k, c.shape[1]), c) for w in weights) or not all(_readable(b, (k,), c) for b in biases):
        return None
    found: Tensor | None = kernel(c.contiguous(), weights, biases)
    if found is not None:
        note_optional("conditioning", c, kernel)
    return found
