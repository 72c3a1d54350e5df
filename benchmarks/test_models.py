"""Throughput of whole models: one test a row of the tables."""

from __future__ import annotations

from typing import Any

import pytest

from dico_kernels.benchmarks import contenders
from dico_kernels.benchmarks.session import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def test_model(model_row: Any, state: Any, replay: Any, benchmark: Any) -> None:
    arena, row = model_row
    benchmark.group = arena.title()
    contender, found = state.measure(arena, row, contenders.model_contender)
    own = {
        "model": row[0],
        "contender": row[1],
        "resolution": arena.resolution,
        "mode": arena.mode,
        "img_s": None if found.failure else arena.batch / found.median,
    }
    state.record("models", arena, contender, found, own)
    replay(found)
