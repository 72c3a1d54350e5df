"""1x1 convolutions with what surrounds them, by a backend's own product or the library's, and their gradients.

Not ops of their own: the ops are made of these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dico_kernels import native
from dico_kernels._gemm import Product
from dico_kernels._linear import from_rows, linear, onednn_multiplies, rows
from dico_kernels._packed import packed
from dico_kernels.ops import _checks as check
from dico_kernels.ops._backends import multiplies_natively, note_optional, optional, own_product, select
from dico_kernels.ops._sums import gradients, total


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


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    frozen: bool,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    s: Tensor | None = None,
    plus: Tensor | None = None,
    gelu: bool = False,
    keep: bool = False,
    squares: bool = False,
    then: tuple[Tensor, Tensor | None] | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Product:
    """W x + b with what stands before and behind it, as ``native.pointwise`` has it; with s, x's memory may be taken.

    Where no backend's own product is to run, the passes before and behind and the library's product, one by one.

    Args:
        x: (N, C, H, W), channels_last.
        weight: (K, C) or (K, C, 1, 1).
        bias: (K,) or None.
        frozen: for inference: packed weights may be used, and adaLN's statistics are not wanted.
        shift: with scale and eps: adaLN of x is multiplied.
        scale: as shift.
        eps: adaLN's.
        s: s * x + plus is multiplied; (N, C), accumulation dtype.
        plus: (C,) or None.
        gelu: GELU of the product.
        keep: return what GELU is applied to.
        squares: return the sums over (H, W) of GELU's squares.
        then: weight and bias of a second product, of what GELU gave.
        gate: with residual: residual + gate * the last product is returned.
        residual: see gate.
    """
    weights = (weight, bias) if then is None else (weight, bias, *then)
    first, bias, *second = (check.dense(w) for w in weights)
    assert first is not None
    own = own_product(x, first)
    if own is not None:
        found: Product = own(
            x, first, bias, shift=shift, scale=scale, eps=eps, s=s, plus=plus, gelu=gelu, keep=keep, squares=squares,
            then=tuple(second) or None, statistics=not frozen, frozen=frozen, gate=gate, residual=residual,
        )  # fmt: skip
        return found
    a, mean, rstd, before, sums = x, None, None, None, None
    if shift is not None:
        a, mean, rstd = select("adaln_modulate", x)(x, shift, scale, eps)
    elif s is not None:
        a = select("channel_affine", x)(x, s, overwrite=True)
    if plus is not None:  # W (x + plus) + b = W x + (W plus + b)
        through = check.matrix(weight) @ plus
        bias = through if bias is None else through + bias
    m = matrix(weight, frozen)
    if gelu and not keep and not squares:
        y = from_rows(linear_gelu(rows(a), m, bias), x)
    else:
        y = from_rows(linear(rows(a), m, bias), x)
    del a
    if gelu and (keep or squares):
        before = y if keep else None
        y, sums = select("gelu", x)(y, squares)
    if then is not None:
        y = from_rows(linear(rows(y), matrix(then[0], frozen), second[1]), x)
    if gate is not None:
        y = select("gated_residual", x)(residual, y, gate, overwrite=True)
    return Product(y, before, mean, rstd, sums)


def statistics_of(product: Product) -> tuple[Tensor, Tensor]:
    """LayerNorm's mean and 1 / deviation of a product that began with adaLN."""
    assert product.mean is not None
    assert product.rstd is not None
    return product.mean, product.rstd


def plain_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b, nothing before or behind it: native's own product where that is to multiply, else the library's.

    x (N, C, H, W), channels_last, weight (K, C) in any strides, as it is now, bias (K,), contiguous.
    """
    if multiplies_natively(weight, x):
        note_optional("pointwise", x, native.pointwise, weight.dtype)
        return native.pointwise(x, weight, bias, frozen=False).y
    return from_rows(linear(rows(x), weight, bias), x)


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """W^T dy: the gradient of what a product multiplied; dy (N, K, H, W), channels_last, weight (K, C)."""
    return plain_product(dy, weight.t())


# Pixels an image from which forming the per-sample products is cheaper than forming W x anew: below, they are more
# memory traffic (some 10 bytes an element of W and sample) than the product is arithmetic. Of AVX-512 cores, at 512 to
# 1024 channels: 1.9 against 2.9 ms in float32, 0.9 against 1.3 in bfloat16; at 16 pixels they draw.
_PRODUCTS_FROM = 64
# And where native forms them itself and stores none: a tile's use takes as long as some 8 pixels of it.
_OWN_PRODUCTS_FROM = 16
# Bytes of the products of a chunk of samples, which exist at a time.
_CHUNK_BYTES = 1 << 26


def weight_gradient(dy: Tensor, x: Tensor, wide: bool = False) -> Tensor:
    """The gradient of W in W x: (K, C) of dy (N, K, H, W) and x (N, C, H, W), channels_last; wide as below."""
    if (wide or native.has_faster_weight_gradient(dy.dtype)) and multiplies_natively(x, x):
        return native.weight_gradient(rows(dy)[None], rows(x)[None], wide=wide)[0]
    return rows(dy).t() @ rows(x)


def gated_gradients(
    dy: Tensor, dbranch: Tensor, dinner: Tensor | None, sums: Tensor, gated: Tensor, x: Tensor, s: Tensor | None,
    shift: Tensor | None, gate: Tensor, weight: Tensor, bias: Tensor | None, wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of gate * (W (s * x + shift) + b) by W, gate and s, where what is gated was not kept.

    Either of two ways. With G_n = dy_n^T x_n and t_n the sum of dy_n over pixels, dW = sum_n gate_n G_n s_n,
    dgate_n = rowsum(W * G_n s_n) + b t_n and ds_n = colsum(gate_n W * G_n): as many FLOPs as dW alone, and, where the
    library forms them, traffic of G's size, (N, K, C). Or what is gated formed anew, one more product: what small
    images want, and backends without the kernel.

    Args:
        dy: (N, K, H, W), the gradient of the gated sum.
        dbranch: gate * dy.
        dinner: W^T dbranch, the gradient of s * x; wanted with s alone.
        sums: t, (N, K), accumulation dtype, or in parts, see _sums, as all sums here.
        gated: the sums of dbranch, of which the gradient of b is the total.
        x: (N, C, H, W).
        s: a scale of x's channels, (N, C), accumulation dtype; or None for 1.
        shift: with s: what is added to s * x, (C,); or None.
        gate: (N, K) or (1, K).
        weight: W, (K, C).
        bias: b, (K,) or None.
        wide: dW is wanted in the accumulation dtype, and is not first rounded where that can be helped.

    Returns:
        dW (K, C), in the accumulation dtype or in x's; dgate (N, K) and ds (N, C) or None, both sums.
    """
    pixels = x.shape[2] * x.shape[3]
    own = pixels >= _OWN_PRODUCTS_FROM and multiplies_natively(weight, x)
    kernel = optional("gated_products", x) if own or pixels >= _PRODUCTS_FROM else None
    if kernel is None:
        held = None if shift is None else shift.to(sums.dtype)[None]
        inner = x if s is None else select("channel_affine", x)(x, s, shift=held)
        branch = plain_product(inner, weight, check.dense(bias))
        dgate = select("channel_dots", x)(dy, branch)
        dscale = None if s is None or dinner is None else select("channel_dots", x)(dinner, x)
        return weight_gradient(dbranch, inner, wide), dgate, dscale
    sums, bias = total(sums), check.dense(bias)
    if shift is not None:
        through = weight @ shift
        bias = through if bias is None else through + bias
    if own:
        by = None if shift is None else gradients(sums.dtype, (gated, weight.shape[:1]))[0]
        dy, x = (rows(v).reshape(v.shape[0], pixels, -1) for v in (dy, x))
        note_optional("weight_gradient", x, native.weight_gradient, weight.dtype)
        dweight, dgate, dscale = native.weight_gradient(dy, x, weight, gate, s, shift, by, sums, bias, wide)
        assert dgate is not None
        return dweight, dgate, dscale
    dgate, dweight, dscale = _by_products(kernel, rows(dy), rows(x), s, gate, weight, sums, bias)
    if shift is not None:
        dweight = dweight + total(gated).sum(0)[:, None] * shift.to(sums.dtype)
    return dweight, dgate, dscale


def _by_products(
    kernel: Callable[..., tuple[Tensor, Tensor | None]], dy: Tensor, x: Tensor, s: Tensor | None, gate: Tensor,
    weight: Tensor, sums: Tensor, bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(dgate, dW, ds), a chunk of samples at a time."""
    samples, (k, c) = sums.shape[0], weight.shape
    dweight = sums.new_empty(k, c)
    chunk = max(1, _CHUNK_BYTES // (k * c * x.element_size()))
    dy, x = dy.reshape(samples, -1, k).transpose(1, 2), x.reshape(samples, -1, c)
    found = []
    for first in range(0, samples, chunk):
        part = slice(first, first + chunk)
        products = torch.bmm(dy[part], x[part])
        own_gate, own_s = gate if gate.shape[0] == 1 else gate[part], None if s is None else s[part]
        found.append(kernel(products, weight, own_gate, own_s, dweight, sums[part], bias, first > 0))
    dgates, dscales = zip(*found, strict=True)
    whole = len(found) == 1
    dgate, dscale = (v[0] if whole or v[0] is None else torch.cat(v) for v in (dgates, dscales))
    return dgate, dweight, dscale


__all__ = [
    "Product",
    "from_rows",
    "gated_gradients",
    "input_gradient",
    "linear",
    "plain_product",
    "product",
    "rows",
    "statistics_of",
    "weight_gradient",
]
