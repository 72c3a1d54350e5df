"""Products of a few vectors, one a sample: channel attention's gate, and the conditioning of a whole level.

For small batches. A weight is read once at the memory's rate, and what surrounds the product is in the same kernel;
cuBLAS does as well on the product alone, but the four or five launches of such a step take a GPU longer than its work.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dico_kernels.kernels.common import (
    acc_triton,
    as_operand,
    cdiv,
    dot,
    element_triton,
    empty_acc,
    kernel,
    launch,
    load,
    load_operand,
    matmul_precision,
    row_offset,
    store,
    summed_parts,
    wide,
)
from dico_kernels.kernels.tiles import vector_tile


@kernel
def _vectors_fwd_kernel(
    y, x, weight, bias, mean,
    B, N, K, pixels, row_blocks, col_blocks,
    TABLE: tl.constexpr, ALIGNED: tl.constexpr, MEAN: tl.constexpr, SILU: tl.constexpr, SIGMOID: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TYPE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y (groups, B, N) = f(x (B, K)) @ weight (N, K)^T + bias; TABLE: weight and bias hold a group's addresses each."""
    pid = tl.program_id(0)
    # Programs that share a tile of weights are neighbours, so it comes from memory once.
    row_block = pid % row_blocks
    col_block = pid // row_blocks % col_blocks
    group = wide(pid // row_blocks // col_blocks)
    m = wide(row_block) * BM + tl.arange(0, BM)
    c = wide(col_block) * BN + tl.arange(0, BN)
    i = tl.arange(0, BK).to(tl.int64)
    if TABLE:
        weight = tl.load(weight + group).to(tl.pointer_type(TYPE))
        if BIAS:
            bias = tl.load(bias + group).to(tl.pointer_type(TYPE))
        if ALIGNED:
            weight = tl.multiple_of(weight, 16)
    source = x + row_offset(m, K)[:, None] + i[None, :]
    taps = weight + row_offset(c, K)[None, :] + i[:, None]
    mmask, cmask = m < B, c < N
    acc = tl.zeros([BM, BN], ACC)
    for at in range(0, K, BK):
        left = i < K - at
        mask = mmask[:, None] & left[None, :]
        v = load(source + wide(at), mask, ACC)
        if MEAN:
            v = v / pixels
            store(mean + row_offset(m, K)[:, None] + (wide(at) + i)[None, :], v, mask & (col_block == 0))
        if SILU:
            v = v / (1.0 + tl.exp(-v))
        b = load_operand(taps + wide(at), left[:, None] & cmask[None, :])
        acc = dot(as_operand(v, TYPE), b, acc, PRECISION)
    if BIAS:
        acc += load(bias + c, cmask, ACC)[None, :]
    if SIGMOID:
        acc = 1.0 / (1.0 + tl.exp(-acc))
    store(y + (group * B + m)[:, None] * N + c[None, :], acc, mmask[:, None] & cmask[None, :])


def _launch(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    groups: int,
    dtype: torch.dtype,
    pixels: int = 1,
    silu: bool = False,
    aligned: bool = True,
) -> None:
    (b, k), n = x.shape, y.shape[-1]
    tile = vector_tile(b, n, k, groups, dtype, x.dtype.itemsize)
    row_blocks, col_blocks = cdiv(b, tile.m), cdiv(n, tile.n)
    launch(
        _vectors_fwd_kernel, groups * row_blocks * col_blocks,
        y, x, weight, bias, mean, b, n, k, pixels, row_blocks, col_blocks,
        TABLE=weight.dtype == torch.int64, ALIGNED=aligned, MEAN=mean is not None, SILU=silu,
        SIGMOID=mean is not None, BIAS=bias is not None, PRECISION=matmul_precision(dtype),
        BM=tile.m, BN=tile.n, BK=tile.k, TYPE=element_triton(dtype), ACC=acc_triton(dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def channel_attention(sums: Tensor, pixels: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean, sigmoid(W mean + b)) of mean = sums / pixels, both (N, C) in sums' type.

    Args:
        sums: (N, C), accumulation type, contiguous.
        pixels: H * W.
        weight: (C, C).
        bias: (C,) or None.
    """
    mean, attention = torch.empty_like(sums), torch.empty_like(sums)
    _launch(attention, sums, weight, bias, mean, 1, weight.dtype, pixels=pixels)
    return mean, attention


@kernel
def _attention_bwd_kernel(
    dattention, attention, pooled, dlogits, low, low_share, low_pooled,
    C, pixels, parts, blocks,
    PARTS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = wide(pid // blocks)
    c = wide(pid % blocks) * COLS + tl.arange(0, COLS)
    mask = c < C
    d = summed_parts(dattention, n, parts, C, c, PARTS, ACC)
    at = row_offset(n, C) + c
    a = load(attention + at, mask, ACC)
    d *= a * (1.0 - a)
    store(dlogits + at, d, mask)
    store(low + at, d, mask)
    store(low_share + at, d / pixels, mask)
    store(low_pooled + at, load(pooled + at, mask, ACC), mask)


def channel_attention_backward(
    dattention: Tensor, attention: Tensor, pooled: Tensor, pixels: int, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of channel_attention by sums (N, C), weight (C, C) and, a sample each, bias (N, C).

    The first two are of weight's type, the last of the accumulation's; dattention is (N, parts, C).
    """
    (n, c), cols = attention.shape, 128
    low, low_share, low_pooled = (torch.empty((n, c), dtype=weight.dtype, device=weight.device) for _ in range(3))
    dlogits = empty_acc(n, c, like=attention)
    blocks = cdiv(c, cols)
    launch(
        _attention_bwd_kernel, n * blocks,
        dattention, attention, pooled, dlogits, low, low_share, low_pooled,
        c, pixels, dattention.shape[1], blocks,
        PARTS=16, COLS=cols, ACC=acc_triton(attention.dtype), num_warps=4,
    )  # fmt: skip
    return low_share @ weight, low.t() @ low_pooled, dlogits


# Addresses of a level's weights and of its biases on their device, by the first weight; and those that a graph has
# recorded, which reads them at each replay: while it may be replayed, its weights live.
_Tables = MutableMapping[Tensor, dict[tuple[int, ...], tuple[Tensor, Tensor]]]
_TABLES: _Tables = WeakIdKeyDictionary()
_RECORDED: _Tables = WeakIdKeyDictionary()
_KEPT = 8  # of weights that move


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _table(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The addresses, or None while a graph is recorded that would have to record how they are written."""
    device = weights[0].device
    addresses = tuple(t.data_ptr() for t in (*weights, *biases))
    known = _TABLES.setdefault(weights[0], {})
    found = known.get(addresses)
    if _capturing(device):
        if found is not None:
            _RECORDED.setdefault(weights[0], {})[addresses] = found
        return found
    if found is None:
        k = len(weights)
        lists = (torch.tensor(part, dtype=torch.int64, device="cpu") for part in (addresses[:k], addresses[k:]))
        of_weights, of_biases = (v.to(device) for v in lists)
        found = known[addresses] = of_weights, of_biases
        for oldest in list(known)[:-_KEPT]:
            known.pop(oldest, None)
    return found


def conditioning(c: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor | None:
    """Linear(SiLU(c)) for each weight (K, C) and bias (K,): (groups, N, K) for c (N, C), all of one type.

    None in a CUDA graph's recording that is the first to see these weights.
    """
    table = _table(weights, biases)
    if table is None:
        return None
    y = torch.empty((len(weights), c.shape[0], weights[0].shape[0]), dtype=c.dtype, device=c.device)
    aligned = all(w.data_ptr() % 16 == 0 for w in weights)
    _launch(y, c, *table, None, len(weights), c.dtype, silu=True, aligned=aligned)
    return y
