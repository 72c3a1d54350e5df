"""Measuring: contenders interleaved in one process, warm-up apart, medians; peak memory and error beside each time."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

# A timed sample on a GPU lasts at least this long, so that launching it costs nothing that shows; on a CPU a sample
# is one call unless a call is shorter than a clock can be trusted with.
_GPU_SAMPLE_S = 0.05
_CPU_SAMPLE_S = 0.005


@dataclass
class Contender:
    """One way to do the work.

    Attributes:
        run: does it once; the argument counts calls, to rotate among input sets.
        compile_s: seconds the first call took, for a contender that compiles; else None.
        error: relative rms error against float64 on the same inputs and weights, or None where it has no output.
        macs: multiply-accumulates of one call.
        graphed: whether calls replay CUDA graphs, whose memory the allocator's peak does not show.
        moved: bytes one call must move at least.
    """

    run: Callable[[int], object]
    compile_s: float | None = None
    error: float | None = None
    macs: float | None = None
    moved: float | None = None
    graphed: bool = False


def describe_failure(error: Exception) -> str:
    """One short line for a table: "OOM", or what went wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return "OOM"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@dataclass
class Measurement:
    """What interleaved timing found for one contender. Times are seconds a call; peak_bytes beyond what was there.

    ``failure`` says why there is no time, if the contender failed; the others' times stand.
    """

    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return statistics.median(self.samples)


def relative_error(out: Tensor, truth: Tensor) -> float:
    """rms(out - truth) / rms(truth), in float64."""
    return float((out.double() - truth).norm() / truth.norm())


def interleave(
    contenders: dict[str, Contender], rounds: int, device: torch.device, sample_s: float | None = None
) -> dict[str, Measurement]:
    """Time every contender ``rounds`` times, taking turns, the order rotating by one each round.

    Taking turns lets a drift of the machine's speed fall on all of them alike; rotating keeps any one from always
    following the same neighbour. ``sample_s``: seconds a sample lasts at least, if not the device's usual.
    """
    found = {name: Measurement() for name in contenders}
    calls: dict[str, int] = {}
    target = sample_s or (_GPU_SAMPLE_S if device.type == "cuda" else _CPU_SAMPLE_S)

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # whatever it is, the other contenders' times are worth keeping
            found[name].failure = describe_failure(error)

    def warm_up(name: str) -> None:
        contender = contenders[name]
        contender.run(0)
        calls[name] = max(1, round(target / _sample(contender, 1, 0, device)))
        if not contender.graphed:
            found[name].peak_bytes = peak_bytes(lambda: contender.run(0), device)

    def sample(name: str, index: int) -> None:
        seconds = _sample(contenders[name], calls[name], index * calls[name], device)
        found[name].samples.append(seconds / calls[name])

    for name in contenders:
        attempt(name, lambda n=name: warm_up(n))  # type: ignore[misc]
    for index in range(rounds):
        names = [name for name in contenders if found[name].failure is None]
        shift = index % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            attempt(name, lambda n=name, i=index: sample(n, i))  # type: ignore[misc]
    return found


def _sample(contender: Contender, calls: int, first: int, device: torch.device) -> float:
    """Seconds that ``calls`` calls take together: by CUDA events on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        begin.record()
        for i in range(calls):
            contender.run(first + i)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    for i in range(calls):
        contender.run(first + i)
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held during a call, beyond what it held before.

    Memory that a CUDA graph keeps in a pool of its own was allocated earlier and does not show.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    steps = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(steps, key=lambda step: step[0]):
        held += change
        peak = max(peak, held)
    return peak
