"""Dense convolutions of unpacked weights as native products: by Winograd's algorithm, or over gathered patches.

Patches (csrc/cpu/convolution.h and gemm.h, on tensors) are for few pixels and many weights, as where the U-shaped
models are deepest. There the library takes longer to bring the weight and its gradient into the layouts of its kernels
than to multiply; here the weight is the matrix as it lies. And for dtypes that the library has only slow loops for.
They exist for some images at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dico_kernels import _winograd
from dico_kernels._extension import call
from dico_kernels._gemm import pack, pointwise
from dico_kernels._linear import rows
from dico_kernels._memory import image, kind
from dico_kernels._weight_gradients import weight_gradient
from dico_kernels.dtypes import accumulation_dtype

# Bytes of the patches, taken for float32, of a chunk of images; or one image's, however many.
_CHUNK_BYTES = 1 << 26


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution with zeros around, stride 1: what F.conv2d(x, weight, bias, padding=k // 2) is.

    Args:
        x: (N, C, H, W), channels_last.
        weight: (K, C, k, k), k odd, of x's dtype.
        bias: (K,) or None.

    Returns:
        (N, K, H, W), channels_last. By Winograd's algorithm an infinity in x may become NaN.

    Raises:
        ValueError: a wrong shape, layout, dtype or device, naming the argument.
    """
    _check(weight, x, 1)
    n, _, h, w = x.shape
    if _winograd.pays_unpacked(n, h, w, weight):
        return _winograd.convolve(x, weight, bias)
    matrix, k = weight.reshape(weight.shape[0], -1), weight.shape[2]
    found, kept = [], pack(matrix)
    for part in _chunks(x, weight):
        found.append(pointwise(_patches(x[part], k).permute(0, 3, 1, 2), matrix, bias, kept=kept).y)
    return found[0] if len(found) == 1 else torch.cat(found)


def convolution_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of convolution's x, channels_last; dy is (N, K, H, W), channels_last.

    Of a 16-bit dtype it is formed in float32, and rounded once.
    """
    _check(weight, dy, 0)
    n, _, h, w = dy.shape
    if _winograd.pays_unpacked(n, h, w, weight):
        return _winograd.convolve(dy, weight, transposed=True)
    dtype = accumulation_dtype(dy.dtype)
    matrix = weight.reshape(weight.shape[0], -1).to(dtype).t()
    c, k = weight.shape[1], weight.shape[2]
    dx = torch.empty((n, c, h, w), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    kept = pack(matrix)
    for part in _chunks(dx, weight):
        dpatches = pointwise(dy[part].to(dtype), matrix, kept=kept).y
        own = dx[part] if dx.dtype == dtype else torch.empty_like(dx[part], dtype=dtype)
        call("patches_backward", own, own, dpatches, own.shape[0], h, w, c, k)
        if own.dtype != dx.dtype:
            dx[part] = own
    return dx


def convolution_weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of convolution's weight, contiguous; dy is (N, K, H, W), channels_last."""
    _check(weight, x, 1)
    n, _, h, w = x.shape
    outputs, inputs, k, _ = weight.shape
    image("dy", dy)
    if tuple(dy.shape) != (n, outputs, h, w):
        raise ValueError(f"dy has shape {tuple(dy.shape)}: expected {(n, outputs, h, w)}")
    kind("dy", dy, x.dtype, x.device)
    if _winograd.pays_unpacked(n, h, w, weight):
        return _winograd.weight_gradient(dy, x)
    parts, dweight = _chunks(x, weight), None
    for part in parts:
        patches = _patches(x[part], k).reshape(1, -1, inputs * k * k)
        own = weight_gradient(rows(dy[part])[None], patches, wide=len(parts) > 1)[0]
        dweight = own if dweight is None else dweight.add_(own)
    assert dweight is not None
    return dweight.to(x.dtype).reshape(weight.shape)


def _check(weight: Tensor, like: Tensor, dim: int) -> None:
    """Against an image whose channels meet a dimension of the weight."""
    image("x" if dim else "dy", like)
    k = weight.shape[-1] if weight.ndim else 0
    if k % 2 == 0 or weight.ndim != 4:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (K, C, k, k), k odd")
    shape = [*weight.shape[:2], k, k]
    shape[dim] = like.shape[1]
    if list(weight.shape) != shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected {tuple(shape)}")
    kind("weight", weight, like.dtype, like.device)


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    """Images whose patches, of x or the gradient of x, exist at a time."""
    n, c, h, w = x.shape
    image_bytes = h * w * c * weight.shape[2] ** 2 * accumulation_dtype(x.dtype).itemsize
    step = max(1, _CHUNK_BYTES // max(1, image_bytes))
    return [slice(first, first + step) for first in range(0, max(1, n), step)]


def _patches(x: Tensor, k: int) -> Tensor:
    """Each pixel's neighbours, (N, H, W, C * k * k), in the order of a weight's memory."""
    n, c, h, w = x.shape
    patches = torch.empty(n, h, w, c * k * k, dtype=x.dtype, device=x.device)
    call("patches", x, x, patches, n, h, w, c, k)
    return patches


__all__ = ["convolution", "convolution_gradient", "convolution_weight_gradient"]
