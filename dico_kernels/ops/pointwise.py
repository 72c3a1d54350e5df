"""1x1 convolutions as the library's matrix products on channels_last rows, and their gradients.

Not ops of their own: the ops are made of these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dico_kernels._linear import from_rows, linear, onednn_multiplies, rows
from dico_kernels._packed import packed
from dico_kernels.ops import _checks as check
from dico_kernels.ops._backends import optional, select


def matrix(weight: Tensor, frozen: bool) -> Tensor:
    """A 1x1 convolution's weight as linear takes it: packed, if it is and frozen says that it may be."""
    kept = packed(weight) if frozen else None
    return check.matrix(weight) if kept is None else kept


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """GELU, in its exact form, of linear: for inference, where what GELU is applied to need not be kept."""
    if onednn_multiplies(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
        return y
    return F.gelu(F.linear(x, weight, bias))


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy @ weight: the gradient of what linear multiplied; dy (M, K) rows, weight (K, C)."""
    return linear(dy, weight.t())


# Pixels an image from which forming the per-sample products is cheaper than forming W x anew: below, they are more
# memory traffic (some 10 bytes an element of W and sample) than the product is arithmetic. Of AVX-512 cores, at 512 to
# 1024 channels: 1.9 against 2.9 ms in float32, 0.9 against 1.3 in bfloat16; at 16 pixels they draw.
_PRODUCTS_FROM = 64
# Bytes of the products of a chunk of samples, which exist at a time.
_CHUNK_BYTES = 1 << 26


def gated_gradients(
    dy: Tensor, dbranch: Tensor, dinner: Tensor | None, sums: Tensor, x: Tensor, s: Tensor | None, shift: Tensor | None,
    gate: Tensor, weight: Tensor, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of gate * (W (s * x + shift) + b) by W, b, gate and s, where what is gated was not kept.

    Either of two ways. With G_n = dy_n^T x_n and t_n the sum of dy_n over pixels, dW = sum_n gate_n G_n s_n,
    dgate_n = rowsum(W * G_n s_n) + b t_n and ds_n = colsum(gate_n W * G_n): as many FLOPs as dW alone, and traffic of
    G's size, (N, K, C). Or W x formed anew, one more product: what small images want, and backends without the kernel.

    Args:
        dy: (N, K, H, W), the gradient of the gated sum.
        dbranch: gate * dy.
        dinner: W^T dbranch, the gradient of s * x; wanted with s alone.
        sums: t, (N, K), accumulation dtype.
        x: (N, C, H, W).
        s: a scale of x's channels, (N, C), accumulation dtype; or None for 1.
        shift: what is added to s * x, (C,); or None.
        gate: (N, K) or (1, K).
        weight: W, (K, C).
        bias: b, (K,) or None.

    Returns:
        dW (K, C), db (K,), dgate (N, K) and ds (N, C) or None: in the accumulation dtype; dW may be in x's.
    """
    dtype = sums.dtype
    db = (sums * gate.to(dtype)).sum(0)
    held = bias if shift is None else (weight @ shift if bias is None else weight @ shift + bias)
    kernel = optional("gated_products", x) if x.shape[2] * x.shape[3] >= _PRODUCTS_FROM else None
    dscale: Tensor | None = None
    if kernel is None:
        scaled = x if s is None else select("channel_affine", x)(x, s)
        branch = from_rows(linear(rows(scaled), weight), x)
        dgate = select("channel_dots", x)(dy, branch)
        dscale = None if s is None or dinner is None else select("channel_dots", x)(dinner, x)
        dweight = rows(dbranch).t() @ rows(scaled)
    else:
        dgate, dweight, dscale = _by_products(kernel, rows(dy), rows(x), s, gate, weight, sums)
    if shift is not None:
        dweight = dweight + db[:, None] * shift.to(dtype)
    if held is not None:
        dgate = dgate + sums * held.to(dtype)
    return dweight, db, dgate, dscale


def _by_products(
    kernel: Callable[..., tuple[Tensor, Tensor | None]], dy: Tensor, x: Tensor, s: Tensor | None, gate: Tensor,
    weight: Tensor, sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dgate without b's part, dW, ds), a chunk of samples at a time."""
    samples, (k, c) = sums.shape[0], weight.shape
    dweight = sums.new_zeros(k, c)
    chunk = max(1, _CHUNK_BYTES // (k * c * x.element_size()))
    dy, x = dy.reshape(samples, -1, k).transpose(1, 2), x.reshape(samples, -1, c)
    found = []
    for first in range(0, samples, chunk):
        part = slice(first, first + chunk)
        products = torch.bmm(dy[part], x[part])
        own_gate, own_s = gate if gate.shape[0] == 1 else gate[part], None if s is None else s[part]
        found.append(kernel(products, weight, own_gate, own_s, dweight))
    dgates, dscales = zip(*found, strict=True)
    return torch.cat(dgates), dweight, None if s is None else torch.cat(dscales)


__all__ = ["from_rows", "gated_gradients", "input_gradient", "linear", "linear_gelu", "matrix", "rows"]
