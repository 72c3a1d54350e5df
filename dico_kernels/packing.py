"""pack and unpack: weights in the layouts that products read, oneDNN's or the native kernels', for sampling on a CPU.

Given a plain weight, each call deals with its layout: 5 to 20% of a product's time at the shapes of these
models, half of a dense convolution's of one image, and most of a conditioning head's. And a 3x3 convolution by
Winograd's algorithm, which has fewer products, wants a weight that was transformed before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dico_kernels import _gemm, _winograd, native
from dico_kernels._linear import linear
from dico_kernels._packed import ONEDNN, forget, keep, packed, packed_for
from dico_kernels.nn import _state
from dico_kernels.nn._fused import Fused, plain_convolution, settings
from dico_kernels.nn.pixel_shuffle import SkipUpsample, separable
from dico_kernels.ops._backends import multiplies_natively, note_optional
from dico_kernels.ops._library import only_numbers

Model = TypeVar("Model", bound=nn.Module)


def _usable(x: Any, weight: Tensor) -> bool:
    """Whether a call may use a packed weight: without gradients, and not where others look on."""
    return only_numbers(x) and x.is_cpu and x.dtype == weight.dtype and x.numel() > 0


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class PackedConv2d(nn.Conv2d):
    """An nn.Conv2d that pack() found: on its packed weight where that is valid and no gradient is wanted."""

    plain_class = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H', W'), in the memory layout that nn.Conv2d gives it: a view may be taken of it."""
        y = self.forward_packed(x)
        if y is None:
            return super().forward(x)
        return y if _is_channels_last(x) or _is_channels_last(self.weight) else y.contiguous()

    def forward_packed(self, x: Tensor) -> Tensor | None:
        """The same in channels_last memory, if x is to be multiplied by a packed weight; else None."""
        if not _usable(x, self.weight) or x.ndim != 4:
            return None
        if (kept := self._for_winograd(x)) is not None:
            return self._winograd(x, kept)
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return None
        how = (self.padding, self.stride, self.dilation, self.groups)
        kept = packed_for(x.shape, self.weight, lambda w: _reorder_convolution(w, *how, list(x.shape)))
        if kept is None:
            return None
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, kept, self.bias, *how, "none", [], "")
        return y

    def _for_winograd(self, x: Tensor) -> Tensor | None:
        """The weight as Winograd's algorithm reads it, if it is valid and x is to be convolved so."""
        if x.shape[1] != self.weight.shape[1] or not _is_for_winograd(self):
            return None
        if self.bias is not None and self.bias.dtype != x.dtype:
            return None
        return packed(self.weight, _winograd.form())

    def _winograd(self, x: Tensor, kept: Tensor) -> Tensor:
        note_optional("winograd", x, native.winograd)
        bias = None if self.bias is None else self.bias.contiguous()
        return native.winograd(x.contiguous(memory_format=torch.channels_last), kept, self.weight.shape[0], bias)


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


def _is_for_winograd(layer: nn.Conv2d) -> bool:
    """Whether native kernels are to convolve by Winograd's algorithm, and a layer is one for which that is faster."""
    if layer.groups != 1 or settings(layer) != plain_convolution(3):
        return False
    return multiplies_natively(layer.weight) and _winograd.pays(layer.weight)


def _reorder_convolution(*args: Any) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_convolution_weight(*args)
    return reordered


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
        form = PackedConv2d
        if _is_for_winograd(layer):
            done = keep(layer.weight, _winograd.pack, _winograd.form())
        else:
            done = keep(layer.weight, lambda w: w.new_empty(0))  # packed when the size of its input is known
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

    Costs the memory of these weights once more; of 3x3 convolutions 16/9 of it, where native kernels convolve by
    Winograd's algorithm: a smaller error in float32, but infinities may become NaN; of other convolutions once for each
    of the last two sizes of their input, as oneDNN packs them by it. Forward passes without gradients use the packed
    weights; gradients, optimisers, ``state_dict`` and copies of the model see the originals, which stay as they are. A
    weight that was changed or moved since is used unpacked, until packed anew; so is one that an optimizer with
    ``fused=True`` stepped. What PyTorch does not count as a change, writing through ``.data`` or from outside PyTorch,
    needs another call of pack.

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
