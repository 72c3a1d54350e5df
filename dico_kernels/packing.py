"""pack and unpack: weights in the layouts that products read, oneDNN's or the native kernels', for sampling on a CPU.

Given a plain weight, each call deals with its layout: 5 to 20% of a product's time at the shapes of these
models, half of a dense convolution's of one image, and most of a conditioning head's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dico_kernels import _gemm
from dico_kernels._linear import linear
from dico_kernels._packed import ONEDNN, forget, keep, packed, packed_for
from dico_kernels.nn import _state
from dico_kernels.nn._fused import Fused
from dico_kernels.nn.pixel_shuffle import SkipUpsample, separable
from dico_kernels.ops._backends import multiplies_natively
from dico_kernels.ops._library import only_numbers

Model = TypeVar("Model", bound=nn.Module)


def _usable(x: Any, weight: Tensor) -> bool:
    """Whether a call may use a packed weight: without gradients, and not where others look on."""
    return only_numbers(x) and x.is_cpu and x.dtype == weight.dtype and x.numel() > 0


class PackedConv2d(nn.Conv2d):
    """An nn.Conv2d that pack() found: on its packed weight where that is valid and no gradient is wanted."""

    plain_class = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H', W')."""
        plain = x.ndim == 4 and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        how = (self.padding, self.stride, self.dilation, self.groups)
        kept = None
        if plain and _usable(x, self.weight):
            reorder = torch.ops.mkldnn._reorder_convolution_weight
            kept = packed_for(x.shape, self.weight, lambda w: reorder(w, *how, list(x.shape)))
        if kept is None:
            return super().forward(x)
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, kept, self.bias, *how, "none", [], "")
        return y


class PackedLinear(nn.Linear):
    """An nn.Linear that pack() found: on its packed weight where that is valid and no gradient is wanted."""

    plain_class = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., K)."""
        if not _usable(x, self.weight):
            return super().forward(x)
        own = multiplies_natively(self.weight)
        kept = packed(self.weight, _gemm.form() if own else ONEDNN)
        if kept is None:
            return super().forward(x)
        return _gemm.linear(x, self.weight, self.bias, kept) if own else linear(x, kept, self.bias)


_FORMS: dict[type[nn.Module], type[nn.Module]] = {t: t.plain_class for t in (PackedConv2d, PackedLinear)}


def _matrix(weight: Tensor) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1).contiguous())
    return reordered


def _keep_product(weight: Tensor) -> bool:
    """Keep the weight of a fused 1x1 convolution or linear layer for whoever multiplies by it."""
    if multiplies_natively(weight):
        return keep(weight, _gemm.pack, _gemm.form())
    return keep(weight, _matrix)


def _pack_layer(layer: nn.Module) -> bool:
    """Pack a layer whose forward is called."""
    weight = layer._parameters.get("weight")
    if weight is None or not weight.numel():
        return False
    if type(layer) in _FORMS:
        _unpack_layer(layer)  # what could be packed need not be any more: in another dtype
    form: type[nn.Module]
    if type(layer) is nn.Linear:
        done, form = _keep_product(layer.weight), PackedLinear
    elif type(layer) is nn.Conv2d:
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return False
        # Packed when the size of its input is known.
        done, form = keep(layer.weight, lambda w: w.new_empty(0)), PackedConv2d
    else:
        return False
    if done:
        layer.__class__ = form
    return done


def _pack_all(module: nn.Module, seen: set[int]) -> Iterator[bool]:
    """Pack a module and what is in it; for each weight whether it was."""
    if id(module) in seen:
        return
    seen.add(id(module))
    skipped: set[str] = set()
    if isinstance(module, Fused) and module.why_unfused() is None:
        skipped = {*(path[0] for path, *_ in module.fused_layout), *module.fused_products}
        for name in module.fused_products:
            layer = module._modules.get(name)
            if type(layer) is nn.Conv2d and layer.kernel_size == (1, 1):
                yield _keep_product(layer.weight)
    if isinstance(module, SkipUpsample) and separable(module.up, module.reduce):
        skipped = {"reduce"}  # an op reads its weight, and its class says that it may
        yield _keep_product(module.reduce.weight)
    yield _pack_layer(module)
    for name, child in module._modules.items():
        if child is not None and name not in skipped:
            yield from _pack_all(child, seen)


def pack(model: Model) -> Model:
    """Keep the weights of fused 1x1 convolutions, other convolutions and linear layers packed for CPU inference too.

    Costs the memory of these weights once more, of other than 1x1 convolutions for each of the last two sizes of their
    input, as oneDNN packs them by it. Forward passes without gradients use the packed weights; gradients, optimisers,
    ``state_dict`` and copies of the model see the originals, which stay as they are. A weight that was changed or moved
    since is used unpacked, until packed anew; so is one that an optimizer with ``fused=True`` stepped. What PyTorch
    does not count as a change, writing through ``.data`` or from outside PyTorch, needs another call of pack.

    Layers that are exactly nn.Conv2d or nn.Linear become PackedConv2d or PackedLinear, in place, until unpack. Call
    fuse before pack.

    Args:
        model: any module, best a fused one; float32, or 16-bit where oneDNN or native products multiply that. On
            other devices than the CPU there is nothing to pack.

    Returns:
        The model itself.

    Warns:
        RuntimeWarning: nothing could be packed.
    """
    if not sum(_pack_all(model, set())):
        warnings.warn(
            "nothing was packed: expected convolutions or linear layers with weights on a CPU, not made under "
            "inference_mode, in a torch with oneDNN; float32, or 16-bit where it or native kernels multiply that",
            RuntimeWarning,
            stacklevel=2,
        )
    return model


def unpack(model: Model) -> Model:
    """Undo pack: forget the packed weights of a model, free their memory, and give its layers their own class.

    Returns:
        The model itself.
    """
    for module in model.modules():
        _state.forget(module)
        _unpack_layer(module)
    return model


def _unpack_layer(layer: nn.Module) -> None:
    if type(layer) in _FORMS:  # not what others made of it: a parametrised one, FSDP's
        layer.__class__ = _FORMS[type(layer)]
    for parameter in layer._parameters.values():
        if parameter is not None:
            forget(parameter)


__all__ = ["PackedConv2d", "PackedLinear", "pack", "unpack"]
