"""Dense convolutions as native products over gathered patches: csrc/cpu/convolution.h and gemm.h, on tensors.

For few pixels and many weights, as where the U-shaped models are deepest. There the library takes longer to bring the
weight and its gradient into the layouts of its kernels than to multiply; here the weight is the matrix as it lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dico_kernels._extension import call
from dico_kernels._gemm import pointwise
from dico_kernels._linear import rows
from dico_kernels._memory import dense, image, kind
from dico_kernels._weight_gradients import weight_gradient


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution with zeros around, stride 1: what F.conv2d(x, weight, padding=k // 2) is.

    Args:
        x: (N, C, H, W), channels_last.
        weight: (K, C, k, k), contiguous, k odd, of x's dtype.

    Returns:
        (N, K, H, W), channels_last.

    Raises:
        ValueError: a wrong shape, layout, dtype or device, naming the argument.
    """
    matrix = _matrix(weight, x, 1)
    return pointwise(_patches(x, weight.shape[2]).permute(0, 3, 1, 2), matrix).y


def convolution_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of convolution's x, channels_last; dy is (N, K, H, W), channels_last.

    Of a 16-bit dtype what each tap adds is rounded before it is added up.
    """
    matrix = _matrix(weight, dy, 0)
    n, _, h, w = dy.shape
    c, k = weight.shape[1], weight.shape[2]
    dpatches = pointwise(dy, matrix.t(), frozen=False).y
    dx = torch.empty((n, c, h, w), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    call("patches_backward", dy, dx, dpatches, n, h, w, c, k)
    return dx


def convolution_weight_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of convolution's weight, contiguous; dy is (N, K, H, W), channels_last."""
    matrix = _matrix(weight, x, 1)
    n, _, h, w = x.shape
    outputs, _, k, _ = weight.shape
    image("dy", dy)
    if tuple(dy.shape) != (n, outputs, h, w):
        raise ValueError(f"dy has shape {tuple(dy.shape)}: expected {(n, outputs, h, w)}")
    kind("dy", dy, x.dtype, x.device)
    patches = _patches(x, k).reshape(1, -1, matrix.shape[1])
    return weight_gradient(rows(dy)[None], patches)[0].reshape(weight.shape)


def _matrix(weight: Tensor, like: Tensor, dim: int) -> Tensor:
    """Check, against an image whose channels meet a dimension of the weight; the weight as (K, C * k * k)."""
    image("x" if dim else "dy", like)
    k = weight.shape[-1] if weight.ndim else 0
    if k % 2 == 0 or weight.ndim != 4:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (K, C, k, k), k odd")
    shape = [*weight.shape[:2], k, k]
    shape[dim] = like.shape[1]
    dense("weight", weight, tuple(shape), like.dtype, like.device)
    return weight.reshape(weight.shape[0], -1)


def _patches(x: Tensor, k: int) -> Tensor:
    """Each pixel's neighbours, (N, H, W, C * k * k), in the order of a weight's memory."""
    n, c, h, w = x.shape
    patches = torch.empty(n, h, w, c * k * k, dtype=x.dtype, device=x.device)
    call("patches", x, x, patches, n, h, w, c, k)
    return patches


__all__ = ["convolution", "convolution_gradient", "convolution_weight_gradient"]
