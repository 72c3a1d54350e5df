"""Images and vectors as the native kernels want them: the checks that keep memory safe, and fresh memory.

The ops above check what a user gave, and name it as the user does; these checks are for whoever calls native.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dico_kernels.dtypes import accumulation_dtype

# Numbered as csrc/include/dico/types.h numbers them.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def image(name: str, t: Tensor, like: Tensor | None = None) -> None:
    """Refuse an image that is not dense channels_last memory of a dtype and, given ``like``, of its shape and kind."""
    if t.ndim != 4 or 0 in t.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(t.shape)}: expected (N, C, H, W) with C, H, W > 0")
    if t.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"{name} has dtype {t.dtype}: expected {names}")
    if not t.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} has strides {t.stride()}: expected channels_last memory")
    if like is not None:
        if t.shape != like.shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: expected {tuple(like.shape)}")
        kind(name, t, like.dtype, like.device)


def shuffled(name: str, up: Tensor, skip: Tensor) -> None:
    """Refuse images that are not (N, 4C, H, W) and (N, S, 2H, 2W), of one kind."""
    image(name, up)
    image("skip", skip)
    n, c, h, w = up.shape
    if c % 4:
        raise ValueError(f"{name} has {c} channels: expected a multiple of 4")
    if tuple(skip.shape) != (n, skip.shape[1], 2 * h, 2 * w):
        raise ValueError(f"skip has shape {tuple(skip.shape)}: expected ({n}, S, {2 * h}, {2 * w})")
    kind("skip", skip, up.dtype, up.device)


def kind(name: str, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse another dtype or device."""
    if t.dtype != dtype or t.device != device:
        raise ValueError(f"{name} is {t.dtype} on {t.device}: expected {dtype} on {device}")


def dense(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a tensor that is not contiguous memory of exactly this shape and kind."""
    if tuple(t.shape) != shape or not t.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(t.shape)}, strides {t.stride()}: expected {shape}, contiguous")
    kind(name, t, dtype, device)


def wide_stream(x: Tensor, dtype: torch.dtype) -> int:
    """Whether x is of the residual stream under autocast: float32 beside a 16-bit type."""
    if x.dtype == dtype:
        return 0
    if x.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16):
        return 1
    raise ValueError(f"x has dtype {x.dtype} beside {dtype}: expected the same, or float32 beside a 16-bit type")


def vector(name: str, v: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> int:
    """Refuse what is not (N, C) or (1, C) without gaps in its rows; its stride from image to image (0 broadcasts)."""
    n, c = x.shape[:2]
    if v.ndim != 2 or v.shape[1] != c or v.shape[0] not in (1, n):
        raise ValueError(f"{name} has shape {tuple(v.shape)}: expected ({n}, {c}) or (1, {c})")
    if v.stride(1) != 1 and c > 1:
        raise ValueError(f"{name} has strides {v.stride()}: expected no gaps within a row")
    kind(name, v, dtype or x.dtype, x.device)
    return v.stride(0) if v.shape[0] == n else 0


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An unwritten image of x's shape, and of its dtype unless another is given."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


def reduced(x: Tensor, *shape: int) -> Tensor:
    """Unwritten, contiguous, in the accumulation dtype of x."""
    return torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=x.device)


def row_blocks(x: Tensor) -> tuple[int, int, int, int, int]:
    """(images, rows, channels, block_rows) of x for the kernels over rows, and the number of blocks.

    Blocks depend on the shape alone, so results do not depend on the number of threads: enough of them for a large
    machine, none so long that a sum over its rows loses digits.
    """
    n, c, h, w = x.shape
    rows = h * w
    block = min(max(-(-n * rows // 64), 16), 128)
    return n, rows, c, block, n * -(-rows // block)
