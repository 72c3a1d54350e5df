"""Recording and replaying calls with torch.cuda.graph: memory, streams and devices.

Unverified until run on a GPU: tested with a stand-in for the parts of torch.cuda that are called here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakSet

import torch


class Graph(Protocol):
    """One recorded call."""

    output: Any

    def replay(self) -> None:
        """Run it again: on what its inputs hold now, into ``output``."""


class Graphs(Protocol):
    """Who records: CUDA, or a stand-in in tests."""

    device_type: str

    def capture(self, call: Callable[[], Any], warmup: int, device: torch.device) -> Graph:
        """Call it ``warmup`` times on a device, then record one call."""

    def order(self, device: torch.device) -> None:
        """Let what this stream does next come after the device's last replay, whatever stream that was on."""


class _Place:
    """What the graphs of one runner on one device share."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.pool: Any = None
        self.graphs: WeakSet[_CudaGraph] = WeakSet()  # those that are still there
        self.last: torch.cuda.Stream | None = None


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Any, place: _Place) -> None:
        self.graph, self.output, self.place = graph, output, place
        place.graphs.add(self)

    def replay(self) -> None:
        with torch.cuda.device(self.place.index):
            self.graph.replay()
            self.place.last = torch.cuda.current_stream()


class CudaGraphs:
    """Records with torch.cuda.graph. All graphs of a runner on a device share its pool: they never run at once."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._places: dict[torch.device, _Place] = {}

    def capture(self, call: Callable[[], Any], warmup: int, device: torch.device) -> Graph:
        """Warm up on a side stream, as torch asks: kernels compile and workspaces are allocated there."""
        with torch.cuda.device(device):
            here = torch.cuda.current_stream()
            place = self._places.setdefault(device, _Place(here.device_index))
            side, recorder = _streams(place.index)
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(warmup):
                    call()
            here.wait_stream(side)
            # A pool dies with its last graph. While anything of it is in use, torch keeps it and refuses to record
            # into it, so it is not asked to.
            if place.pool is None or not place.graphs:
                place.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            _clear_workspaces()
            try:
                # Other threads (a data loader pinning memory) may go on with CUDA while this one records.
                with torch.cuda.graph(graph, pool=place.pool, stream=recorder, capture_error_mode="thread_local"):
                    output = call()
            finally:
                _clear_workspaces()
        return _CudaGraph(graph, output, place)

    def order(self, device: torch.device) -> None:
        """A replay on another stream may still read the inputs that are about to be overwritten."""
        place = self._places.get(device)
        here = torch.cuda.current_stream(device)
        if place is not None and place.last is not None and place.last != here:
            here.wait_stream(place.last)


@functools.cache
def _streams(index: int) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """A device's streams for warming up and for recording, the same for all runners.

    cuBLAS allocates a workspace for every stream that it meets. And torch.cuda.graph's own stream is one for the
    process, on the device that was current when it was first used.
    """
    return torch.cuda.Stream(index), torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def _clear_workspaces() -> None:
    """Free cuBLAS's workspaces.

    One from before a recording would be shared by every graph that ever used the stream; one from within would keep the
    pool's memory after its graphs are gone.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
