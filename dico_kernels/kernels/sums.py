"""Adding up what other kernels leave of their sums: a part for each band of rows, all of an op's in one launch.

A training step has some ten such sums a block, each a launch or two of its own otherwise, and one to round it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dico_kernels.kernels.common import acc_triton, cdiv, kernel, launch, row_offset, store

_SLOTS = 9  # as many as FCDM's backward wants
# Rows by columns at a time: a sum over the whole batch is a few hundred rows long in few programs, each of which waits
# for memory once a tile.
_ROWS, _COLS, _WARPS = 128, 32, 8


@triton.jit
def _add(
    program, part, out, count, C,
    ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[group] = the sum of part[group * count : (group + 1) * count], for the group and columns of a program."""
    blocks = tl.cdiv(C, COLS)
    group = (program // blocks).to(tl.int64)
    c = (program % blocks).to(tl.int64) * COLS + tl.arange(0, COLS)
    cmask = (c < C)[None, :]
    sums = tl.zeros([ROWS, COLS], ACC)
    for first in range(0, count, ROWS):
        r = first + tl.arange(0, ROWS)
        offset = row_offset(group * count + r, C)[:, None] + c[None, :]
        sums += tl.load(part + offset, mask=(r < count)[:, None] & cmask, other=0.0)
    store(out + row_offset(group, C) + c, tl.sum(sums, axis=0), c < C)


@kernel
def _add_up_kernel(
    p0, p1, p2, p3, p4, p5, p6, p7, p8, o0, o1, o2, o3, o4, o5, o6, o7, o8,
    n0, n1, n2, n3, n4, n5, n6, n7, n8, c0, c1, c2, c3, c4, c5, c6, c7, c8, e0, e1, e2, e3, e4, e5, e6, e7, e8,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of each slot: part p of rows of c elements, n to a group; out o; e the number of programs up to its end."""
    pid = tl.program_id(0)
    ps = (p0, p1, p2, p3, p4, p5, p6, p7, p8)
    outs = (o0, o1, o2, o3, o4, o5, o6, o7, o8)
    ns = (n0, n1, n2, n3, n4, n5, n6, n7, n8)
    cs = (c0, c1, c2, c3, c4, c5, c6, c7, c8)
    es = (0, e0, e1, e2, e3, e4, e5, e6, e7, e8)
    for i in tl.static_range(SLOTS):
        if (pid >= es[i]) & (pid < es[i + 1]):
            _add(pid - es[i], ps[i], outs[i], ns[i], cs[i], ROWS, COLS, ACC)


def add_up(parts: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The sums over the middle dimension of each, (groups, C) of a dtype, in the order of the parts.

    Args:
        parts: (groups, count, C) each, contiguous, of one accumulation type.
        dtype: of the results.
    """
    found: list[Tensor] = []
    for first in range(0, len(parts), _SLOTS):
        some = parts[first : first + _SLOTS]
        outs = [torch.empty((p.shape[0], p.shape[2]), dtype=dtype, device=p.device) for p in some]
        end, ends = 0, []
        for p in some:
            end += p.shape[0] * cdiv(p.shape[2], _COLS)
            ends.append(end)
        nothing, zeros = [None] * (_SLOTS - len(some)), [0] * (_SLOTS - len(some))
        launch(
            _add_up_kernel, end, *some, *nothing, *outs, *nothing, *(p.shape[1] for p in some), *zeros,
            *(p.shape[2] for p in some), *zeros, *ends, *zeros,
            SLOTS=len(some), ROWS=_ROWS, COLS=_COLS, ACC=acc_triton(some[0].dtype), num_warps=_WARPS,
        )  # fmt: skip
        found += outs
    return found
