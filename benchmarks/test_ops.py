"""Each fused op, and each whole block, against its definition in both memory layouts."""

from __future__ import annotations

from typing import Any

import pytest

from dico_kernels.benchmarks import block_contenders, op_contenders
from dico_kernels.benchmarks.presets import BLOCKS
from dico_kernels.benchmarks.session import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_op(op_row: Any, state: Any, replay: Any, benchmark: Any) -> None:
    arena, row = op_row
    benchmark.group = arena.title()
    build = block_contenders.block_contender if arena.op in BLOCKS else op_contenders.op_contender
    contender, found = state.measure(arena, row, build)
    own = {
        "op": row[0],
        "contender": row[1],
        "size": arena.size,
        "channels": arena.channels,
        "side": arena.side,
        "mode": arena.mode,
    }
    state.record("ops", arena, contender, found, own)
    replay(found)
