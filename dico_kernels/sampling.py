"""Sampling loops as CUDA graphs: one launch a step instead of a few hundred.

A sampler calls a model again and again with other values and the same shapes. A CUDA graph records the kernels of one
such call and replays them with a single launch, which matters wherever launching takes longer than computing: small
batches, small models. GraphRunner does the recording, decides when it may be replayed, and runs the model as it is
where it may not.

_graphs.py does the recording. Unverified until run on a GPU: both are tested with stand-ins for CUDA.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dico_kernels._graphs import CudaGraphs, Graph, Graphs
from dico_kernels.dtypes import tf32_convolutions, tf32_products
from dico_kernels.ops._backends import current
from dico_kernels.ops._tuning import generation, is_measuring

Key = tuple[Any, ...]
_CONSTANTS = (int, float, bool, str, type(None), torch.dtype, torch.device)


@dataclass
class GraphRow:
    """What a GraphRunner did with calls of one kind.

    Attributes:
        call: the inputs' shapes, dtypes and constants.
        how: "graph" or "eager".
        calls: how many there were; of a graph, replays.
        reason: why eager; "" for a graph.
    """

    call: str
    how: str
    calls: int
    reason: str = ""


class GraphReport(list[GraphRow]):
    """Rows of what a GraphRunner did; prints as a table.

    Attributes:
        captured: graphs recorded so far.
        evicted: graphs given up for others, because there were max_graphs.
        invalidated: times that all graphs were given up because the model changed, with what changed: a Counter.
    """

    def __init__(self, rows: Sequence[GraphRow], captured: int, evicted: int, invalidated: Counter[str]) -> None:
        super().__init__(rows)
        self.captured, self.evicted, self.invalidated = captured, evicted, invalidated

    def __str__(self) -> str:
        if not self:
            return "Nothing was called."
        cells = [("call", "how", "calls", "why not a graph")]
        cells += [(r.call, r.how, str(r.calls), r.reason or "-") for r in self]
        widths = [max(len(line[i]) for line in cells) for i in range(3)]
        table = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]) for line in cells]
        table.insert(1, "  ".join("-" * w for w in widths))
        table.append(f"graphs: {self.captured} captured, {self.evicted} evicted")
        table += [f"all graphs dropped {n}x: {what}" for what, n in self.invalidated.items()]
        return "\n".join(table)


class _Watch:
    """Notices that a model is no longer the one that was recorded.

    A graph holds addresses. Values written in place (load_state_dict, an optimiser, EMA) are what the next replay
    reads; a tensor that is another one, or lies elsewhere, is not, and neither is another module or class.
    """

    def __init__(self, module: nn.Module) -> None:
        self.classes = [(m, name, type(m)) for name, m in module.named_modules()]
        self.tensors: list[tuple[dict[str, Any], str, Any, int, str]] = []
        self.children: list[tuple[dict[str, Any], str, Any, str]] = []
        for prefix, m in module.named_modules():
            dot = f"{prefix}." if prefix else ""
            for held in (m._parameters, m._buffers):
                self.tensors += [(held, k, v, _address(v), dot + k) for k, v in held.items()]
            self.children += [(m._modules, k, v, dot + k) for k, v in m._modules.items()]

    def changed(self) -> str | None:
        """What changed since, or None."""
        for held, key, child, name in self.children:
            if held.get(key) is not child:
                return f"{name} was replaced"
        for module, name, cls in self.classes:
            if type(module) is not cls:
                return f"{name or 'the model'} is now a {type(module)._get_name(module)}"
        for held, key, tensor, address, name in self.tensors:
            now = held.get(key)
            if now is not tensor:
                return f"{name} was replaced"
            if _address(now) != address:
                return f"{name} has moved in memory"
        return None


def _address(v: Any) -> int:
    return v.data_ptr() if isinstance(v, Tensor) else 0


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _kind(v: Any) -> Any:
    """What of an argument a graph is good for: all of a constant; of a tensor all but its values."""
    if isinstance(v, Tensor):
        return (tuple(v.shape), v.dtype, v.device, _is_channels_last(v))
    return (type(v), v)


def _words(v: Any) -> str:
    if isinstance(v, Tensor):
        return f"{'x'.join(map(str, v.shape)) or 'scalar'} {str(v.dtype).removeprefix('torch.')}"
    return repr(v)


def _surroundings(device: str) -> Key:
    """Whatever else decides which kernels a call launches."""
    autocast = torch.is_autocast_enabled(device)
    return (
        torch.get_autocast_dtype(device) if autocast else None,
        tf32_products(),
        tf32_convolutions(),
        torch.are_deterministic_algorithms_enabled(),
        current(),
    )


@dataclass
class _Entry:
    graph: Graph
    inputs: dict[Any, Tensor]
    device: torch.device
    words: str
    replays: int = 0


class GraphRunner:
    """A model, callable as the model is, that replays a CUDA graph wherever it can.

    The first call with inputs of a kind runs the model ``warmup`` times on a side stream, records it once and replays
    that; later calls copy x, t and y into the recorded call's inputs and replay. A kind is every tensor's shape, dtype,
    device and whether it is channels_last, every other argument's value (cfg_scale: a float is part of the recording;
    give a scale that changes from step to step as a tensor), autocast, the float32 precision flags and dk.backend.

    The model runs as it is, with the reason in ``explain()``, where a graph would be wrong or impossible: inputs not on
    a GPU, inputs or weights on several devices, gradients enabled, training mode, inside torch.compile or another
    capture, an argument that is neither a tensor nor a plain constant, an output that is neither a tensor nor a tuple
    of them, a capture that failed (which is not tried again for that kind until ``reset()`` or a change of the model).
    A failed capture leaves streams, memory and random generators in order; with torch 2.11 other graphs on the device
    may be recorded anew, for their random numbers' sake.

    Weights may be changed in place at any time: load_state_dict, an optimiser and EMA do that, and the next call uses
    the new values. Before each replay the runner checks that every parameter, buffer and submodule is the one that was
    recorded, at the address it had, of the class it had (fuse and unfuse change that); if not, or if dk.tune chose
    anew, all graphs are dropped and the call is recorded anew. What it cannot see: forwards that depend on Python state
    of their own, and hooks, whose Python code does not run in a replay.

    Not for several threads or streams at once: calls wait for each other, and share their inputs' memory.

    Args:
        model: an nn.Module in eval mode, or a bound method of one (``model.forward_with_cfg``).
        max_graphs: how many kinds are kept; the least recently used is dropped for a new one. Each holds the memory of
            its activations, in a pool that they share.
        warmup: calls before recording, at least 1.
        clone: return a copy of the output. If False, the output is the recording's own memory, which the next call of
            this runner overwrites, whatever its kind.
        watch: check the model before each replay, which takes the CPU less than a microsecond for each parameter and
            module. If False, call ``reset()`` after replacing parameters or modules; otherwise a replay reads freed
            memory.

    Raises:
        TypeError: model is neither.
        ValueError: max_graphs or warmup below 1.

    Example:
        >>> step = dk.GraphRunner(model.eval().cuda().bfloat16())
        >>> with torch.inference_mode():
        ...     for t in timesteps:
        ...         noise = step(x, t, y, cfg_scale=4.0)

    Unverified until run on a GPU.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_graphs: int = 8,
        warmup: int = 2,
        clone: bool = True,
        watch: bool = True,
        graphs: Graphs | None = None,
    ) -> None:
        module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
        if not isinstance(module, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}: expected an nn.Module, or a bound method of one")
        for name, value in (("max_graphs", max_graphs), ("warmup", warmup)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected an integer >= 1")
        self.module, self.max_graphs, self.warmup, self.clone, self.watch = module, max_graphs, warmup, clone, watch
        self._call: Callable[..., Any] = model
        self._graphs: Graphs = CudaGraphs() if graphs is None else graphs
        self._lock = threading.RLock()
        self._kept: OrderedDict[Key, _Entry] = OrderedDict()
        self._failed: dict[Key, str] = {}
        self._watch: _Watch | None = None
        self._history: Counter[tuple[str, str, str]] = Counter()
        self._invalidated: Counter[str] = Counter()
        self._captured = self._evicted = 0
        self._tuned = generation()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the model's: (x, t, y) -> its output. With ``cfg_scale``, as its forward_with_cfg.

        Args:
            x: (N, C, H, W).
            *args: t and y, then cfg_scale if it is not given by name.
            **kwargs: the same by name.
        """
        call = self._call
        if isinstance(call, nn.Module) and ("cfg_scale" in kwargs or len(args) > 2):
            call = getattr(self.module, "forward_with_cfg", call)
        given: dict[Any, Any] = {**dict(enumerate((x, *args))), **kwargs}
        with self._lock:
            reason = self._why_eager(given)
            if reason is None:
                entry = self._entry(call, given)
                if isinstance(entry, _Entry):
                    return self._replay(entry, given)
                reason = entry
            self._history[_describe(given), "eager", reason] += 1
        return call(x, *args, **kwargs)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: Any) -> Any:
        """The model's forward_with_cfg, so that a sampler can be given this runner's as it would be the model's."""
        return self(x, t, y, cfg_scale=cfg_scale)

    def explain(self) -> GraphReport:
        """What was replayed, what was not and why. Print it for a table."""
        with self._lock:
            rows = [GraphRow(call, how, n, reason) for (call, how, reason), n in self._history.items()]
            return GraphReport(rows, self._captured, self._evicted, Counter(self._invalidated))

    def reset(self) -> None:
        """Drop all graphs and their memory, and forget failures; the next call records anew."""
        with self._lock:
            self._kept.clear()
            self._failed.clear()
            self._watch = None
            self._tuned = generation()

    def __len__(self) -> int:
        """How many graphs are held."""
        return len(self._kept)

    # ---- whether ----

    def _why_eager(self, given: dict[Any, Any]) -> str | None:
        if torch.compiler.is_compiling():
            return "inside torch.compile"
        kind, where = self._graphs.device_type, _device(given)
        if where is None:
            return "no argument is a tensor: a graph needs one, on whose device it is recorded"
        for name, v in given.items():
            if isinstance(v, Tensor):
                if v.device.type != kind:
                    return f"{_name(name)} is on {v.device}: a graph needs every tensor on {kind}"
                if v.device != where:
                    return f"{_name(name)} is on {v.device}: a graph needs every tensor on one device, here {where}"
                if type(v) is not Tensor:
                    return f"{_name(name)} is a {type(v).__name__}, not a plain tensor"
            elif not isinstance(v, _CONSTANTS):
                return f"{_name(name)} is a {type(v).__name__}: neither a tensor nor a constant"
        if is_measuring():
            return "inside dk.tune"
        if torch.is_grad_enabled():
            return "gradients are enabled: use torch.inference_mode() or no_grad()"
        if self.module.training:
            return "the model is in training mode: call model.eval()"
        if kind == "cuda":
            with torch.cuda.device(where):
                if torch.cuda.is_current_stream_capturing():
                    return "inside another capture"
        return None

    def _entry(self, call: Callable[..., Any], given: dict[Any, Any]) -> _Entry | str:
        """The recording for such a call, made if there is none; or why there can be none."""
        if self._tuned != generation():
            if self._kept:
                self._invalidated["dk.tune chose anew"] += 1
            self.reset()
        if self.watch and self._watch is not None and (what := self._watch.changed()) is not None:
            self._invalidated[what] += 1
            self.reset()
        method = getattr(call, "__name__", "")
        kinds = tuple((name, _kind(v)) for name, v in given.items())
        key = (method, kinds, _surroundings(self._graphs.device_type))
        if key in self._kept:
            self._kept.move_to_end(key)
            if not self._kept[key].graph.stale:
                return self._kept[key]
            del self._kept[key]
        if key in self._failed:
            return self._failed[key]
        if any(m.training for m in self.module.modules()):
            return "a submodule is in training mode: call model.eval()"
        device = _device(given)
        assert device is not None
        for name, v in chain(self.module.named_parameters(), self.module.named_buffers()):
            if v.device != device:
                return f"{name} is on {v.device}: a graph needs the whole model on one device, here {device}"
        while len(self._kept) >= self.max_graphs:
            self._kept.popitem(last=False)
            self._evicted += 1
        try:
            self._kept[key] = self._capture(call, given, device)
        except Exception as error:  # whatever the model does that a graph cannot, it still runs without one
            first = (str(error).strip().splitlines() or [""])[0]
            self._failed[key] = f"capture failed: {type(error).__name__}: {first[:200]}"
        if self._watch is None:  # afterwards: a first call may make buffers
            self._watch = _Watch(self.module)
        return self._kept.get(key) or self._failed[key]

    # ---- how ----

    def _capture(self, call: Callable[..., Any], given: dict[Any, Any], device: torch.device) -> _Entry:
        # Inference tensors could not be written to outside inference mode, where the next call may be.
        with torch.inference_mode(False), torch.no_grad():
            inputs = {k: torch.empty_like(v).copy_(v) for k, v in given.items() if isinstance(v, Tensor)}
        arguments = {**given, **inputs}
        positional = [arguments[k] for k in arguments if isinstance(k, int)]
        named = {k: v for k, v in arguments.items() if isinstance(k, str)}
        with _uncached_autocast(self._graphs.device_type):
            graph = self._graphs.capture(lambda: call(*positional, **named), self.warmup, device)
        whole = graph.output if isinstance(graph.output, (tuple, list)) else [graph.output]
        if not all(isinstance(o, Tensor) for o in whole):
            raise TypeError(f"the output is a {type(graph.output).__name__}: expected a tensor, or a tuple of them")
        self._captured += 1
        return _Entry(graph, inputs, device, _describe(given))

    def _replay(self, entry: _Entry, given: dict[Any, Any]) -> Any:
        self._graphs.order(entry.device)
        with torch.no_grad():
            for name, buffer in entry.inputs.items():
                buffer.copy_(given[name], non_blocking=True)
        entry.graph.replay()
        self._history[entry.words, "graph", ""] += 1
        out = entry.graph.output
        if not self.clone:
            return out
        return type(out)(o.clone() for o in out) if isinstance(out, (tuple, list)) else out.clone()


def _device(given: dict[Any, Any]) -> torch.device | None:
    """The first tensor's."""
    return next((v.device for v in given.values() if isinstance(v, Tensor)), None)


def _name(key: Any) -> str:
    return {0: "x", 1: "t", 2: "y", 3: "cfg_scale"}.get(key, f"argument {key}")


def _describe(given: dict[Any, Any]) -> str:
    return ", ".join(f"{_name(k)} {_words(v)}" for k, v in given.items())


@contextmanager
def _uncached_autocast(device: str) -> Iterator[None]:
    """Autocast as it is outside, without its cache: casts made before a recording are freed after it."""
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
        yield


__all__ = ["GraphReport", "GraphRow", "GraphRunner"]
