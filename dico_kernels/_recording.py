"""Calls of native kernels, recorded and made again: what a forward on the CPU does, without the Python that decides it.

A function of tensors is run once and watched: every kernel it calls, every tensor it makes, and that it computes in no
other way. If all it does is call kernels, those calls are kept with their arguments, each pointer as a distance from
what changes from call to call: the inputs, the output, and the memory between them, a part of which is the output's
until that is written.
"""

from __future__ import annotations

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
# Bases of pointers; the inputs follow.
_BETWEEN, _OUTPUT, _SCRATCHED, _INPUTS = range(4)
_ALIGNED = 64


@dataclass
class _Memory:
    """Memory that the function made, the calls between which it is in use, and where it is to lie instead."""

    tensor: Tensor
    size: int
    first: int = -1
    last: int = -1
    base: int = _BETWEEN
    offset: int = 0

    @property
    def end(self) -> int:
        return self.offset + -(-self.size // _ALIGNED) * _ALIGNED


@dataclass
class _Call:
    kernel: str
    dtype: int
    threads: int
    args: tuple[Tensor | float | None, ...]


@dataclass(frozen=True)
class Recording:
    """A function's calls of kernels, for inputs of the shapes, strides and dtypes that it was recorded with.

    Attributes:
        steps: the calls.
        between: bytes of the memory between inputs and output that lies in neither.
        scratch: bytes of this thread's scratch.
        output: size, stride and dtype of what it returns.
        held: memory that the steps read where it lies, and that must therefore outlive them.
    """

    steps: Any
    between: int
    scratch: int
    output: tuple[torch.Size, tuple[int, ...], torch.dtype]
    held: list[torch.UntypedStorage]

    def replay(self, *inputs: Tensor) -> Tensor:
        """The function of other inputs."""
        size, stride, dtype = self.output
        out = torch.empty_strided(size, stride, dtype=dtype, device="cpu")
        between = torch.empty(self.between, dtype=torch.uint8, device="cpu")
        scratch = SCRATCH.of(self.scratch)
        self.steps.run((between.data_ptr(), out.data_ptr(), scratch.data_ptr(), *(x.data_ptr() for x in inputs)))
        return out


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class _RefusedError(Exception):
    """Why a function cannot be recorded."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches a function; ``refusal`` says what it did beside calling kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusal: str | None = None
        self.calls: list[_Call] = []
        self.made: dict[int, _Memory] = {}
        self.scratch: dict[int, Tensor] = {}
        self.scratch_size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.refusal is None:
            try:
                self._watch(func, (args, kwargs), found)
            except RuntimeError as error:  # of a tensor that has no memory to ask for
                self.refuse(str(error))
        return found

    def _watch(self, func: Any, args: Any, found: Any) -> None:
        given, results = _tensors(args), _tensors(found)
        if any(t.layout is not torch.strided for t in (*given, *results)):
            self.refuse(f"it calls {func}")
        elif func.overloadpacket in _MAKES_MEMORY:
            # It is held, so that no other gets its address.
            self.made[_storage(found)] = _Memory(found, found.untyped_storage().nbytes())
        elif func._schema.is_mutable or not results or not {*map(_storage, results)} <= {*map(_storage, given)}:
            self.refuse(f"it calls {func}")

    def refuse(self, why: str) -> None:
        """There will be no recording: let go of everything."""
        self.refusal = why
        self.made, self.calls = {}, []

    def called(self, kernel: str, dtype: int, threads: int, args: tuple[Tensor | float | None, ...]) -> None:
        """See _extension.Recorder."""
        if self.refusal is None:
            self.calls.append(_Call(kernel, dtype, threads, args))

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
        places = {_storage(x): (_INPUTS + i, x.data_ptr()) for i, x in enumerate(inputs)}
        if len(places) < len(inputs) or known & places.keys():
            raise _RefusedError("its inputs share their memory, with each other or with a weight")
        output = self.made.pop(_storage(y), None) if type(y) is Tensor else None
        if output is None or y.storage_offset() or y.nbytes != output.size:
            raise _RefusedError("it does not return one tensor of its own")
        for i, step in enumerate(self.calls):
            for storage in {_storage(v) for v in step.args if isinstance(v, Tensor)}:
                memory = output if storage == _storage(y) else self.made.get(storage)
                if memory is not None:
                    memory.first, memory.last = i if memory.first < 0 else memory.first, i
        if output.first < 0:
            raise _RefusedError("no kernel was given what it returns")
        between = _arrange([m for m in self.made.values() if m.first >= 0], output)
        places |= {s: (_SCRATCHED, s) for s in self.scratch} | {_storage(y): (_OUTPUT, _storage(y))}
        places |= {s: (m.base, s - m.offset) for s, m in self.made.items()}
        steps, held = extension().Recording(_INPUTS + len(inputs)), []
        for step in self.calls:
            values: list[float] = []
            bases: list[int] = []
            for v in step.args:
                base, pointer = -1, v.data_ptr() if isinstance(v, Tensor) else 0
                if isinstance(v, Tensor) and pointer:
                    if _storage(v) in places:
                        base, origin = places[_storage(v)]
                        pointer = (pointer - origin) % (1 << 64)
                    elif _storage(v) in known:
                        held.append(v.untyped_storage())
                    else:
                        raise _RefusedError("it reads memory that is neither its own nor its inputs' nor its weights'")
                values.append(v if isinstance(v, (int, float)) else pointer)
                bases.append(base)
            steps.add(step.kernel, step.dtype, step.threads, tuple(values), bases)
        return Recording(steps, between, self.scratch_size, (y.shape, y.stride(), y.dtype), held)


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
    places: dict[int, list[_Memory]] = {_OUTPUT: [], _BETWEEN: []}
    # Of those of one size the latest first: they find no place in the output.
    for m in sorted(memories, key=lambda m: (-m.size, -m.last)):
        _fit(m, places[_OUTPUT])
        if m.last < output.first and m.offset + m.size <= output.size:
            m.base = _OUTPUT
        else:
            m.base = _BETWEEN
            _fit(m, places[_BETWEEN])
        places[m.base].append(m)
    return max((m.end for m in places[_BETWEEN]), default=0)


def is_recording() -> bool:
    """Whether this thread is recording."""
    return WATCH.recorder is not None


def record(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, Recording | str]:
    """Run a function of inputs, and record what it does.

    Args:
        function: of tensors on the CPU, called without gradients.
        inputs: what it is called with.
        weights: other tensors that it may read. Whether they are still the same is the caller's to know.

    Returns:
        What the function returned, and the recording, or why there is none.
    """
    before, recorder = WATCH.recorder, _Recorder()
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


__all__ = ["Recording", "is_recording", "record"]
