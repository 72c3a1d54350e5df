"""Dense 3x3 convolutions by Winograd's F(2x2, 3x3): csrc/cpu/winograd.h on tensors.

16 products where the definition has 36, and in float32 a smaller error: sums are over the inputs alone. Weights are
transformed for it and grow by 16/9: once, or at each call, where so many pixels share one that it pays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dico_kernels._extension import available, call, extension
from dico_kernels._gemm import SCRATCH, Scratch, multiplies
from dico_kernels._linear import loops
from dico_kernels._memory import DTYPES, dense, image, kind

# Tiles of 2x2 outputs that go through the products together: so many that a weight is read few times, as long as an
# element's of all their inputs stay in the second-level cache.
_TILES = 96
_BUFFER_BYTES = 1 << 21
# Inputs or outputs below which transforms take longer than the products that they save.
_FEWEST = 16
# Outputs: as many as the widest panel has, or a part could be without any.
_FEWEST_OF_A_PART = 64
# Pixels from which it pays to transform a weight for one call, and the most that may take: a thread keeps that memory.
_FEWEST_PIXELS = 192
_MOST_BYTES = 1 << 26
_WEIGHT = Scratch()
# Transformed tiles of a block, of which a weight's gradient sums the products, in float32.
_BLOCK_BYTES = 1 << 24


def form() -> str:
    """Names the layout in which ``pack`` writes: that of the instruction set in use."""
    return f"Winograd {extension().selected_isa()}"


def pays(weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether ``winograd`` by a packed weight (K, C, 3, 3) is faster than the library's on this processor.

    dtype: as which it is multiplied, if not its own.
    """
    dtype = dtype or weight.dtype
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or min(weight.shape[:2]) < _FEWEST or not available():
        return False
    return (dtype == torch.float32 or loops(dtype)) and weight.is_cpu and multiplies(weight.new_empty(0, dtype=dtype))


def pays_unpacked(images: int, height: int, width: int, weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether ``convolve`` and ``weight_gradient`` are, weight and all: of so many pixels."""
    if images * height * width < _FEWEST_PIXELS or not pays(weight, dtype):
        return False
    return _taps(weight) is not None and 16 * 4 * weight.shape[0] * weight.shape[1] <= _MOST_BYTES


def _taps(weight: Tensor) -> int | None:
    """From one tap of a weight (K, C, 3, 3) to the next, in elements; None if not always as far."""
    rows, taps = weight.stride()[2:]
    return taps if rows == 3 * taps else None


def _size(dtype: torch.dtype, outputs: int, inputs: int) -> int:
    size: int = extension().winograd_packed_size(DTYPES[dtype], outputs, inputs)
    return size


def pack(weight: Tensor) -> Tensor:
    """A weight (K, C, 3, 3) as ``winograd`` reads it: bytes.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    _check(weight)
    packed = torch.empty(_size(weight.dtype, *weight.shape[:2]), dtype=torch.uint8, device=weight.device)
    _pack(weight, packed)
    return packed


def _check(weight: Tensor) -> None:
    if weight.ndim != 4 or weight.shape[2:] != (3, 3) or not weight.numel() or weight.dtype not in DTYPES:
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}: expected floating, (K, C, 3, 3)")


def _pack(weight: Tensor, packed: Tensor, transposed: bool = False) -> None:
    weight = weight if _taps(weight) is not None else weight.contiguous()
    (k, c), (of_k, of_c, _, of_tap) = weight.shape[:2], weight.stride()
    if transposed:  # and rotated: from the last tap to the first
        call("winograd_pack", weight, weight[..., 2:, 2:], packed, c, k, of_c, of_k, -of_tap)
    else:
        call("winograd_pack", weight, weight, packed, k, c, of_k, of_c, of_tap)


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
    dense("packed", packed, (_size(x.dtype, outputs, c),), torch.uint8, x.device)
    if bias is not None:
        dense("bias", bias, (outputs,), x.dtype, x.device)
    y = torch.empty((n, outputs, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    tiles, parts = _division(n * -(-h // 2) * -(-w // 2), c, outputs, threads)
    scratch = SCRATCH.of(extension().winograd_scratch(DTYPES[x.dtype], threads, c, tiles))
    call("winograd", x, x, packed, bias, y, scratch, n, h, w, c, outputs, tiles, parts)
    return y


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """As ``winograd``, of a weight (K, C, 3, 3) of x's dtype, in any strides, that is packed for this call.

    transposed: what F.conv_transpose2d(x, weight, bias, padding=1) is, and a convolution's gradient of its input is of
    that of its output: x is (N, K, H, W), and the result (N, C, H, W).
    """
    image("x", x)
    _check(weight)
    kind("weight", weight, x.dtype, x.device)
    outputs, inputs = weight.shape[:2] if not transposed else weight.shape[1::-1]
    if x.shape[1] != inputs:
        raise ValueError(f"x has {x.shape[1]} channels: expected {inputs}, as weight {tuple(weight.shape)} has")
    size = _size(x.dtype, outputs, inputs)
    packed = _WEIGHT.of(size)[:size]
    _pack(weight, packed, transposed)
    return winograd(x, packed, outputs, bias)


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient of the convolution's weight, (K, C, 3, 3), contiguous.

    Args:
        dy: (N, K, H, W), channels_last.
        x: (N, C, H, W), channels_last.

    Raises:
        ValueError: a wrong shape, layout, dtype or device, naming the argument.
    """
    image("x", x)
    image("dy", dy)
    (n, c, h, w), outputs = x.shape, dy.shape[1]
    if dy.shape != (n, outputs, h, w):
        raise ValueError(f"dy has shape {tuple(dy.shape)}: expected {(n, outputs, h, w)}")
    kind("dy", dy, x.dtype, x.device)
    dweight = torch.empty((outputs, c, 3, 3), dtype=x.dtype, device=x.device)
    if not n:
        return dweight.zero_()
    tiles = n * -(-h // 2) * -(-w // 2)
    blocks = -(-tiles // max(_TILES, _BLOCK_BYTES // (16 * 4 * (c + outputs))))
    block = -(-tiles // blocks)
    scratch = _WEIGHT.of(extension().winograd_gradient_scratch(DTYPES[x.dtype], c, outputs, block))
    call("winograd_gradient", x, dy, x, dweight, scratch, n, h, w, c, outputs, block)
    return dweight


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


__all__ = ["convolve", "form", "pack", "pays", "pays_unpacked", "weight_gradient", "winograd"]
