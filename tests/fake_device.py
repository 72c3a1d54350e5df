"""A stand-in for the parts of torch.cuda that timing calls."""

from __future__ import annotations

import torch

from dico_kernels import _timing


class Device:
    """A device that works behind its caller's back, with a clock of its own: what torch.cuda is for who times it."""

    def __init__(self, monkeypatch, queue=1000):
        self.host = self.free = 0.0  # now, and when all that was queued is done
        self.ends, self.queue = [], queue
        for name in ("Event", "synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(_timing.time, "perf_counter", lambda: self.host)

    def enqueue(self, seconds):
        while len([e for e in self.ends if e > self.host]) >= self.queue:
            self.host += 1e-6  # a full queue holds its caller up
        self.free = max(self.free, self.host) + seconds
        self.ends.append(self.free)

    def synchronize(self, device=None):
        self.host = max(self.host, self.free)

    def _sleep(self, cycles):
        self.enqueue(cycles / 1.8e9)

    def Event(self, enable_timing):
        device = self

        class Event:
            def record(self):
                self.at = max(device.free, device.host)

            def query(self):
                return self.at <= device.host

            def synchronize(self):
                device.synchronize()

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        return Event()

    def call(self, host, work, launches=1):
        def run(i):
            for _ in range(launches):
                self.host += host / launches
                self.enqueue(work / launches)

        return run
