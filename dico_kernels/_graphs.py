"""Recording and replaying calls with torch.cuda.graph: memory, streams and devices, and the way back where it fails.

Unverified until run on a GPU: tested with a stand-in for the parts of torch.cuda that are called here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakSet

import torch


class Graph(Protocol):
    """One recorded call.

    Attributes:
        output: what it returned, in memory that every replay writes.
        stale: whether it is to be recorded anew, through no fault of its own.
    """

    output: Any
    stale: bool

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
        self.graph, self.output, self.place, self.stale = graph, output, place, False
        place.graphs.add(self)
        _RECORDED.add(self)

    def replay(self) -> None:
        with torch.cuda.device(self.place.index):
            self.graph.replay()
            self.place.last = torch.cuda.current_stream()


_RECORDED: WeakSet[_CudaGraph] = WeakSet()  # those of all runners


class CudaGraphs:
    """Records with torch.cuda.graph. All graphs of a runner on a device share its pool: they never run at once."""

    device_type = "cuda"

    def __init__(self) -> None:
        self._places: dict[torch.device, _Place] = {}

    def capture(self, call: Callable[[], Any], warmup: int, device: torch.device) -> Graph:
        """Warm up on a side stream, as torch asks: kernels compile and workspaces are allocated there.

        Raises:
            Exception: whatever the call raises, or CUDA; everything is then as it was before.
        """
        with torch.cuda.device(device):
            here = torch.cuda.current_stream()
            place = self._places.setdefault(device, _Place(here.device_index))
            side, recorder = _streams(place.index)
            side.wait_stream(here)
            try:
                with torch.cuda.stream(side):
                    for _ in range(warmup):
                        call()
            finally:
                here.wait_stream(side)
            # A pool dies with its last graph. While anything of it is in use, torch keeps it and refuses to record
            # into it, so it is not asked to.
            if place.pool is None or not place.graphs:
                place.pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                output = _record(call, graph, place.pool, recorder)
            except BaseException:
                place.pool = None
                raise
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


def _record(call: Callable[[], Any], graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Any:
    """Record a call on the current device, and return what it returned; if that fails, leave nothing of it behind."""
    here, index = torch.cuda.current_stream(), stream.device_index
    spare = _spare_generator(index)
    output: Any = None
    failure: BaseException | None = None
    _clear_workspaces()
    try:
        # Other threads (a data loader pinning memory) may go on with CUDA while this one records.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                output = call()
            except BaseException as error:
                failure = error
    except BaseException as error:
        # torch.cuda.graph stops at the first error of its own, and what it would have undone stays.
        torch.cuda.set_stream(here)
        _abandon(index, pool, spare)
        failure = error if failure is None else failure  # the call's own is why the recording could not end
    finally:
        _clear_workspaces()
    if failure is not None:
        try:
            raise failure
        finally:
            failure = None  # or error and frame would hold each other, and the graph with them
    return output


def _clear_workspaces() -> None:
    """Free cuBLAS's workspaces.

    One from before a recording would be shared by every graph that ever used the stream; one from within would keep the
    pool's memory after its graphs are gone.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


def _spare_generator(index: int) -> tuple[Any, Any] | None:
    """A device's default generator, and another in the state it is in now."""
    try:
        generator = torch.cuda.default_generators[index]
        return generator, generator.clone_state()
    except (AttributeError, IndexError):
        return None


def _abandon(index: int, pool: Any, spare: tuple[Any, Any] | None) -> None:
    """Take the allocator and the random generator out of a recording that did not end."""
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(index, pool)
        # Reached only if the pool was being recorded into. Who began that holds a share of the pool, which a graph
        # gives back when it is freed if its recording ended, and nobody otherwise.
        torch._C._cuda_releasePool(index, pool)
    if spare is None:
        return
    generator, state = spare
    with suppress(Exception):
        try:
            torch.rand(1, device=generator.device, generator=generator)
        except RuntimeError:
            # In torch 2.11 it still takes itself for recorded, and would refuse every draw from now on. So it does in
            # replays of earlier graphs, which hold on to the state that they were recorded with.
            generator.graphsafe_set_state(state)
            for graph in _RECORDED:
                graph.stale = graph.stale or graph.place.index == index
        else:
            generator.set_state(state.get_state())  # the draw was only to ask
