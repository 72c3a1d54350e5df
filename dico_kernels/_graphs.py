"""Recording and replaying calls with torch.cuda.graph.

Unverified until run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """One recorded call."""

    output: Any

    def replay(self) -> None:
        """Run it again: on what its inputs hold now, into ``output``."""


class Graphs(Protocol):
    """Who records: CUDA, or a stand-in in tests."""

    device_type: str

    def capture(self, call: Callable[[], Any], warmup: int) -> Graph:
        """Call it ``warmup`` times, then record one call."""

    def order(self) -> None:
        """Let what this stream does next come after the last replay, whatever stream that was on."""


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Any, graphs: CudaGraphs) -> None:
        self.graph, self.output, self.graphs = graph, output, graphs

    def replay(self) -> None:
        self.graph.replay()
        self.graphs.last = torch.cuda.current_stream()


class CudaGraphs:
    """Records with torch.cuda.graph. All graphs of a runner share one pool of memory: they never run at once."""

    device_type = "cuda"

    def __init__(self) -> None:
        self.pool: Any = None
        self.last: torch.cuda.Stream | None = None

    def capture(self, call: Callable[[], Any], warmup: int) -> Graph:
        """Warm up on a side stream, as torch asks: kernels compile and workspaces are allocated there."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(warmup):
                call()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (a data loader pinning memory) may go on with CUDA while this one records.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = call()
        return _CudaGraph(graph, output, self)

    def order(self) -> None:
        """A replay on another stream may still read the inputs that are about to be overwritten."""
        here = torch.cuda.current_stream()
        if self.last is not None and self.last != here:
            here.wait_stream(self.last)
