"""The extension module ``dico_kernels._C``, built from csrc/: whether it is there, and how a kernel of it is called.

torch is imported first, so that the extension binds to torch's OpenMP runtime and the two share one pool of threads.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from dico_kernels._memory import DTYPES

ISA_VARIABLE = "DICO_KERNELS_CPU_ISA"
BUILD_HINT = "run `pip install -e .` in the clone (it needs a C++17 compiler) to build it"


def _load() -> tuple[Any, str]:
    """The extension module, or None and the reason."""
    try:
        module = importlib.import_module("dico_kernels._C")
    except ImportError as error:
        return None, f"dico_kernels._C cannot be imported ({error}); {BUILD_HINT}"
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        try:
            module.select_isa(wanted)
        except ValueError as error:
            raise ValueError(f"{ISA_VARIABLE}={wanted!r}: {error}") from None
    return module, ""


_C, why_unavailable = _load()


def available() -> bool:
    """Whether the extension is there; ``why_unavailable`` says why when it is not."""
    return _C is not None


def extension() -> Any:
    """The extension module.

    Raises:
        ImportError: it was not built or cannot be loaded; the message says what to do.
    """
    if _C is None:
        raise ImportError(why_unavailable)
    return _C


def with_cuda() -> bool:
    """Whether the extension was built with CUDA kernels."""
    return available() and bool(extension().build()["with_cuda"])


def isas() -> list[str]:
    """CPU instruction sets that were compiled in and run here, best first: of "v4bf16", "v4", "v3", "base"."""
    return list(extension().available_isas())


def isa(name: str) -> AbstractContextManager[None]:
    """Within the context, CPU kernels run as compiled for one instruction set.

    Raises:
        ValueError: a name that is not in isas().
    """
    module = extension()
    return _holding(module.selected_isa, module.select_isa, name)


def grain(elements: int) -> AbstractContextManager[None]:
    """Within the context, CPU kernels use all threads for what takes longer than a pass over so many elements.

    Otherwise for more than 32768, as PyTorch's own do. For tests: it holds for every thread of the process.
    """
    module = extension()
    return _holding(module.grain, module.set_grain, elements)


@contextmanager
def _holding(chosen: Callable[[], Any], choose: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = chosen()
    choose(value)
    try:
        yield
    finally:
        choose(before)


def build() -> dict[str, Any]:
    """What the extension says of its own build: version, compiler, openmp, cuda, with_cuda."""
    return dict(extension().build())


class Recorder(Protocol):
    """Who wants to know what the kernels are called with."""

    def called(self, kernel: str, dtype: int, threads: int, args: tuple[Tensor | float | None, ...]) -> None:
        """A kernel has run."""

    def used(self, scratch: Tensor, size: int) -> None:
        """So many bytes of a buffer are scratch, whose contents nobody wants."""


class _Watch(threading.local):
    recorder: Recorder | None = None


WATCH = _Watch()


def call(kernel: str, x: Tensor, *args: Tensor | float | None, dtype: torch.dtype | None = None) -> None:
    """Run a kernel of the extension in x's dtype, or another; tensors go as pointers, None as a null one.

    Raises:
        RuntimeError: x is not on the CPU, naming the kernel.
        ImportError: the extension was not built.
    """
    if _C is None:
        raise ImportError(why_unavailable)
    if not x.is_cpu:
        raise RuntimeError(f"{kernel}: the native kernel runs on cpu only, and the input is on {x.device}")
    values = [v if isinstance(v, (int, float)) else 0 if v is None else v.data_ptr() for v in args]
    number, threads = DTYPES[dtype or x.dtype], torch.get_num_threads()
    getattr(_C, kernel)(number, threads, *values)
    if WATCH.recorder is not None:
        WATCH.recorder.called(kernel, number, threads, args)
