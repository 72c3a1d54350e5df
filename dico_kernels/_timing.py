"""Calls timed by turns: by the clock on a CPU; on a GPU by events, calls queued so that launching does not show."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

# A call of the index it is given: so that it may take other inputs each time.
Run = Callable[[int], object]

_CLOCK_HZ = 2.0e9  # above any GPU's: waiting is counted in its cycles
# Of a sample whose calls are queued before the device begins: a queue holds some thousand launches.
_QUEUED_CALLS = 20


@dataclass
class Timing:
    """What was found for one call: samples in seconds.

    ``failure`` says why there is no time, if it failed; the others' times stand. ``host_s``: what a call takes its
    caller where nobody waits for the device; of queued samples only.
    """

    samples: list[float] = field(default_factory=list)
    host_s: float | None = None
    failure: str | None = None

    @property
    def median(self) -> float:
        """Median seconds a call."""
        return statistics.median(self.samples)


def interleave(
    runs: dict[str, Run],
    found: Mapping[str, Timing],
    rounds: int,
    device: torch.device,
    sample_s: float,
    queued: bool,
    describe: Callable[[str, Exception], str],
    warmed: Callable[[str], None] = lambda name: None,
) -> None:
    """Time every call ``rounds`` times, taking turns, the order rotating by one each round.

    Taking turns lets a drift of the machine's speed fall on all of them alike; rotating keeps any one from always
    following the same neighbour.

    Args:
        runs: by name.
        found: where each one's samples go.
        rounds: samples of each.
        device: where they run.
        sample_s: seconds a sample lasts at least.
        queued: let a GPU begin when a sample's calls are all queued. What launching costs then shows in ``host_s``
            alone, and the time is the device's, as in a CUDA graph; else a call that the device does faster than
            its caller launches it is timed by its caller.
        describe: a failure's name and error in words.
        warmed: called with a name when that one has been warmed up.
    """
    calls: dict[str, int] = {}

    def attempt(step: Callable[[], None], name: str) -> None:
        try:
            step()
        except Exception as error:  # whatever it is, the others' times are worth keeping
            found[name].failure = describe(name, error)

    def warm_up(name: str) -> None:
        run = runs[name]
        run(0)
        calls[name] = max(1, round(sample_s / max(sample(run, 1, 0, device), 1e-9)))
        if queued and device.type == "cuda":
            calls[name], found[name].host_s = _to_queue(run, min(calls[name], _QUEUED_CALLS), device)
        warmed(name)

    def measure(name: str, index: int) -> None:
        hold = _hold_s(calls[name], found[name].host_s)
        seconds = sample(runs[name], calls[name], index * calls[name], device, hold)
        found[name].samples.append(seconds / calls[name])

    for name in runs:
        attempt(partial(warm_up, name), name)
    for index in range(rounds):
        names = [name for name in runs if found[name].failure is None]
        shift = index % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            attempt(partial(measure, name, index), name)


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


def _hold_s(calls: int, host_s: float | None) -> float:
    """How long to hold the device back while calls are queued, with room for a slow moment."""
    return 1.5 * calls * host_s + 1e-4 if host_s else 0


def _to_queue(run: Run, calls: int, device: torch.device) -> tuple[int, float]:
    """(calls that can be queued at once, seconds that one takes its caller).

    Fewer than asked for where the queue is full before: the caller then waits for a device that waits for it.
    """
    host = min(_on_gpu(run, 1, 0, device, 0)[1] for _ in range(3))
    while calls > 1 and not _on_gpu(run, calls, 0, device, _hold_s(calls, host))[2]:
        calls //= 2
    return calls, host
