"""One run of the benchmarks: what it measures, arena by arena, and what it remembers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import torch

from . import contenders, limits, machine, presets, report
from .harness import Contender, Measurement, failed, interleave


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
        kept = machine.keep_heap()
        self.preset = presets.resolve(preset, gpu)
        self.models, self.halves, self.ops = presets.arenas(self.preset, gpu)
        self.rows: dict[str, list[report.Row]] = {"models": [], "halves": [], "ops": []}
        self.ceilings: dict[str, limits.Ceiling] = {}
        self.selected: dict[Any, list[tuple[str, str]]] = {}
        self.machine = {**machine.describe(), "heap_kept": kept}
        self._arena: Any = None
        self._found: dict[tuple[str, str], tuple[Contender | None, Measurement]] = {}
        self._clocks: str | None = None

    def measure(
        self, arena: Any, row: tuple[str, str], build: Callable[..., Contender]
    ) -> tuple[Contender | None, Measurement]:
        """One row's measurement; the first row of an arena measures all of its selected rows."""
        if arena != self._arena:
            self._arena, self._found = arena, {}
            torch._dynamo.reset()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            ready: dict[tuple[str, str], Contender] = {}
            for key in self.selected[arena]:
                try:
                    ready[key] = build(arena, *key, self.device)
                except Exception as error:  # the other contenders are still worth measuring
                    self._found[key] = None, Measurement(failure=failed(f"{arena.title()} {' '.join(key)}", error))
            names = {" ".join(key): key for key in ready}
            found = interleave({n: ready[k] for n, k in names.items()}, arena.rounds, self.device)
            self._clocks = machine.clocks(self.device)
            if not isinstance(arena, presets.OpArena) or arena.op in presets.BLOCKS:
                self._look_up_ceiling(arena.dtype)
            self._found |= {names[n]: (ready[names[n]], m) for n, m in found.items()}
        return self._found[row]

    def _look_up_ceiling(self, dtype: str) -> None:
        """Measure the device's ceilings for a dtype, after every arena of it, and keep the best of the run.

        Others may use the machine too: one measurement in a slow moment would put every row above its limit.
        None on a GPU for "fp32", which lets cuDNN's convolutions use TF32 and matrix products not: no single ceiling
        is true of both.
        """
        if dtype == "fp32" and self.device.type == "cuda":
            return
        with contenders.precision(dtype):
            found = limits.measure_ceiling(self.device, contenders.DTYPES[dtype])
        self.ceilings[dtype] = found.best(self.ceilings.get(dtype, found))

    def record(self, table: str, arena: Any, contender: Contender | None, found: Measurement, own: report.Row) -> None:
        """Add a row to a table of the result. ``own``: what only this table has."""
        self.rows[table].append(row_of(own, arena, contender, found, None, self._clocks))

    def result(self) -> report.Result:
        """Everything measured so far, as written to JSON."""
        for rows, over, against in (
            ("models", "vs_dit", lambda row: row["model"].startswith("DiT")),
            ("halves", "vs_attention", lambda row: row["op"] == "attention_half"),
            ("ops", "vs_eager", lambda row: row["contender"] in report.UNFUSED),
        ):
            add_ratios(self.rows[rows], over, against)
        plain = [row for row in self.rows["models"] if not row["model"].startswith("DiT")]
        add_ratios(plain, "vs_plain", lambda row: row["contender"] in report.UNFUSED, ("arena", "model"))
        for row in (row for rows in self.rows.values() for row in rows):
            if row.get("op") not in presets.OP_LEVELS:
                row["share"] = share_of(row, self.ceilings.get(row["dtype"]))
        return {
            "schema": report.SCHEMA,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "preset": self.preset,
            "machine": self.machine,
            "ceilings": {dtype: ceiling.as_dict() for dtype, ceiling in self.ceilings.items()},
            **self.rows,
        }


def row_of(
    own: report.Row,
    arena: Any,
    contender: Contender | None,
    found: Measurement,
    ceiling: limits.Ceiling | None,
    clocks: str | None,
) -> report.Row:
    """A row of a result's table. ``own``: what only this table has."""
    done = found.failure is None and bool(found.samples)
    row: report.Row = {
        **own,
        "arena": arena.title(),
        "dtype": arena.dtype,
        "batch": arena.batch,
        "failure": found.failure,
        "median_s": found.median if done else None,
        "samples_s": found.samples,
        "share": None,
        "peak_bytes": found.peak_bytes,
        "host_s": found.host_s,
        "clocks": clocks,
    }
    for name in ("macs", "moved", "error", "compile_s"):
        row[name] = getattr(contender, name, None)
    row["share"] = share_of(row, ceiling)
    return row


def share_of(row: report.Row, ceiling: limits.Ceiling | None) -> float | None:
    """The share of the roofline that a row reaches; None where its work, its time or the ceiling is not known."""
    if ceiling is None or None in (row["macs"], row["moved"], row["median_s"]):
        return None
    return ceiling.seconds(row["macs"], row["moved"]) / float(row["median_s"])


def add_ratios(
    rows: list[report.Row], over: str, against: Callable[[report.Row], bool], same: tuple[str, ...] = ("arena",)
) -> None:
    """Speed over the fastest of some of the rows that have the same arena, or more in common; where there are any."""
    fastest: dict[tuple[str, ...], float] = {}
    for row in filter(against, rows):
        if row["median_s"] is not None:
            group = tuple(row[name] for name in same)
            fastest[group] = min(row["median_s"], fastest.get(group, float("inf")))
    for row in rows:
        group = tuple(row[name] for name in same)
        if group in fastest and row["median_s"] is not None:
            row[over] = fastest[group] / row["median_s"]
