"""Calls of kernels, recorded and made again: what a function does on the CPU, without the Python that decides it.

A function of tensors is run once and watched: every native kernel it calls, every operator of PyTorch's, every tensor
it makes. Those calls are kept with their arguments, each pointer as a distance from what changes from call to call: the
inputs, the outputs, and the memory between them, a part of which is the first output's until that is written. An
operator of PyTorch's is called again to write its result where that then belongs; what cannot be, cannot be recorded.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dico_kernels._extension import WATCH, extension
from dico_kernels._gemm import SCRATCH
from dico_kernels._packed import bytes_of

_MAKES_MEMORY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
# What copies its first argument into fresh memory, and what copies it anywhere.
_COPIES = dict.fromkeys((torch.ops.aten._to_copy.default, torch.ops.aten.clone.default), torch.ops.aten.copy_.default)
# Bases of pointers; the outputs and the inputs follow.
_BETWEEN, _SCRATCHED, _FIRST = range(3)
_ALIGNED = 64


@dataclass
class _Memory:
    """Memory that the function made, the calls between which it is in use, and where it is to lie instead."""

    tensor: Tensor
    size: int
    operand: bool = False  # of an operator of PyTorch's, which minds its dtype
    first: int = -1
    last: int = -1
    base: int = _BETWEEN
    offset: int = 0

    @property
    def end(self) -> int:
        return self.offset + -(-self.size // _ALIGNED) * _ALIGNED


@dataclass
class _Kernel:
    name: str
    dtype: int
    threads: int
    args: tuple[Tensor | float | None, ...]


@dataclass
class _Operator:
    """An operator of PyTorch's that writes where it is told: to ``out``, or, a copy, into its first argument.

    Its tensors are as they were at the call: views of their own of the same memory.
    """

    call: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor | None


@dataclass(frozen=True)
class _View:
    """A tensor that a recording makes anew at each run; offset in bytes from its base."""

    base: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, memory: Sequence[Tensor]) -> Tensor:
        """The tensor, of the memory of each base."""
        base = memory[self.base]
        if base.dtype != self.dtype:  # of what lies between, bytes
            base = base.view(self.dtype)
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset // self.dtype.itemsize)


@dataclass(frozen=True)
class _Again:
    """An operator's call, with views in place of tensors."""

    call: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, memory: Sequence[Tensor]) -> None:
        """Call it."""
        made = [a.of(memory) if type(a) is _View else a for a in self.args]
        named = {k: a.of(memory) if type(a) is _View else a for k, a in self.kwargs.items()}
        self.call(*made, **named)


@dataclass(frozen=True)
class Recording:
    """A function's calls, for inputs of the shapes, strides and dtypes that it was recorded with.

    Attributes:
        steps: the calls: of native kernels as many as follow one another, or one of PyTorch's operators.
        between: bytes of the memory between inputs and outputs that lies in neither.
        scratch: bytes of this thread's scratch.
        outputs: size, stride and dtype of what it returns.
        single: whether it returns that alone, and not as a tuple.
        held: memory that the steps read where it lies, and that must therefore outlive them.
    """

    steps: list[Any]
    between: int
    scratch: int
    outputs: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    single: bool
    held: list[torch.UntypedStorage]

    def replay(self, *inputs: Tensor) -> Any:
        """The function of other inputs."""
        outputs = [torch.empty_strided(*kind[:2], dtype=kind[2], device="cpu") for kind in self.outputs]
        between = torch.empty(self.between, dtype=torch.uint8, device="cpu")
        memory = (between, SCRATCH.of(self.scratch), *outputs, *inputs)
        bases = [t.data_ptr() for t in memory]
        with torch.no_grad():
            for step in self.steps:
                step.run(memory if type(step) is _Again else bases)
        return outputs[0] if self.single else tuple(outputs)


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


@functools.cache
def _is_view(func: Any) -> bool:
    return not func._schema.is_mutable or torch.Tag.inplace_view in func.tags


@functools.cache
def _writing(func: Any) -> Any:
    """The overload of an operator that writes its one result where it is told, or None."""
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments]
    if func._schema.is_mutable or len(func._schema.returns) != 1 or torch.Tag.nondeterministic_seeded in func.tags:
        return None
    for name in func.overloadpacket.overloads():
        other = getattr(func.overloadpacket, name)
        given = other._schema.arguments
        if [(a.name, str(a.type)) for a in given if not a.is_out] == wanted and sum(a.is_out for a in given) == 1:
            return other
    return None


class _RefusedError(Exception):
    """Why a function cannot be recorded."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a function; ``refusal`` says what it did that cannot be done again."""

    def __init__(self, most: float = float("inf")) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusal: str | None = None
        self.room = most  # bytes that may still be made: all of it is held until the function has ended
        self.calls: list[_Kernel | _Operator] = []
        self.made: dict[int, _Memory] = {}
        self.scratch: dict[int, Tensor] = {}
        self.scratch_size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.refusal is None:  # within inference_mode what an operator is made of does not come by itself
            with self:
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        found = func(*args, **(kwargs or {}))
        if self.refusal is None:
            try:
                self._watch(func, args, kwargs or {}, found)
            except RuntimeError as error:  # of a tensor that has no memory to ask for
                self.refuse(str(error))
        return found

    def _watch(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        given, results = _tensors((args, kwargs)), _tensors(found)
        if any(t.layout is not torch.strided for t in (*given, *results)):
            self.refuse(f"it calls {func}")
        elif func.overloadpacket in _MAKES_MEMORY:
            self._hold(found)
        elif results and _is_view(func) and {*map(_storage, results)} <= {*map(_storage, given)}:
            pass
        elif (again := self._again(func, args, kwargs, found)) is not None:
            if self.refusal is None:
                self.calls.append(again)
        else:
            self.refuse(f"it calls {func}")

    def _again(self, func: Any, args: Any, kwargs: Any, found: Any) -> _Operator | None:
        """The call that does the same to memory that is there, and found's memory noted; None where there is none."""
        if len(_tensors((args, kwargs))) != sum(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
            return None  # tensors in lists
        if type(found) is not Tensor or (writing := _COPIES.get(func) or _writing(func)) is None:
            return None
        self._hold(found)
        if func in _COPIES:
            return _Operator(writing, (found.detach(), args[0].detach()), {}, None)
        args, kwargs = tuple(map(_as_it_is, args)), {name: _as_it_is(v) for name, v in kwargs.items()}
        return _Operator(writing, args, kwargs, found.detach())

    def _hold(self, found: Tensor) -> None:
        """Note memory that was made, and keep it, so that no other gets its address."""
        size = found.untyped_storage().nbytes()
        self.made[_storage(found)] = _Memory(found, size)
        self.room -= size
        if self.room < 0:
            self.refuse("it makes too much memory to hold at once")

    def refuse(self, why: str) -> None:
        """There will be no recording: let go of everything."""
        self.refusal = why
        self.made, self.calls = {}, []

    def called(self, kernel: str, dtype: int, threads: int, args: tuple[Tensor | float | None, ...]) -> None:
        """See _extension.Recorder."""
        if self.refusal is None:
            self.calls.append(_Kernel(kernel, dtype, threads, args))

    def used(self, scratch: Tensor, size: int) -> None:
        """See _extension.Recorder."""
        self.made.pop(_storage(scratch), None)
        self.scratch[_storage(scratch)] = scratch
        self.scratch_size = max(self.scratch_size, size)

    def finish(self, y: Any, inputs: Sequence[Tensor], weights: Iterable[Tensor]) -> Recording:
        """What was recorded of a function of these inputs that returned y and may read these weights."""
        if self.refusal is not None:
            raise _RefusedError(self.refusal)
        known = {_storage(w) for w in weights} | {_storage(k) for w in weights if (k := bytes_of(w)) is not None}
        if known & {_storage(x) for x in inputs}:
            raise _RefusedError("its inputs share their memory with a weight")
        results = [y] if type(y) is Tensor else list(y) if type(y) is tuple else []
        outputs = [self._output(out) for out in results]
        if not outputs or len({id(out) for out in outputs}) < len(outputs):
            raise _RefusedError("it does not return tensors of its own")
        self._lifetimes()
        if any(out.first < 0 and out.size for out in outputs):
            raise _RefusedError("nothing was told to write what it returns")
        for i, out in enumerate(outputs):
            out.base = _FIRST + i
        written = {id(out) for out in outputs}
        loose = [m for m in self.made.values() if m.first >= 0 and id(m) not in written]
        places = _Places(self, inputs, _FIRST + len(outputs), known, _arrange(loose, outputs[0]))
        steps: list[Any] = []
        for call in self.calls:
            if isinstance(call, _Operator):
                steps.append(places.operator(call))
                continue
            if not steps or type(steps[-1]) is _Again:
                steps.append(extension().Recording(_FIRST + len(outputs) + len(inputs)))
            values, bases = zip(*map(places.pointer, call.args), strict=True)
            steps[-1].add(call.name, call.dtype, call.threads, values, list(bases))
        kinds = [(out.shape, out.stride(), out.dtype) for out in results]
        return Recording(steps, places.between, self.scratch_size, kinds, type(y) is Tensor, places.held)

    def _output(self, out: Any) -> _Memory:
        memory = self.made.get(_storage(out)) if type(out) is Tensor else None
        if type(out) is Tensor and not out.numel():
            return _Memory(out, 0)
        if memory is None or out.storage_offset() or out.nbytes != memory.size:
            raise _RefusedError("it does not return tensors of its own")
        return memory

    def _lifetimes(self) -> None:
        for i, call in enumerate(self.calls):
            used = call.args if isinstance(call, _Kernel) else (*call.args, *call.kwargs.values(), call.out)
            for storage in {_storage(v) for v in used if isinstance(v, Tensor)}:
                memory = self.made.get(storage)
                if memory is not None:
                    memory.first, memory.last = i if memory.first < 0 else memory.first, i
                    memory.operand |= isinstance(call, _Operator)


class _Places:
    """Where each tensor of a recorded function is to be found in a run.

    Attributes:
        held: storages that are read where they lie.
    """

    def __init__(
        self, recorder: _Recorder, inputs: Sequence[Tensor], first: int, known: set[int], between: int
    ) -> None:
        self.held: list[torch.UntypedStorage] = []
        self.between = between
        self._made, self._scratch, self._known = recorder.made, recorder.scratch, known
        self._inputs = [(first + i, _storage(x), x.data_ptr(), x.dtype) for i, x in enumerate(inputs)]

    def _of(self, v: Tensor) -> tuple[int, int, torch.dtype]:
        """(base, or -1 for memory that stays where it is; distance from it in bytes; the dtype it is to be read as)."""
        storage, pointer = _storage(v), v.data_ptr()
        if (memory := self._made.get(storage)) is not None:
            dtype = v.dtype if memory.base == _BETWEEN else memory.tensor.dtype
            return memory.base, pointer - storage + memory.offset, dtype
        if storage in self._scratch:
            return _SCRATCHED, pointer - storage, v.dtype
        if storage in self._known:
            self.held.append(v.untyped_storage())
            return -1, pointer, v.dtype
        shared = [place for place in self._inputs if place[1] == storage]
        exact = [place for place in shared if place[2] == pointer]
        found = exact or shared
        if len(found) > 1:
            raise _RefusedError("its inputs share their memory")
        if not found:
            raise _RefusedError("it reads memory that is neither its own nor its inputs' nor its weights'")
        base, _, origin, dtype = found[0]
        return base, pointer - origin, dtype

    def pointer(self, v: Tensor | float | None) -> tuple[float, int]:
        """(value, base) of a native kernel's argument."""
        if not isinstance(v, Tensor):
            return (0 if v is None else v), -1
        if not v.data_ptr():
            return 0, -1
        base, distance, _ = self._of(v)
        return distance % (1 << 64), base

    def _view(self, v: Any) -> Any:
        if not isinstance(v, Tensor):
            return v
        base, distance, dtype = self._of(v)
        if base == -1:
            return v
        if dtype != v.dtype or distance % v.dtype.itemsize:
            raise _RefusedError("an operator of PyTorch's reads memory as another dtype than it has")
        return _View(base, distance, v.shape, v.stride(), v.dtype)

    def operator(self, call: _Operator) -> _Again:
        """An operator's call, on memory that is then there."""
        kwargs = {name: self._view(v) for name, v in call.kwargs.items()}
        if call.out is not None:
            out = next(a.name for a in call.call._schema.arguments if a.is_out)
            kwargs[out] = self._view(call.out)
        return _Again(call.call, tuple(map(self._view, call.args)), kwargs)


def _as_it_is(v: Any) -> Any:
    return v.detach() if isinstance(v, Tensor) else v


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def _fit(m: _Memory, others: list[_Memory]) -> None:
    """Put it behind as few of the others as it overlaps in time."""
    m.offset = 0
    for other in sorted(others, key=lambda o: o.offset):
        if other.first <= m.last and m.first <= other.last:
            if m.end <= other.offset:
                break
            m.offset = max(m.offset, other.end)


def _arrange(memories: list[_Memory], output: _Memory) -> int:
    """Give each its place, so that none overlap that are in use at a time; how many bytes lie outside of the output.

    What is out of use before the output is written may lie there.
    """
    places: dict[int, list[_Memory]] = {_FIRST: [], _BETWEEN: []}
    # Of those of one size the latest first: they find no place in the output.
    for m in sorted(memories, key=lambda m: (-m.size, -m.last)):
        _fit(m, places[_FIRST])
        if not m.operand and m.last < output.first and m.offset + m.size <= output.size:
            m.base = _FIRST
        else:
            m.base = _BETWEEN
            _fit(m, places[_BETWEEN])
        places[m.base].append(m)
    return max((m.end for m in places[_BETWEEN]), default=0)


def is_recording() -> bool:
    """Whether this thread is recording."""
    return WATCH.recorder is not None


def record(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor] = (),
    most: float = float("inf"),
) -> tuple[Any, Recording | str]:
    """Run a function of inputs, and record what it does.

    Args:
        function: of tensors on the CPU, called without gradients.
        inputs: what it is called with.
        weights: other tensors that it may read. Whether they are still the same is the caller's to know.
        most: bytes that it may make while it is watched, which holds all of them.

    Returns:
        What the function returned, and the recording, or why there is none.
    """
    before, recorder = WATCH.recorder, _Recorder(most)
    WATCH.recorder = recorder
    try:
        with recorder:
            y = function(*inputs)
    finally:
        WATCH.recorder = before
    try:
        return y, recorder.finish(y, inputs, weights)
    except (_RefusedError, RuntimeError, TypeError, ValueError) as error:  # the caller has its result
        return y, str(error)


_SEEN_ONCE = "it was called once"
# What may be held while a function is watched, as a multiple of what its recording may take in one piece.
_HELD = 4
_ONE_AT_A_TIME = threading.Lock()  # a dispatch mode changes what all threads see


class Recordings(dict[Any, "Recording | str"]):
    """By kind of call, a function's recording, or why there is none; at most so many."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def call(
        self,
        kind: Any,
        name: str,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        weights: Sequence[Tensor] = (),
        between: float = float("inf"),
    ) -> Any:
        """function(*inputs): from the third call of a kind on as a recording of the second, if it can be recorded.

        Args:
            kind: what the recording may depend on, shapes, strides and dtypes of the inputs included.
            name: for profilers.
            function: see record.
            inputs: see record.
            weights: see record.
            between: bytes beside inputs and outputs that a recording may take in one piece.
        """
        found = self.get(kind)
        if type(found) is Recording:
            if not torch._C._autograd._profiler_enabled():
                return found.replay(*inputs)
            with torch.profiler.record_function(f"dico_kernels: recorded {name}"):
                return found.replay(*inputs)
        if found is None:
            self._keep(kind, _SEEN_ONCE)
        elif found == _SEEN_ONCE and _ONE_AT_A_TIME.acquire(blocking=False):
            try:
                y, result = record(function, inputs, weights, _HELD * between)
            finally:
                _ONE_AT_A_TIME.release()
            if isinstance(result, Recording) and result.between > between:
                result = f"it needs {result.between} bytes between inputs and outputs"
            self._keep(kind, result)
            return y
        return function(*inputs)

    def _keep(self, kind: Any, found: Recording | str) -> None:
        """Remember what was found, and forget the oldest where that is too much."""
        self[kind] = found
        for oldest in list(self)[: max(len(self) - self._most, 0)]:
            self.pop(oldest, None)


__all__ = ["Recording", "Recordings", "is_recording", "record"]
