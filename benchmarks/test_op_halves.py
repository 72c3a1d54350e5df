"""DiCo's convolution half against DiT's attention half, at equal tokens and width."""

from __future__ import annotations

from typing import Any

import pytest

from dico_kernels.benchmarks import contenders
from dico_kernels.benchmarks.session import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_half(half_row: Any, state: Any, replay: Any, benchmark: Any) -> None:
    arena, row = half_row
    benchmark.group = arena.title()
    contender, found = state.measure(arena, row, contenders.half_contender)
    own = {"op": row[0], "contender": row[1], "width": arena.width, "tokens": arena.side**2}
    state.record("halves", arena, contender, found, own)
    replay(found)
