"""What is known of a fused module: how it was when it was last found fit to run fused, and recordings of what it did.

To look at every inner layer takes as long as a small kernel, and the Python between a block's kernels several times
that. Both need to be done once, as long as nothing has changed; that nothing has is what every call asks.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dico_kernels._packed import generation as packed_generation
from dico_kernels._packed import holds
from dico_kernels._recording import Recordings
from dico_kernels.ops._library import only_numbers
from dico_kernels.ops._recorded import occasion

# Attributes in which another layer of the same type could do something else: of convolutions, and of the others.
CONVOLUTION_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
OTHER_SETTINGS = ("eps", "approximate", "p")
EVERY_MODULE = frozenset(nn.Module().__dict__)
_version = attrgetter("_version")
_hooks = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Kinds of inputs that a module keeps recordings for.
_MOST = 8

# By path, as Fused.fused_layout has them.
Layers = Sequence[tuple[tuple[str, ...], nn.Module]]


class _Epoch:
    """A time in which the weights of a module and the choices that concern it stay as they are.

    Attributes:
        choices: what they are.
        stamp: the weights', see _stamp.
        storages: theirs, held so that no other memory gets their addresses.
        kinds: by kind of inputs the recording, or why there is none.
        derived: what was computed of the weights alone, where that may be kept: of packed ones.
    """

    def __init__(self, choices: tuple[Any, ...], stamp: list[Any], weights: list[Tensor]) -> None:
        self.choices, self.stamp = choices, stamp
        self.storages = [w.untyped_storage() for w in weights]
        self.kinds = Recordings(_MOST)
        self.keeps = any(map(holds, weights))
        self.derived: tuple[Tensor | None, ...] | None = None

    def foreign(self, derived: tuple[Tensor | None, ...]) -> list[Tensor]:
        """Those of the tensors derived of the weights that have memory of their own."""
        held = {s.data_ptr() for s in self.storages}
        return [v for v in derived if v is not None and v.untyped_storage().data_ptr() not in held]


class _State:
    """A module as it was. It holds neither that nor a layer; its epoch, until the next, the memory of the weights.

    Args:
        module: has just been found fit to run fused.
        layers: those that it bypasses.
    """

    def __init__(self, module: nn.Module, layers: Layers) -> None:
        self._type = type(module)
        self._layers = []
        for path, layer in layers:
            held = layer.__dict__
            names = [*(n for n in CONVOLUTION_SETTINGS + OTHER_SETTINGS if n in held), *own_settings(layer)]
            read: Callable[[Any], Any] = itemgetter(*names) if names else len
            self._layers.append((path, ref(layer), type(layer), len(held), len(layer._modules), read, read(held)))
        self._types = [*map(type, _parameters(module, [layer for _, layer in layers]))]
        self.epoch: _Epoch | None = None

    def weights(self, module: nn.Module) -> list[Tensor] | None:
        """Its weights and those of the layers, if everything is as it was, whatever the weights may hold."""
        if type(module) is not self._type:
            return None
        layers = []
        for path, was, kind, attributes, children, read, settings in self._layers:
            layer: nn.Module | None = module
            for name in path:
                layer = None if layer is None else layer._modules.get(name)
            if layer is None or layer is not was() or type(layer) is not kind:
                return None
            held = layer.__dict__
            # A forward of the instance's own would be one attribute more.
            if len(held) != attributes or len(layer._modules) != children:
                return None
            try:
                if read(held) != settings:
                    return None
            except (KeyError, RuntimeError, ValueError):  # gone, or a tensor or array now, which does not compare
                return None
            if any(_hooks(held)):
                return None
            layers.append(layer)
        found = _parameters(module, layers)
        return [p for p in found if p is not None] if [*map(type, found)] == self._types else None


def own_settings(layer: nn.Module) -> tuple[str, ...]:
    """Names of the settings that a layer of somebody's own class has: the numbers that its forward might read."""
    if type(layer).__module__.partition(".")[0] in ("torch", "dico_kernels"):
        return ()
    held = layer.__dict__.items()
    return tuple(sorted(n for n, v in held if n not in EVERY_MODULE and n[0] != "_" and _is_plain(v)))


def _is_plain(value: Any) -> bool:
    # Not strings: tools label layers with them.
    return isinstance(value, (bool, int, float, type(None))) or (
        isinstance(value, tuple) and all(map(_is_plain, value))
    )


def _parameters(module: nn.Module, layers: Sequence[nn.Module]) -> list[Tensor | None]:
    return [p for m in (module, *layers) for p in m._parameters.values()]


# Beside the modules: what is in a module is copied, pickled and compared.
_STATES: MutableMapping[nn.Module, _State] = WeakIdKeyDictionary()


def forget(module: nn.Module) -> None:
    """Know nothing of a module."""
    _STATES.pop(module, None)


def remember(module: nn.Module, layers: Layers) -> None:
    """Take a module and the layers that it bypasses for fit to run fused, as they are now."""
    _STATES[module] = _State(module, layers)


def unchanged(module: nn.Module) -> list[Tensor] | None:
    """The weights of a module, if it is as it was when ``remember`` was called, and those of the layers it bypasses."""
    state = _STATES.get(module)
    found = None if state is None else state.weights(module)
    if found is None:
        forget(module)
    return found


def _stamp(weights: list[Tensor]) -> list[Any] | None:
    """What differs where a weight does; None where nothing would, of tensors made under inference_mode."""
    try:
        places = [*map(Tensor.data_ptr, weights), *map(Tensor.stride, weights), *map(Tensor.size, weights)]
        return [*map(_version, weights), *places]
    except RuntimeError:
        return None


def recorded(
    module: nn.Module,
    weights: list[Tensor],
    settings: Any,
    function: Callable[..., Tensor],
    *inputs: Tensor,
    derive: Callable[[], tuple[Tensor | None, ...]] = tuple,
) -> Tensor:
    """function(*inputs, *derive()), which depends on nothing but the inputs, these weights of the module and settings.

    From the third call on for inputs of the same shapes, strides and dtypes, on a CPU and without gradients, as a
    recording of the second, if it can be recorded.

    Args:
        module: has just been found unchanged.
        weights: its own and its layers'.
        settings: compared with those of the last call.
        function: see above.
        inputs: of function.
        derive: what function takes beside the inputs, of the weights and settings alone. It is kept for as long as
            these stay as they are if a weight is packed, and derived at each call if none is: PyTorch does not count
            what is written through ``.data``, and only pack asks for that to be left undone.
    """
    epoch = None if torch.compiler.is_compiling() else _epoch(module, weights, settings, inputs)
    if epoch is None:
        return function(*inputs, *derive())
    derived = epoch.derived if epoch.derived is not None else derive()
    if epoch.keeps:
        epoch.derived = derived
    given = inputs if epoch.keeps else (*inputs, *epoch.foreign(derived))
    kind = torch.get_num_threads(), *[(x.shape, x.stride(), x.dtype) for x in inputs]
    read = weights + [v for v in derived if v is not None] if epoch.keeps else weights
    name = type(module).__name__
    # Of this epoch: if it ends meanwhile, nobody asks for it any more.
    y: Tensor = epoch.kinds.call(kind, name, lambda *now: function(*now[: len(inputs)], *derived), given, read)
    return y


def _epoch(module: nn.Module, weights: list[Tensor], settings: Any, inputs: Sequence[Tensor]) -> _Epoch | None:
    """The module's at present, if a call on these inputs may be recorded, or replayed."""
    state, now = _STATES.get(module), occasion()
    if state is None or now is None:
        return None
    if not all(x.is_cpu and not x.is_neg() and x.numel() for x in inputs):
        return None
    if torch._C._len_torch_function_stack() or not only_numbers(*inputs):
        return None
    stamp, choices = _stamp(weights), (now, packed_generation(), settings)
    if stamp is None:
        return None
    epoch = state.epoch
    if epoch is None or epoch.choices != choices or epoch.stamp != stamp:
        state.epoch = epoch = _Epoch(choices, stamp, weights)
    return epoch


__all__ = [
    "CONVOLUTION_SETTINGS",
    "EVERY_MODULE",
    "OTHER_SETTINGS",
    "forget",
    "own_settings",
    "recorded",
    "remember",
    "unchanged",
]
