"""Gradients of 1x1 convolutions' weights, with those of the gate behind: csrc/cpu/weight_gradient.h, on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from dico_kernels._extension import call, extension
from dico_kernels._linear import loops
from dico_kernels._memory import DTYPES, dense, reduced, vector
from dico_kernels.dtypes import accumulation_dtype


def has_faster_weight_gradient(dtype: torch.dtype) -> bool:
    """Whether weight_gradient takes less time than the library's product on a CPU where native multiplies.

    With AVX-512 the library's takes 0.90 to 1.21 of its time in float32 (median 1.04), but 0.81 to 1.08 in bfloat16
    (0.96) where it has products of that.
    """
    return dtype == torch.float32 or loops(dtype)


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    s: Tensor | None = None,
    shift: Tensor | None = None,
    gated: Tensor | None = None,
    sums: Tensor | None = None,
    bias: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of gate * (W (s x + shift) + b), from dy's and x's rows: (dW, dgate, ds), see ops/pointwise.py; or dW of W x.

    Args:
        dy: (N, P, K), contiguous: the gradient of the gated sum, P pixels each of N samples.
        x: (N, P, C), contiguous, of dy's dtype.
        weight: W (K, C), contiguous; with gate.
        gate: (N, K) or (1, K), no gaps in a row; all that follows is with it.
        s: (N, C), in the accumulation dtype, or None for 1.
        shift: (C,), or None for 0.
        gated: with shift: the sums of gate * dy over samples and pixels, (K,), in the accumulation dtype.
        sums: with bias: dy's over the pixels, (N, K), in the accumulation dtype.
        bias: W shift + b, (K,), or None.
        wide: dW in the accumulation dtype.

    Returns:
        dW (K, C), of dy's dtype or wide; dgate (N, K) and ds (N, C), in the accumulation dtype, None without gate or s.

    Raises:
        ValueError: a wrong size, layout, dtype or device, naming the argument.
    """
    n, pixels, k = dy.shape
    c = x.shape[2]
    if dy.dtype not in DTYPES:
        raise ValueError(f"dy has dtype {dy.dtype}: expected a floating dtype")
    accumulated, stride, dgate, dscale = accumulation_dtype(dy.dtype), 0, None, None
    dense("dy", dy, (n, pixels, k), dy.dtype, dy.device)
    dense("x", x, (n, pixels, c), dy.dtype, dy.device)
    if gate is not None:
        if weight is None:
            raise ValueError("weight is None: expected it with gate")
        dense("weight", weight, (k, c), dy.dtype, dy.device)
        stride = vector("gate", gate, dy.transpose(1, 2))
        dgate = reduced(dy, n, k)
    for name, t in (("s", s), ("shift", shift), ("bias", bias)):
        if t is not None and gate is None:
            raise ValueError(f"gate is None: expected it with {name}")
    if s is not None:
        dense("s", s, (n, c), accumulated, dy.device)
        dscale = reduced(dy, n, c)
    if shift is not None:
        if gated is None:
            raise ValueError("gated is None: expected it with shift")
        dense("shift", shift, (c,), dy.dtype, dy.device)
        dense("gated", gated, (k,), accumulated, dy.device)
    _bias(bias, sums, n, k, dy)
    dweight = torch.empty((k, c), dtype=accumulated if wide else dy.dtype, device=dy.device)
    if not n * pixels * k * c:
        zeros = [None if t is None else t.zero_() for t in (dgate, dscale)]
        return dweight.zero_(), zeros[0], zeros[1]
    if gate is None:
        n, pixels = 1, n * pixels
    scratch = torch.empty(_scratch(dy, n, pixels, k, c), dtype=torch.uint8, device=dy.device)
    given = (dy, x, weight, gate, s, shift, gated, sums, bias)
    call("weight_gradient", dy, *given, dweight, dgate, dscale, scratch, n, pixels, k, c, stride, int(wide))
    return dweight, dgate, dscale


def _scratch(dy: Tensor, *sizes: int) -> int:
    if not dy.is_cpu:
        return 0  # about to be refused
    return int(extension().weight_gradient_scratch(DTYPES[dy.dtype], *sizes))


def _bias(bias: Tensor | None, sums: Tensor | None, n: int, k: int, like: Tensor) -> None:
    if bias is None:
        return
    if sums is None:
        raise ValueError("sums is None: expected it with bias")
    dense("sums", sums, (n, k), accumulation_dtype(like.dtype), like.device)
    dense("bias", bias, (k,), like.dtype, like.device)


def gated_products(
    products: Tensor,
    weight: Tensor,
    gate: Tensor,
    s: Tensor | None,
    dweight: Tensor,
    sums: Tensor | None = None,
    bias: Tensor | None = None,
    add: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """What G_n = dy_n^T x_n, (N, K, C), holds of the gradients of gate * (W (s x) + b); see ops/pointwise.py.

    Adds sum_n gate_n G_n s_n to dweight (K, C), or writes it there; returns rowsum(W * G_n s_n), (N, K), with b t_n
    where b and t, the sums (N, K), are given, and with s, (N, C), colsum(gate_n W * G_n), (N, C). dweight, s, t and
    what is returned are in the accumulation dtype.
    """
    n, k, c = products.shape
    wide = accumulation_dtype(products.dtype)
    dense("products", products, (n, k, c), products.dtype, products.device)
    dense("weight", weight, (k, c), products.dtype, products.device)
    stride = vector("gate", gate, products)
    dense("dweight", dweight, (k, c), wide, products.device)
    block = max(min(-(-k // 32), 64), 4)
    dgate, dscale, partial = reduced(products, n, k), None, None
    if s is not None:
        dense("s", s, (n, c), wide, products.device)
        dscale, partial = reduced(products, n, c), reduced(products, -(-k // block), n, c)
    _bias(bias, sums, n, k, products)
    if not n and not add:
        dweight.zero_()
    given = (products, weight, gate, s, sums, bias)
    args = (*given, dweight, dgate, dscale, partial, n, k, c, block, stride, int(add))
    call("gated_products", products, *args)
    return dgate, dscale
