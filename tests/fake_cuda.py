"""A stand-in for the parts of torch.cuda that recording calls, as strict about them as torch 2.11 is.

torch.cuda.graph itself is torch's own. Nothing is computed on a device: a call runs once, while it is recorded, and a
replay is only counted. ``matmul`` and ``synchronize`` are for calls: what cuBLAS allocates, and what must not be
recorded.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import torch

from dico_kernels import _graphs


class Stream:
    def __init__(self, index, name=None):
        self.device_index, self.name = index, name
        self.device = torch.device("cuda", index)
        self.waited = []

    def wait_stream(self, other):
        assert other.device_index == self.device_index
        self.waited.append(other)


class Within:
    """As torch.cuda.device and torch.cuda.stream: what nobody leaves stays entered."""

    def __init__(self, cuda, index, stream=None):
        self.cuda, self.index, self.stream = cuda, index, stream

    def __enter__(self):
        self.before = self.cuda.device, self.cuda.current[self.index]
        self.cuda.device = self.index
        if self.stream is not None:
            self.cuda.current[self.index] = self.stream

    def __exit__(self, *_):
        self.cuda.device = self.before[0]
        if self.stream is not None:
            self.cuda.current[self.index] = self.before[1]


class Generator:
    def __init__(self, index, capturing=False, offset=0):
        self.device = torch.device("cuda", index)
        self.state = SimpleNamespace(capturing=capturing, offset=offset)

    def clone_state(self):
        return Generator(self.device.index, offset=self.state.offset)

    def graphsafe_set_state(self, other):
        self.state = other.state

    def get_state(self):
        return self.state.offset

    def set_state(self, offset):
        self.state.offset = offset

    def draw(self):
        if self.state.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.state.offset += 4


class FakeCuda:
    """Two devices. Put in torch.cuda's place by ``install``.

    Attributes:
        events: what was recorded, cleared and replayed, in order.
        begins_badly: an error that beginning to record raises.
        keeps_workspaces: as a torch without a way to clear them.
        heals: the generator needs no help after a failure, as in torch 2.13.
    """

    def __init__(self, keeps_workspaces=False, heals=False):
        self.device, self.events, self.handles, self.streams_made = 0, [], 0, 0
        self.current = [Stream(0, "default 0"), Stream(1, "default 1")]
        self.generators = (Generator(0), Generator(1))
        self.pools, self.workspaces, self.recording, self.begins_badly = {}, {}, {}, None
        self.keeps_workspaces, self.heals = keeps_workspaces, heals

    # ---- what a recorded call does ----

    def matmul(self):
        """cuBLAS keeps a workspace for each stream that it meets, in the pool that is being recorded into, if any."""
        stream = self.current[self.device]
        graph = self.recording.get(stream)
        self.workspaces.setdefault(stream, graph and (graph.index, graph.handle))

    def synchronize(self):
        """Refused while this stream is recorded, and the recording is lost."""
        if (graph := self.recording.get(self.current[self.device])) is not None:
            graph.invalid = True
            raise RuntimeError("operation not permitted when stream is capturing")

    # ---- the allocator ----

    def begin(self, index, handle):
        pool = self.pools.setdefault((index, handle), SimpleNamespace(uses=None, recording=False))
        if pool.uses is not None and pool.uses <= 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        pool.uses, pool.recording = (pool.uses or 0) + 1, True

    def end(self, index, handle):
        if not self.pools[index, handle].recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools[index, handle].recording = False

    def release(self, index, handle):
        self.pools[index, handle].uses -= 1
        assert self.pools[index, handle].uses >= 0

    def empty_cache(self):
        """Gives dead pools' memory back, but for what is in use."""
        self.pools = {k: p for k, p in self.pools.items() if p.uses or k in self.workspaces.values()}

    def clear_workspaces(self):
        self.events.append("clear")
        self.workspaces.clear()

    # ---- the rest of torch.cuda ----

    def set_stream(self, stream):
        self.device, self.current[stream.device_index] = stream.device_index, stream

    def current_stream(self, device=None):
        return self.current[self.device if device is None else _index(device)]

    def new_stream(self, device=None):
        self.streams_made += 1
        return Stream(self.device if device is None else device, f"made {self.streams_made}")

    def new_handle(self):
        self.handles += 1
        return (0, self.handles)

    def rand(self, *size, device, generator):
        assert generator.device == device
        generator.draw()

    def install(self, monkeypatch):
        """Put it in place until the test ends."""
        _graphs._streams.cache_clear()
        cuda = self

        class Graph:
            def __init__(self):
                self.invalid = False

            def capture_begin(self, pool, capture_error_mode, **_):
                assert capture_error_mode == "thread_local"
                self.index, self.stream, self.handle = cuda.device, cuda.current_stream(), pool
                assert self.stream.name.startswith("made"), "recorded on a default stream"
                assert self.stream.device_index == self.index, "recorded on another device's stream"
                cuda.generators[self.index].state.capturing = not cuda.heals
                cuda.begin(self.index, pool)
                if cuda.begins_badly is not None:
                    raise cuda.begins_badly
                cuda.recording[self.stream] = self
                cuda.events.append("begin")

            def capture_end(self):
                assert cuda.current_stream() is self.stream
                del cuda.recording[self.stream]
                if self.invalid:
                    raise RuntimeError("operation failed due to a previous error during capture")
                cuda.end(self.index, self.handle)
                cuda.generators[self.index].state.capturing = False
                cuda.events.append("end")
                weakref.finalize(self, cuda.release, self.index, self.handle)

            def replay(self):
                assert cuda.device == self.index
                cuda.events.append(("replay", cuda.current_stream().name))

        for name, stand_in in {
            "device": lambda device: Within(self, _index(device)),
            "stream": lambda stream: Within(self, stream.device_index, stream),
            "set_stream": self.set_stream,
            "current_stream": self.current_stream,
            "Stream": self.new_stream,
            "CUDAGraph": Graph,
            "graph_pool_handle": self.new_handle,
            "default_generators": self.generators,
            "empty_cache": self.empty_cache,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch, "rand", self.rand)
        for name, stand_in in {
            "_cuda_clearCublasWorkspaces": self.clear_workspaces,
            "_cuda_endAllocateToPool": self.end,
            "_cuda_releasePool": self.release,
            "_host_emptyCache": lambda: None,
        }.items():
            monkeypatch.setattr(torch._C, name, stand_in, raising=False)
        if self.keeps_workspaces:
            monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces")
        return self


def _index(device):
    """Of an index or a device; the CPU, where a GraphRunner's tensors are in tests, stands for the first GPU."""
    return device if isinstance(device, int) else device.index or 0


class OnFakeCuda(_graphs.CudaGraphs):
    """For a GraphRunner on CPU tensors."""

    device_type = "cpu"
