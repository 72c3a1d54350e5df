"""The process that measures a stage of ``bench gpu``.

A process of its own, because a kernel at fault takes every later CUDA call of its process with it: whoever started
this one finds out from the results' ``in_flight`` which row it was, and starts another for the rest.

    python -m dico_kernels.benchmarks.gpu_worker --stage kernels --results DIR/gpu.json --deadline EPOCH_SECONDS
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import contenders, limits, machine, op_contenders
from .gpu_plan import CEILINGS, Unit, units
from .gpu_store import Store
from .harness import Contender, Measurement, describe_failure, failed, interleave
from .session import row_of

DEVICE_LOST = 3  # exit status: start another process
_KERNEL_SAMPLE_S = 0.02
_ALONE_ROUNDS = 3
_CLOCKS_S = 3.0
Build = Callable[..., Contender]
Say = Callable[[str], None]


class DeviceLostError(RuntimeError):
    """The device takes no more work from this process."""


def print_line(line: str) -> None:
    """Print at once, for whoever follows a pipe."""
    print(line, flush=True)


def _check_device(device: torch.device) -> None:
    """An asynchronous error shows at the next synchronisation, and at each one from then on."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as error:
            raise DeviceLostError(describe_failure(error)) from error


class Worker:
    """Measures a stage's units until its deadline."""

    def __init__(
        self,
        stage: str,
        store: Store,
        deadline: float,
        device: torch.device,
        *,
        plan: Sequence[Unit] | None = None,
        build: Build | None = None,
        now: Callable[[], float] = time.time,
        say: Say = print_line,
        parent: int | None = None,
    ) -> None:
        self.stage, self.store, self.deadline, self.device, self.now, self.say = (
            stage, store, deadline, device, now, say
        )  # fmt: skip
        self.plan = units(stage) if plan is None and stage in ("kernels", "models") else list(plan or ())
        default = op_contenders.op_contender if stage == "kernels" else contenders.model_contender
        self.build: Build = default if build is None else build
        self.sample_s = _KERNEL_SAMPLE_S if stage == "kernels" else None
        self.parent, self.slowest, self.skipped = parent, 0.0, 0
        self.clocks: str | None = None
        self.clocks_read = -math.inf

    def run(self, ceilings: Sequence[str] = CEILINGS) -> None:
        """Measure what is not yet settled, and note how far it came."""
        if self.stage == "ceilings":
            for dtype in ceilings:
                self.ceiling(dtype)
        else:
            for unit in self.plan:
                self.unit(unit)
            note = f"{self.skipped} rows left for want of time: run it again to go on" if self.skipped else ""
            self.store.result["stages"].setdefault(self.stage, {})["note"] = note
        self.store.end()

    def ceiling(self, dtype: str) -> limits.Ceiling | None:
        """What the device reaches; measured once for all processes, and None where that fails."""
        found = self.store.result["ceilings"]
        if dtype not in found and self.now() < self.deadline:
            try:
                with contenders.precision(dtype):
                    ceiling = limits.measure_ceiling(self.device, contenders.DTYPES[dtype])
            except Exception as error:
                why = f"{dtype}: {failed(f'ceilings {dtype}', error)}"
                self.store.result["stages"].setdefault("ceilings", {})["note"] = why
                self.say(f"ceilings  {why}")
                _check_device(self.device)
                return None
            found[dtype] = ceiling.as_dict()
            self.store.save()
            self.say(f"ceilings  {dtype}: {ceiling.flops / 1e12:.1f} TFLOP/s, copy {ceiling.bytes / 1e9:,.0f} GB/s")
        return limits.Ceiling(**found[dtype]) if dtype in found else None

    def unit(self, unit: Unit) -> None:
        """Build a unit's contenders one after the other, each timed alone at once, then time them in turns."""
        settled = self.store.settled(unit)
        if len(settled) == len(unit.rows) or (self.parent is not None and os.getppid() != self.parent):
            return
        hopeless = {row for row, found in settled.items() if found["failure"]}
        ready: dict[str, Contender] = {}
        alone: dict[str, Measurement] = {}
        rows = {" ".join(row): row for row in unit.rows}
        left = 0
        for name, row in rows.items():
            begun = self.now()
            if row in hopeless:
                continue
            if begun + unit.seconds(row, self.slowest) > self.deadline:
                left += 1
                continue
            self.store.begin(unit, row)
            contender, found = self._alone(unit, row)
            if contender is not None and found.failure is None:
                ready[name], alone[name] = contender, found
            self._put(unit, row, contender, found, alone=found.failure is None)
            if self.stage == "models" or found.failure:
                self._clear()
            # Right after its row is kept: the next process then leaves this one out.
            _check_device(self.device)
            if self.stage == "kernels":
                self.slowest = max(0.9 * self.slowest, self.now() - begun)
        self.skipped += left
        if not ready:
            self.store.end()
            return
        if self.now() < self.deadline:
            self.store.begin(unit, None)
            kernels = self.stage == "kernels"
            found_all = interleave(ready, unit.arena.rounds, self.device, self.sample_s, queued=kernels)
            clocks = self._read_clocks()
            for name, found in found_all.items():
                if found.failure and alone[name].samples:  # such as out of memory beside the others
                    self.say(f"{self.stage:<9} {unit.title}  {name}: {found.failure}, timed alone only")
                    self._put(unit, rows[name], ready[name], alone[name], alone=False, apart=True)
                    continue
                # A unit that lacks rows is measured whole another time: rows compare only within one set of turns.
                self._put(unit, rows[name], ready[name], found, alone=left > 0, clocks=clocks)
            _check_device(self.device)
        ready.clear()
        self.store.end()
        self._clear()
        if self.stage == "models":
            torch._dynamo.reset()

    def _alone(self, unit: Unit, row: tuple[str, str]) -> tuple[Contender | None, Measurement]:
        try:
            contender = self.build(unit.arena, *row, self.device)
            if self.stage == "kernels":
                # Here, where a fault is this row's alone; the turns follow within a second.
                contender.run(0)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                return contender, Measurement()
        except Exception as error:  # the other contenders are still worth measuring
            return None, Measurement(failure=failed(f"{unit.title}  {' '.join(row)}", error))
        return contender, interleave({"": contender}, _ALONE_ROUNDS, self.device, self.sample_s)[""]

    def _put(
        self,
        unit: Unit,
        row: tuple[str, str],
        contender: Contender | None,
        found: Measurement,
        alone: bool,
        apart: bool = False,
        clocks: str | None = None,
    ) -> None:
        arena: Any = unit.arena
        ceiling = self.ceiling(arena.dtype)
        if self.stage == "kernels":
            own = {"op": row[0], "size": arena.size, "channels": arena.channels, "side": arena.side}
        else:
            rate = arena.batch / found.median if found.samples and not found.failure else None
            own = {"model": row[0], "resolution": arena.resolution, "img_s": rate}
        if alone and not found.samples:
            return  # nothing measured so far
        own |= {"contender": row[1], "mode": arena.mode, "alone": alone, "apart": apart}
        made = row_of(own, arena, contender, found, ceiling, clocks)
        self.store.put(self.stage, made)
        took = made["failure"] or f"{made['median_s'] * 1e3:.3f} ms"
        if made["failure"] or not alone or self.stage == "models":
            self.say(f"{self.stage:<9} {unit.title}  {row[0]} {row[1]}: {took}{' (alone)' if alone else ''}")

    def _read_clocks(self) -> str | None:
        """Of the last seconds: a small kernel's turns take less time than asking."""
        if self.now() - self.clocks_read > _CLOCKS_S:
            self.clocks, self.clocks_read = machine.clocks(self.device), self.now()
        return self.clocks

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def prepare(plan: Sequence[Unit], deadline: float, device: torch.device, build: Build | None = None) -> None:
    """Run each row of this package's once, so that Triton's cache on disk has what it compiles to.

    Compiling is one thread's work: several processes do it in a fraction of the time. What fails will fail again where
    it is measured, and is reported there.
    """
    for unit in plan:
        for row in unit.rows:
            if row[1].startswith("triton") and time.time() < deadline:
                try:
                    (build or op_contenders.op_contender)(unit.arena, *row, device).run(0)
                    _check_device(device)
                except DeviceLostError:
                    return
                except Exception:  # measured, it is reported
                    continue
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one stage; 0, or DEVICE_LOST."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--prepare", metavar="I/N", help="only run every N-th unit's rows once, from the I-th on")
    args = parser.parse_args(argv)
    gc.freeze()  # what was imported stays: collecting between rows should not look at it
    if args.prepare:
        index, count = map(int, args.prepare.split("/"))
        prepare(units(args.stage)[index::count], args.deadline, torch.device(args.device))
        return 0
    store = Store.load(args.results)
    worker = Worker(args.stage, store, args.deadline, torch.device(args.device), parent=os.getppid())
    try:
        worker.run()
    except DeviceLostError as error:
        print(f"device lost: {error}", file=sys.stderr)
        return DEVICE_LOST
    return 0


if __name__ == "__main__":
    # Not through the interpreter's shutdown: after a fault, destructors of CUDA objects abort or hang.
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
