"""The results of ``bench gpu`` on disk: one JSON file, replaced whole after every row, so that a cut costs one row."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import report
from .gpu_plan import Unit

PRESET = "bench gpu"


class Store:
    """A result as ``report`` knows it, with what each stage did beside its rows. One process writes at a time."""

    def __init__(self, path: Path, result: report.Result) -> None:
        self.path, self.result = path, result

    @classmethod
    def open(cls, path: Path, machine: dict[str, Any]) -> Store:
        """The file's results if they are of the same device and source, to go on with; else a new one.

        Results of another device or source are set aside under another name.
        """
        try:
            found = cls.load(path)
        except (OSError, ValueError):
            found = None
        if found is not None:
            if all(found.result["machine"].get(k) == machine.get(k) for k in ("device", "commit", "source")):
                return found
            path.replace(path.with_name(f"{path.stem}-{found.result['created'].replace(':', '')}.json"))
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        empty: dict[str, Any] = {"ceilings": {}, "models": [], "halves": [], "kernels": [], "tests": None, "stages": {}}
        head = {"schema": report.SCHEMA, "created": created, "preset": PRESET, "machine": machine, "in_flight": None}
        store = cls(path, {**head, **empty})
        store.save()
        return store

    @classmethod
    def load(cls, path: Path) -> Store:
        """What a file holds; errors as ``report.load``."""
        return cls(path, report.load(path))

    def save(self) -> None:
        """Write it all, so that a reader finds the old file or the new one."""
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(self.result, indent=1) + "\n")
        partial.replace(self.path)

    # ---- rows ----

    def begin(self, unit: Unit, row: tuple[str, str] | None) -> None:
        """Note what is being measured (None: all of a unit, in turns), for whoever finds this process dead."""
        self.result["in_flight"] = {
            "stage": unit.stage,
            "unit": unit.title,
            "rows": [list(r) for r in ([row] if row else unit.rows)],
            "since": time.time(),
            "arena": {"dtype": unit.arena.dtype, "batch": unit.arena.batch},
        }
        self.save()

    def end(self) -> None:
        """Nothing is being measured."""
        self.result["in_flight"] = None
        self.save()

    def put(self, stage: str, row: report.Row) -> None:
        """Add a row, or replace the one of the same arena and contender."""
        rows = self.result[stage]
        same = [i for i, other in enumerate(rows) if _key(other) == _key(row)]
        if same:
            rows[same[0]] = row
        else:
            rows.append(row)
        self.save()

    def bury(self, reason: str) -> bool:
        """Record as failed what was being measured when a process died; whether there was anything."""
        flight = self.result["in_flight"]
        if flight is None:
            return False
        known = {_key(r): r for r in self.result[flight["stage"]]}
        for name, contender in flight["rows"]:
            row = {
                **dict.fromkeys(("median_s", "img_s", "share", "peak_bytes", "error", "compile_s", "macs", "moved")),
                **{"op": name, "model": name, "contender": contender, "arena": flight["unit"], "failure": reason},
                **{"resolution": 0, "mode": "inference", "samples_s": [], "alone": False, **flight["arena"]},
            }
            del row["op" if flight["stage"] == "models" else "model"]
            if len(flight["rows"]) > 1 and _key(row) in known:
                known[_key(row)]["alone"] = False  # it has a time of its own; the turns will not be tried again
            elif known.get(_key(row), {}).get("failure"):
                continue  # it was kept with the first reason
            elif len(flight["rows"]) == 1 or flight["stage"] == "kernels":
                self.put(flight["stage"], self._like(flight["stage"], row))
        self.end()
        return True

    def _like(self, stage: str, row: report.Row) -> report.Row:
        """A row with what is left to fill in taken from another of its arena."""
        other: report.Row = next((r for r in self.result[stage] if r["arena"] == row["arena"]), {})
        return {**row, **{k: other[k] for k in ("resolution", "mode", "size", "channels", "side") if k in other}}

    def settled(self, unit: Unit) -> dict[tuple[str, str], report.Row]:
        """Rows of a unit that need no further measuring: measured in turns, or failed."""
        found = {}
        for row in self.result[unit.stage]:
            name = row["op"] if unit.stage == "kernels" else row["model"]
            if row["arena"] == unit.title and (name, row["contender"]) in unit.rows and not row.get("alone"):
                found[name, row["contender"]] = row
        return found


def _key(row: report.Row) -> tuple[str, str, str]:
    return row["arena"], row["model"] if "model" in row else row["op"], row["contender"]
