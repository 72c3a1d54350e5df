"""Each fused op against its definition in both memory layouts."""

from __future__ import annotations

from typing import Any

import pytest

from dico_kernels.benchmarks import op_contenders
from dico_kernels.benchmarks.session import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_op(op_row: Any, state: Any, replay: Any, benchmark: Any) -> None:
    arena, row = op_row
    benchmark.group = arena.title()
    contender, found = state.measure(arena, row, op_contenders.op_contender)
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
