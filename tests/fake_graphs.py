"""A stand-in for CUDA graphs, on the CPU: records and replays as they do."""

from __future__ import annotations

import torch


class Recording:
    """Runs the call again on the tensors it was recorded with, and writes to the output it had: a graph's semantics."""

    stale = False

    def __init__(self, call):
        self.call, self.output = call, call()

    def replay(self):
        outputs = self.output if isinstance(self.output, tuple) else (self.output,)
        with torch.inference_mode(outputs[0].is_inference()):  # a GPU does not ask
            again = self.call()
            for mine, new in zip(outputs, again if isinstance(again, tuple) else (again,), strict=True):
                mine.copy_(new)


class FakeGraphs:
    device_type = "cpu"

    def __init__(self, fails=None):
        self.captures, self.warmups, self.orders, self.fails = 0, 0, 0, fails

    def capture(self, call, warmup, device):
        assert device == torch.device("cpu")
        for _ in range(warmup):
            call()
        self.warmups += warmup
        if self.fails is not None:
            raise self.fails
        self.captures += 1
        return Recording(call)

    def order(self, device):
        assert device == torch.device("cpu")
        self.orders += 1
