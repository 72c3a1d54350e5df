"""What a fused module remembers: how it was when it was last found fit to run fused, and recordings of what it did.

To look at every inner layer takes as long as a small kernel, and the Python between a block's kernels several times
that. Both need to be done once, as long as nothing has changed; that nothing has is what every call asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from operator import itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from dico_kernels import native
from dico_kernels._packed import generation as packed_generation
from dico_kernels._recording import Recording, record
from dico_kernels.ops._backends import current, is_observed, multiplying_now
from dico_kernels.ops._library import only_numbers
from dico_kernels.ops._tuning import generation as tuned_generation
from dico_kernels.ops._tuning import is_measuring

VARIABLE = "DICO_KERNELS_RECORD"
_ENABLED = os.environ.get(VARIABLE, "1") != "0"
_KEY = "_fused_state"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of a layer's attributes those that why_unfused looks at.
_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "eps", "approximate", "p")
# Kinds of inputs that a module keeps recordings for.
_MOST = 8
_SEEN, _REFUSED = "seen once", "refused"


class State:
    """A module's memory. A copy of it, pickled ones too, remembers nothing.

    Args:
        module: whose it is; it has just been found fit to run fused.
        layers: the inner layers that it bypasses.
    """

    def __init__(self, module: nn.Module | None = None, layers: tuple[nn.Module, ...] = ()) -> None:
        self._owner = None if module is None else ref(module)
        self.recordings: dict[Any, Recording | str] = {}
        self._context: tuple[Any, ...] = ()
        self._stamp: list[Any] | None = None
        if module is None:
            return
        self._layers = (module, *layers)
        dicts = [layer.__dict__ for layer in layers]
        self._reads = [(d, itemgetter(*(n for n in _SETTINGS if n in d), *_HOOKS)) for d in dicts]
        self._hooks = [d[name] for d in dicts for name in _HOOKS]
        self._sizes = [*dicts, *self._hooks]
        self._modules = [layer._modules for layer in self._layers]
        self._parameters = [layer._parameters for layer in self._layers]
        self._was = self._now()
        self.weights = [p for d in self._parameters for p in d.values() if p is not None]

    def __reduce__(self) -> tuple[type[State], tuple[()]]:
        return State, ()

    def _now(self) -> tuple[Any, ...]:
        return (
            [read(d) for d, read in self._reads],
            list(map(len, self._sizes)),
            list(map(type, self._layers)),
            [id(m) for d in self._modules for m in d.values()],
            [(id(p), type(p)) for d in self._parameters for p in d.values()],
        )

    def holds(self, module: nn.Module) -> bool:
        """Whether the module is this state's, and as it was."""
        return self._owner is not None and self._owner() is module and self._now() == self._was

    def _weights_now(self) -> list[Any]:
        return [(w._version, w.data_ptr()) for w in self.weights]

    def recording(self, key: Any, context: tuple[Any, ...]) -> Recording | str | None:
        """What is known of calls with such inputs: a recording, or a word that says what to do; None if nothing is."""
        if self._context != context or (self._stamp is not None and self._stamp != self._weights_now()):
            self.recordings, self._context, self._stamp = {}, context, None
        return self.recordings.get(key)

    def keep(self, key: Any, found: Recording | str) -> None:
        """Remember what is known from now on."""
        if isinstance(found, Recording) and self._stamp is None:
            self._stamp = self._weights_now()
        if key not in self.recordings and len(self.recordings) == _MOST:
            del self.recordings[next(iter(self.recordings))]
        self.recordings[key] = found


def forget(module: nn.Module) -> None:
    """Let a module remember nothing."""
    module.__dict__.pop(_KEY, None)


def is_unchanged(module: nn.Module) -> bool:
    """Whether a module is as it was when ``remember`` was called."""
    state: State | None = module.__dict__.get(_KEY)
    return state is not None and state.holds(module)


def remember(module: nn.Module, layers: tuple[nn.Module, ...]) -> None:
    """Take a module and the layers that it bypasses for fit to run fused, as they are now."""
    module.__dict__[_KEY] = State(module, layers)


def recorded(module: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), which depends on nothing but the inputs and the module's weights and settings.

    From the second call on for inputs of the same shapes, strides and dtypes, on a CPU and without gradients, as a
    recording, if it can be recorded.
    """
    state: State | None = module.__dict__.get(_KEY)
    if state is None or not _ENABLED or is_observed() or is_measuring() or not native.available():
        return function(*inputs)
    if not all(x.is_cpu and only_numbers(x) for x in inputs) or torch._C._len_torch_function_stack():
        return function(*inputs)
    choice = current()
    if choice[0] not in ("auto", "native"):
        return function(*inputs)
    context = (
        *(choice, multiplying_now(), tuned_generation(), packed_generation()),
        *(torch.get_num_threads(), native.extension().selected_isa()),
    )
    key = tuple([(x.shape, x.stride(), x.dtype) for x in inputs])
    found = state.recording(key, context)
    if isinstance(found, Recording):
        return _replay(module, found, *inputs)
    if found == _SEEN and not any(w.is_inference() for w in state.weights):
        y, result = record(function, inputs, state.weights)
        state.keep(key, result if isinstance(result, Recording) else _REFUSED)
        return y
    if found is None:
        state.keep(key, _SEEN)
    return function(*inputs)


def _replay(module: nn.Module, recording: Recording, *inputs: Tensor) -> Tensor:
    if not torch._C._autograd._profiler_enabled():
        return recording.replay(*inputs)
    with torch.profiler.record_function(f"dico_kernels: recorded {type(module).__name__}"):
        return recording.replay(*inputs)


__all__ = ["State", "forget", "is_unchanged", "recorded", "remember"]
