"""Measuring: contenders interleaved in one process, warm-up apart, medians; peak memory and error beside each time."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dico_kernels import _timing

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
class Measurement(_timing.Timing):
    """What interleaved timing found for one contender; peak_bytes beyond what was there."""

    peak_bytes: int | None = None


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
    """``_timing.interleave`` of contenders, with their peak memory; what fails is shown in full on stderr.

    Args:
        contenders: by name.
        rounds: samples of each.
        device: where they run.
        sample_s: seconds a sample lasts at least, if not the device's usual.
        queued: time a GPU alone, and what launching costs apart.
    """
    found = {name: Measurement() for name in contenders}

    def warmed(name: str) -> None:
        if not contenders[name].graphed:
            found[name].peak_bytes = peak_bytes(lambda: contenders[name].run(0), device)

    runs = {name: contender.run for name, contender in contenders.items()}
    target = sample_s or (_GPU_SAMPLE_S if device.type == "cuda" else _CPU_SAMPLE_S)
    _timing.interleave(runs, found, rounds, device, target, queued, failed, warmed)
    return found


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
