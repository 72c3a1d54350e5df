"""Measuring: contenders interleaved in one process, warm-up apart, medians; peak memory and error beside each time."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

# A timed sample on a GPU lasts at least this long, so that launching it costs nothing that shows; on a CPU a sample
# is one call unless a call is shorter than a clock can be trusted with.
_GPU_SAMPLE_S = 0.05
_CPU_SAMPLE_S = 0.005
# Of a sample whose calls are queued before the device begins: a queue holds some thousand launches.
_QUEUED_CALLS = 20
_CLOCK_HZ = 2.0e9  # above any GPU's: waiting is counted in its cycles


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


def describe_failure(error: BaseException) -> str:
    """One short line for a table: "OOM", or what went wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return "OOM"
    inner = getattr(error, "inner_exception", None)  # of torch.compile's
    if isinstance(inner, BaseException):
        return describe_failure(inner)
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # A compiler says where first, then shows the code, and says what last.
    line = f"{type(error).__name__} {lines[0]} {lines[-1].strip()}" if lines[0].endswith(":") else lines[0]
    return line[:200]


def failed(what: str, error: BaseException) -> str:
    """``describe_failure``, with all there is to say of it on stderr."""
    print(f"==== {what}", file=sys.stderr)
    traceback.print_exception(error)
    sys.stderr.flush()
    return describe_failure(error)


@dataclass
class Measurement:
    """What interleaved timing found for one contender. Times are seconds a call; peak_bytes beyond what was there.

    ``failure`` says why there is no time, if the contender failed; the others' times stand. ``host_s``: what a call
    takes its caller where nobody waits for the device; of queued samples only.
    """

    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    host_s: float | None = None
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return statistics.median(self.samples)


def relative_error(out: Tensor, truth: Tensor) -> float:
    """rms(out - truth) / rms(truth), in float64."""
    return float((out.double() - truth).norm() / truth.norm())


def interleave(
    contenders: dict[str, Contender],
    rounds: int,
    device: torch.device,
    sample_s: float | None = None,
    queued: bool = False,
) -> dict[str, Measurement]:
    """Time every contender ``rounds`` times, taking turns, the order rotating by one each round.

    Taking turns lets a drift of the machine's speed fall on all of them alike; rotating keeps any one from always
    following the same neighbour.

    Args:
        contenders: by name.
        rounds: samples of each.
        device: where they run.
        sample_s: seconds a sample lasts at least, if not the device's usual.
        queued: let a GPU begin when a sample's calls are all queued. What launching costs then shows in ``host_s``
            alone, and the time is the device's, as in a CUDA graph; else a call that the device does faster than
            its caller launches it is timed by its caller.
    """
    found = {name: Measurement() for name in contenders}
    calls: dict[str, int] = {}
    target = sample_s or (_GPU_SAMPLE_S if device.type == "cuda" else _CPU_SAMPLE_S)
    queued = queued and device.type == "cuda"

    def attempt(name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception as error:  # whatever it is, the other contenders' times are worth keeping
            found[name].failure = failed(name, error)

    def warm_up(name: str) -> None:
        contender = contenders[name]
        contender.run(0)
        calls[name] = max(1, round(target / _sample(contender, 1, 0, device)))
        if queued:
            calls[name], found[name].host_s = _to_queue(contender, min(calls[name], _QUEUED_CALLS), device)
        if not contender.graphed:
            found[name].peak_bytes = peak_bytes(lambda: contender.run(0), device)

    def sample(name: str, index: int) -> None:
        hold = _hold_s(calls[name], found[name].host_s)
        seconds = _sample(contenders[name], calls[name], index * calls[name], device, hold)
        found[name].samples.append(seconds / calls[name])

    for name in contenders:
        attempt(name, lambda n=name: warm_up(n))  # type: ignore[misc]
    for index in range(rounds):
        names = [name for name in contenders if found[name].failure is None]
        shift = index % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            attempt(name, lambda n=name, i=index: sample(n, i))  # type: ignore[misc]
    return found


def _sample(contender: Contender, calls: int, first: int, device: torch.device, hold_s: float = 0) -> float:
    """Seconds that ``calls`` calls take together: by CUDA events on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        return _on_gpu(contender, calls, first, device, hold_s)[0]
    start = time.perf_counter()
    for i in range(calls):
        contender.run(first + i)
    return time.perf_counter() - start


def _on_gpu(
    contender: Contender, calls: int, first: int, device: torch.device, hold_s: float
) -> tuple[float, float, bool]:
    """(the device's seconds, the caller's, whether the device waited for nobody), the device held at first."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    if hold_s:
        torch.cuda._sleep(int(hold_s * _CLOCK_HZ))  # type: ignore[no-untyped-call]
    begin.record()
    start = time.perf_counter()
    for i in range(calls):
        contender.run(first + i)
    host = time.perf_counter() - start
    ahead = not begin.query()  # type: ignore[no-untyped-call]
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3, host, ahead


def _hold_s(calls: int, host_s: float | None) -> float:
    """How long to hold the device back while calls are queued, with room for a slow moment."""
    return 1.5 * calls * host_s + 1e-4 if host_s else 0


def _to_queue(contender: Contender, calls: int, device: torch.device) -> tuple[int, float]:
    """(calls that can be queued at once, seconds that one takes its caller).

    Fewer than asked for where the queue is full before: the caller then waits for a device that waits for it.
    """
    host = min(_on_gpu(contender, 1, 0, device, 0)[1] for _ in range(3))
    while calls > 1 and not _on_gpu(contender, calls, 0, device, _hold_s(calls, host))[2]:
        calls //= 2
    return calls, host


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
