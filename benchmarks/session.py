"""One run of the benchmarks: what it measures, arena by arena, and what it remembers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
import torch

from . import contenders, limits, machine, presets, report
from .harness import Contender, Measurement, interleave


class RecordedClock:
    """A clock for pytest-benchmark that advances by the seconds already measured.

    pytest-benchmark runs one test to its end before the next, so it cannot let contenders take turns. The turns are
    taken in harness.interleave; each test then plays its own samples to pytest-benchmark, whose tables, JSON and
    comparisons so hold the interleaved times.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Seconds, as time.perf_counter."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let that much time have passed."""
        self.now += seconds


CLOCK = RecordedClock()


class Session:
    """What one run of the benchmarks measures and remembers."""

    def __init__(self, preset: str) -> None:
        self.device = machine.device()
        gpu = self.device.type == "cuda"
        self.preset = presets.resolve(preset, gpu)
        self.models, self.halves, self.ops = presets.arenas(self.preset, gpu)
        self.rows: dict[str, list[report.Row]] = {"models": [], "halves": [], "ops": []}
        self.ceilings: dict[str, limits.Ceiling] = {}
        self.selected: dict[Any, list[tuple[str, str]]] = {}
        self._arena: Any = None
        self._found: dict[tuple[str, str], tuple[Contender, Measurement]] = {}
        self._failed: dict[tuple[str, str], str] = {}

    def measure(
        self, arena: Any, row: tuple[str, str], build: Callable[..., Contender]
    ) -> tuple[Contender, Measurement]:
        """One row's measurement; the first row of an arena measures all of its selected rows."""
        if arena != self._arena:
            self._arena, self._found, self._failed = arena, {}, {}
            torch._dynamo.reset()
            gc.collect()
            ready = {}
            for key in self.selected[arena]:
                try:
                    ready[key] = build(arena, *key, self.device)
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    self._failed[key] = str(error).splitlines()[0]
            names = {" ".join(key): key for key in ready}
            found = interleave({n: ready[k] for n, k in names.items()}, arena.rounds, self.device)
            self._found = {names[n]: (ready[names[n]], m) for n, m in found.items()}
            del ready
        if row in self._failed:
            pytest.fail(f"{' '.join(row)} could not run: {self._failed[row]}", pytrace=False)
        return self._found[row]

    def ceiling(self, dtype: str) -> limits.Ceiling:
        """The device's ceilings for a dtype, measured once a run."""
        if dtype not in self.ceilings:
            with contenders.precision(dtype):
                self.ceilings[dtype] = limits.measure_ceiling(self.device, contenders.DTYPES[dtype])
        return self.ceilings[dtype]

    def common(self, arena: Any, contender: Contender, found: Measurement) -> report.Row:
        """The part of a result row that models and halves share."""
        share = None
        if contender.macs is not None and contender.moved is not None:
            share = self.ceiling(arena.dtype).seconds(contender.macs, contender.moved) / found.median
        return {
            "arena": arena.title(),
            "dtype": arena.dtype,
            "batch": arena.batch,
            "median_s": found.median,
            "samples_s": found.samples,
            "share": share,
            "macs": contender.macs,
            "moved_bytes": contender.moved,
            "peak_bytes": found.peak_bytes,
            "error": contender.error,
            "compile_s": contender.compile_s,
        }

    def result(self) -> report.Result:
        """Everything measured so far, as written to JSON."""
        for rows, over, against in (
            ("models", "vs_dit", lambda row: row["model"].startswith("DiT")),
            ("halves", "vs_attention", lambda row: row["op"] == "attention_half"),
            ("ops", "vs_eager", lambda row: row["contender"] in ("eager", "channels_last")),
        ):
            _add_ratios(self.rows[rows], over, against)
        return {
            "schema": report.SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "preset": self.preset,
            "machine": machine.describe(),
            "ceilings": {dtype: ceiling.as_dict() for dtype, ceiling in self.ceilings.items()},
            **self.rows,
        }


def _add_ratios(rows: list[report.Row], over: str, against: Callable[[report.Row], bool]) -> None:
    """Speed over the fastest of some rows of the same arena, where it has any."""
    fastest: dict[str, float] = {}
    for row in filter(against, rows):
        fastest[row["arena"]] = min(row["median_s"], fastest.get(row["arena"], float("inf")))
    for row in rows:
        if row["arena"] in fastest:
            row[over] = fastest[row["arena"]] / row["median_s"]
