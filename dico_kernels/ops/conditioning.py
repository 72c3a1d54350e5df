"""The conditioning of a whole level at once: Linear(SiLU(c)) of every block that is given the same c.

Not an op: for inference, where the models' blocks would each call a head of two small kernels for the same vectors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dico_kernels.ops._backends import note_optional, optional

# Vectors up to which a launch for all heads is worth more than the library's rate on each.
_FEW = 64


def _usable(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    if torch.is_grad_enabled() or torch.is_autocast_enabled(c.device.type) or c.ndim != 2 or not 0 < c.shape[0] <= _FEW:
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return False
    shape = weights[0].shape[0], c.shape[1]
    return all(
        w.shape == shape and w.is_contiguous() and w.dtype == c.dtype and w.device == c.device
        and b is not None and b.is_contiguous() and b.dtype == c.dtype and b.device == c.device
        for w, b in zip(weights, biases, strict=True)
    )  # fmt: skip


def conditioning(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """Linear(SiLU(c)) for each weight and bias, or None where that is better left to each head.

    Args:
        c: (N, C).
        weights: (K, C) each.
        biases: (K,) each.

    Returns:
        (heads, N, K).
    """
    kernel = optional("conditioning", c) if len(weights) > 1 else None
    if kernel is None or not _usable(c, weights, biases):
        return None
    note_optional("conditioning", c, kernel)
    found: Tensor = kernel(c.contiguous(), weights, biases)
    return found
