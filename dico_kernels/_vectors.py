"""Products of a few vectors, one an image: csrc/cpu/attention.h as functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dico_kernels._extension import call
from dico_kernels._memory import DTYPES, dense, image, like, reduced, row_blocks
from dico_kernels.dtypes import accumulation_dtype

# Vectors up to which reading a weight once is most of the work: beyond, a product made for many rows is faster.
FEW = 8


def channel_attention(sums: Tensor, pixels: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean, sigmoid(W mean + b)) of mean = sums / pixels, each (N, C) in the accumulation dtype; W (C, C), b (C,)."""
    n, c = sums.shape
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight has dtype {weight.dtype}: expected a floating dtype")
    wide = accumulation_dtype(weight.dtype)
    dense("sums", sums, (n, c), wide, sums.device)
    dense("weight", weight, (c, c), weight.dtype, sums.device)
    if bias is not None:
        dense("bias", bias, (c,), weight.dtype, sums.device)
    if pixels < 1:
        raise ValueError(f"pixels={pixels}: expected at least 1")
    mean, attention = torch.empty_like(sums), torch.empty_like(sums)
    call("channel_attention", sums, sums, weight, bias, mean, attention, n, c, pixels, dtype=weight.dtype)
    return mean, attention


def channel_attention_backward(
    dattention: Tensor, attention: Tensor, mean: Tensor, pixels: int, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Of ``channel_attention`` by sums, weight and, a sample, bias: (N, C), as weight, (N, C).

    None for no vectors, or more than this is made for.
    """
    n, c = attention.shape
    if not 0 < n <= FEW:
        return None
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight has dtype {weight.dtype}: expected a floating dtype")
    for name, v in (("dattention", dattention), ("attention", attention), ("mean", mean)):
        dense(name, v, (n, c), accumulation_dtype(weight.dtype), attention.device)
    dense("weight", weight, (c, c), weight.dtype, attention.device)
    if pixels < 1:
        raise ValueError(f"pixels={pixels}: expected at least 1")
    dsums, dbias, dweight = torch.empty_like(attention), torch.empty_like(attention), torch.empty_like(weight)
    ins = (dattention, attention, mean, weight)
    call("channel_attention_backward", mean, *ins, dsums, dweight, dbias, n, c, pixels, dtype=weight.dtype)
    return dsums, dweight, dbias


def cca_gate(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(x * attention, mean, attention) of an image, in one call: channel_sums, channel_attention and channel_affine."""
    image("x", x)
    n, c = x.shape[:2]
    dense("weight", weight, (c, c), x.dtype, x.device)
    if bias is not None:
        dense("bias", bias, (c,), x.dtype, x.device)
    *sizes, blocks = row_blocks(x)
    y, mean, attention, partial = like(x), reduced(x, n, c), reduced(x, n, c), reduced(x, blocks, c)
    call("cca_gate", x, *sizes, x, weight, bias, partial, mean, attention, y)
    return y, mean, attention


def conditioning(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor | None:
    """Linear(SiLU(c)) for each weight (K, C) and bias (K,): (heads, N, K) for c (N, C), all of one type.

    None for more vectors than this is made for.
    """
    n, inputs = c.shape
    if n > FEW:
        return None
    if c.dtype not in DTYPES:
        raise ValueError(f"c has dtype {c.dtype}: expected a floating dtype")
    k = weights[0].shape[0]
    dense("c", c, (n, inputs), c.dtype, c.device)
    for weight, bias in zip(weights, biases, strict=True):
        dense("weight", weight, (k, inputs), c.dtype, c.device)
        dense("bias", bias, (k,), c.dtype, c.device)
    addresses = torch.tensor([[w.data_ptr() for w in weights], [b.data_ptr() for b in biases]], device="cpu")
    y = torch.empty((len(weights), n, k), dtype=c.dtype, device=c.device)
    call("conditioning", c, c, addresses[0], addresses[1], torch.empty_like(c), y, len(weights), n, inputs, k)
    return y


__all__ = ["FEW", "cca_gate", "channel_attention", "channel_attention_backward", "conditioning"]
