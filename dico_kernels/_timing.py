"""Seconds of a call: by the clock on a CPU; on a GPU by events, with calls queued so that launching does not show."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# A call of the index it is given: so that it may take other inputs each time.
Run = Callable[[int], object]

_CLOCK_HZ = 2.0e9  # above any GPU's: waiting is counted in its cycles


def sample(run: Run, calls: int, first: int, device: torch.device, hold_s: float = 0) -> float:
    """Seconds that ``calls`` calls take together: by CUDA events on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        return _on_gpu(run, calls, first, device, hold_s)[0]
    start = time.perf_counter()
    for i in range(calls):
        run(first + i)
    return time.perf_counter() - start


def _on_gpu(run: Run, calls: int, first: int, device: torch.device, hold_s: float) -> tuple[float, float, bool]:
    """(the device's seconds, the caller's, whether the device waited for nobody), the device held at first."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    if hold_s:
        torch.cuda._sleep(int(hold_s * _CLOCK_HZ))  # type: ignore[no-untyped-call]
    begin.record()
    start = time.perf_counter()
    for i in range(calls):
        run(first + i)
    host = time.perf_counter() - start
    ahead = not begin.query()  # type: ignore[no-untyped-call]
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3, host, ahead


def hold_s(calls: int, host_s: float | None) -> float:
    """How long to hold the device back while calls are queued, with room for a slow moment."""
    return 1.5 * calls * host_s + 1e-4 if host_s else 0


def to_queue(run: Run, calls: int, device: torch.device) -> tuple[int, float]:
    """(calls that can be queued at once, seconds that one takes its caller).

    Fewer than asked for where the queue is full before: the caller then waits for a device that waits for it.
    """
    host = min(_on_gpu(run, 1, 0, device, 0)[1] for _ in range(3))
    while calls > 1 and not _on_gpu(run, calls, 0, device, hold_s(calls, host))[2]:
        calls //= 2
    return calls, host
