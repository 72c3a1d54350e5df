"""Dense 3x3 convolutions by Winograd's F(2x2, 3x3), on weights packed for it: csrc/cpu/winograd.h on tensors.

16 products where the definition has 36, and in float32 a smaller error: sums are over the inputs alone. Weights grow by
16/9, so this is for those that are packed once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dico_kernels._extension import available, call, extension
from dico_kernels._gemm import SCRATCH, multiplies
from dico_kernels._linear import loops
from dico_kernels._memory import DTYPES, dense, image

# Tiles of 2x2 outputs that go through the products together: so many that a weight is read few times, as long as an
# element's of all their inputs stay in the second-level cache.
_TILES = 96
_BUFFER_BYTES = 1 << 21
# Inputs or outputs below which transforms take longer than the products that they save.
_FEWEST = 16
# Outputs: as many as the widest panel has, or a part could be without any.
_FEWEST_OF_A_PART = 64


def form() -> str:
    """Names the layout in which ``pack`` writes: that of the instruction set in use."""
    return f"Winograd {extension().selected_isa()}"


def pays(weight: Tensor) -> bool:
    """Whether ``winograd`` by a packed weight (K, C, 3, 3) is faster than the library's on this processor."""
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or min(weight.shape[:2]) < _FEWEST or not available():
        return False
    return (weight.dtype == torch.float32 or loops(weight.dtype)) and multiplies(weight)


def pack(weight: Tensor) -> Tensor:
    """A weight (K, C, 3, 3) as ``winograd`` reads it: bytes.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not weight.numel() or weight.dtype not in DTYPES:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}: expected floating, (K, C, 3, 3)")
    weight = weight.contiguous()
    k, c = weight.shape[:2]
    size = extension().winograd_packed_size(DTYPES[weight.dtype], k, c)
    packed = torch.empty(size, dtype=torch.uint8, device=weight.device)
    call("winograd_pack", weight, weight, packed, k, c)
    return packed


def winograd(x: Tensor, packed: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    """Convolution with zeros around, stride 1: what F.conv2d(x, weight, bias, padding=1) is.

    Args:
        x: (N, C, H, W), channels_last.
        packed: pack(weight) of a weight (K, C, 3, 3) of x's dtype, by the instruction set in use.
        outputs: K.
        bias: (K,) or None.

    Returns:
        (N, K, H, W), channels_last. Where an infinity reaches it may become NaN.

    Raises:
        ValueError: a wrong shape, layout, dtype or device, naming the argument.
    """
    image("x", x)
    n, c, h, w = x.shape
    size = extension().winograd_packed_size(DTYPES[x.dtype], outputs, c)
    dense("packed", packed, (size,), torch.uint8, x.device)
    if bias is not None:
        dense("bias", bias, (outputs,), x.dtype, x.device)
    y = torch.empty((n, outputs, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    tiles, parts = _division(n * -(-h // 2) * -(-w // 2), c, outputs, threads)
    scratch = SCRATCH.of(extension().winograd_scratch(DTYPES[x.dtype], threads, c, tiles))
    call("winograd", x, x, packed, bias, y, scratch, n, h, w, c, outputs, tiles, parts)
    return y


def _division(tiles: int, inputs: int, outputs: int, threads: int) -> tuple[int, int]:
    """Tiles of a unit of work, and into how many of them its outputs are divided."""
    most = max(6, min(_TILES, _BUFFER_BYTES // (16 * 4 * inputs)))
    blocks = max(1, -(-tiles // most))
    parts = threads // math.gcd(blocks, threads)
    # So each part of a weight is read once a block; but each part transforms all of a block's inputs.
    if blocks < threads and parts * _FEWEST_OF_A_PART <= outputs:
        return max(1, -(-tiles // blocks)), parts
    blocks = -(-blocks // threads) * threads
    return max(1, -(-tiles // blocks)), 1


__all__ = ["form", "pack", "pays", "winograd"]
