"""Validation shared by all ops. Every error names the argument, what was given and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_KERNEL = 9


def image(name: str, x: Tensor) -> None:
    """A (N, C, H, W) tensor of a supported dtype with C, H, W > 0."""
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (N, C, H, W) with C, H, W > 0")
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{name} has dtype {x.dtype}: expected {names}")


def same_kind(name: str, v: Tensor, x: Tensor) -> None:
    """Of x's dtype and device."""
    if v.dtype != x.dtype:
        raise ValueError(f"{name} has dtype {v.dtype}: expected x's, {x.dtype}")
    if v.device != x.device:
        raise ValueError(f"{name} is on {v.device}: expected x's device, {x.device}")


def like_image(name: str, v: Tensor, x: Tensor) -> None:
    """Of x's shape, dtype and device."""
    if v.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(v.shape)}: expected x's, {tuple(x.shape)}")
    same_kind(name, v, x)


def condition(name: str, v: Tensor, x: Tensor) -> None:
    """(N, C) or (1, C)."""
    n, c = x.shape[:2]
    if v.ndim != 2 or v.shape[1] != c or (v.shape[0] != n and v.shape[0] != 1):
        raise ValueError(f"{name} has shape {tuple(v.shape)}: expected ({n}, {c}) or (1, {c})")
    same_kind(name, v, x)


def vector(name: str, v: Tensor | None, size: int, x: Tensor) -> None:
    """(size,), or None."""
    if v is None:
        return
    if v.ndim != 1 or v.shape[0] != size:
        raise ValueError(f"{name} has shape {tuple(v.shape)}: expected ({size},)")
    same_kind(name, v, x)


def pointwise(name: str, w: Tensor, inputs: int, x: Tensor, outputs: int | None = None) -> None:
    """(K, inputs, 1, 1), or (K, inputs), with K = outputs where that is given."""
    k = w.shape[0] if w.ndim else 0
    shaped = w.ndim in (2, 4) and w.shape[1] == inputs and tuple(w.shape[2:]) in ((), (1, 1))
    if not shaped or k == 0 or outputs not in (None, k):
        wanted = "K" if outputs is None else outputs
        raise ValueError(
            f"{name} has shape {tuple(w.shape)}: expected ({wanted}, {inputs}, 1, 1) or ({wanted}, {inputs})"
            + (", K > 0" if outputs is None else "")
        )
    same_kind(name, w, x)


def depthwise(name: str, w: Tensor, channels: int, x: Tensor) -> None:
    """(channels, 1, k, k) with k odd."""
    square = w.ndim == 4 and w.shape[2] == w.shape[3]
    if not square or w.shape[0] != channels or w.shape[1] != 1:
        raise ValueError(f"{name} has shape {tuple(w.shape)}: expected ({channels}, 1, k, k)")
    kernel_size(name, w)
    same_kind(name, w, x)


def kernel_size(name: str, w: Tensor) -> None:
    """A square kernel of an odd size that is not too large."""
    k = w.shape[-1]
    if k % 2 == 0 or k > MAX_KERNEL:
        raise ValueError(f"{name} has a {k}x{k} kernel: expected an odd size, 1 to {MAX_KERNEL}")


def positive(name: str, value: float) -> None:
    """A number >= 0."""
    if not value >= 0:
        raise ValueError(f"{name}={value}: expected a number >= 0")


def channels_last(x: Tensor) -> Tensor:
    """x in channels_last memory: itself if it is, else converted once."""
    return x.contiguous(memory_format=torch.channels_last)


def dense(v: Tensor | None) -> Tensor | None:
    """A parameter without gaps, or None."""
    return None if v is None else v.contiguous()


def dense_rows(v: Tensor) -> Tensor:
    """(N, C) each of whose rows has no gaps: itself, as a chunk of a wider matrix is, or a copy."""
    return v if v.stride(1) == 1 else v.contiguous()


def matrix(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight as its contiguous (K, C) matrix."""
    return weight.reshape(weight.shape[0], weight.shape[1]).contiguous()


def empty_image(x: Tensor, channels: int | None = None, scale: int = 1, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised channels_last image of x's batch and device, and of its dtype unless another is given."""
    n, c, h, w = x.shape
    shape = (n, c if channels is None else channels, h * scale, w * scale)
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)
