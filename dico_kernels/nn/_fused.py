"""What every fused module shares: when its inner layers may be bypassed, and which library computes."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dico_kernels import ops
from dico_kernels.nn._state import CONVOLUTION_SETTINGS, OTHER_SETTINGS, forget, own_settings, remember, unchanged
from dico_kernels.ops._checks import DTYPES
from dico_kernels.reference import functional

# Path, type and settings of each inner layer.
Layout = tuple[tuple[tuple[str, ...], type[nn.Module], tuple[Any, ...]], ...]

# Not a DTensor, not a quantised subclass: what an op can read.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)


def settings(layer: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What another layer of the same type could do differently, by name."""
    names = CONVOLUTION_SETTINGS if isinstance(layer, nn.Conv2d) else OTHER_SETTINGS
    found = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    found.update((name, layer.__dict__[name]) for name in own_settings(layer))
    return tuple(found.items())


def plain_convolution(kernel: int) -> tuple[tuple[str, Any], ...]:
    """The settings of an nn.Conv2d that keeps the image's size."""
    return tuple(zip(CONVOLUTION_SETTINGS, ((kernel,) * 2, (1, 1), (kernel // 2,) * 2, (1, 1), "zeros"), strict=True))


def hooked(module: nn.Module) -> str | None:
    """What would be skipped if the module's parameters were used without calling it, or None."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "has backward hooks"
    if "forward" in module.__dict__ or "_conv_forward" in module.__dict__:
        return "has a forward of its own on the instance"
    return None


def unreadable(module: nn.Module) -> str | None:
    """Which of a module's own parameters is not a plain tensor, or None."""
    for name, p in module._parameters.items():
        if p is not None and type(p) not in _PLAIN_TENSORS:
            return f"{name} is a {type(p).__name__}"
    return None


def find(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """The submodule at a path, or None."""
    found: nn.Module | None = module
    for name in path:
        if found is None:
            return None
        found = found._modules.get(name)
    return found


class Fused(nn.Module):
    """Base of every module that computes its class's forward on ops, from its inner layers' parameters.

    Comes before the class whose forward it replaces, in the order of method resolution: ``super().forward`` is the
    unfused one. It runs whenever an inner layer is no longer what it was when the module was fused or built: replaced
    (LoRA), parametrised, hooked, sharded.

    Attributes:
        fused_layout: inner layers that are bypassed, each with its type and settings.
        fused_family: what to call it in explain's table.
        fused_arity: how many inputs forward takes.
        fused_joined: children that are bypassed while they are plain, and called otherwise.
        fused_products: names of the 1x1 convolutions whose weights are multiplied as they are, which pack() packs.
        fused_recompute: whether a training step keeps less and computes that anew in backward, fuse's ``recompute``;
            None where there is nothing to choose.
        fused_checkpoints: whether the forward that fuse() replaced checkpoints itself in training; then this one does.
        fused_original: the class that fuse() replaced; None for a class of ``dico_kernels.nn``.
    """

    fused_family: ClassVar[str] = ""
    fused_layout: ClassVar[Layout] = ()
    fused_original: ClassVar[type[nn.Module] | None] = None
    fused_arity: ClassVar[int] = 2
    fused_joined: ClassVar[tuple[str, ...]] = ()
    fused_products: ClassVar[tuple[str, ...]] = ()
    fused_recompute: bool | None = None
    fused_checkpoints: ClassVar[bool] = False

    def why_unfused(self, sharded: bool = False) -> str | None:
        """Why the unfused forward runs at present, or None.

        Args:
            sharded: FSDP2 gathers the parameters before the forward; that they are not plain tensors now is no reason.
        """
        for path, kind, wanted in self.fused_layout:
            layer, name = find(self, path), ".".join(path)
            if layer is None:
                return f"{name} is gone"
            if type(layer) is not kind:
                return f"{name} is now a {type(layer).__name__}, and was a {kind.__name__}"
            inside = sum(other[:-1] == path for other, *_ in self.fused_layout)
            if len(layer._modules) != inside:
                return f"{name} now has {len(layer._modules)} layers in it, and had {inside}"
            # More may have been added since: what was there counts.
            now = [(key, getattr(layer, key, "gone"), was) for key, was in wanted]
            changed = [(key, value, was) for key, value, was in now if type(value) is not type(was) or value != was]
            if changed:
                return "; ".join(f"{name}.{key} is now {value}, and was {was}" for key, value, was in changed)
            if reason := hooked(layer):
                return f"{name} {reason}"
            if not sharded and (reason := unreadable(layer)):
                return f"{name}.{reason}"
        return None if sharded else unreadable(self)

    def fused_weights(self) -> list[Tensor] | None:
        """The weights that the fused forward reads, or None if the unfused one is to run now, as why_unfused says."""
        if torch.compiler.is_compiling():
            return None if self.why_unfused() is not None else []
        weights = unchanged(self)
        if weights is None and self.why_unfused() is None:
            found = ((path, find(self, path)) for path, *_ in self.fused_layout)
            remember(self, [(path, layer) for path, layer in found if layer is not None])
            weights = unchanged(self) or []
        return weights

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        forget(self)  # recordings hold on to the weights they read
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def compute(self, library: ModuleType | None, *inputs: Any) -> Tensor:
        """The forward by the functions of a library, dico_kernels.ops or reference.functional; None chooses."""
        raise NotImplementedError


def recomputing(module: Fused, library: ModuleType) -> dict[str, bool]:
    """What a branch of the module is called with beside its formula's arguments, by the functions of a library."""
    return {"recompute": True} if module.fused_recompute and library is ops else {}


def choose(library: ModuleType | None, x: Tensor) -> ModuleType:
    """The library given, else the ops, else plain PyTorch where x is not what ops accept."""
    if library is not None:
        return library
    accepted = x.ndim == 4 and type(x) in _PLAIN_TENSORS and x.dtype in DTYPES
    return ops if accepted else functional


def paired(x: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
    """Both as x * conditioning would take them: of one dtype, and one image repeated for many conditions."""
    x, conditioning = promoted(x, conditioning)
    if x.ndim == 4 and conditioning.ndim == 2 and x.shape[0] == 1 and conditioning.shape[0] != 1:
        x = x.expand(conditioning.shape[0], -1, -1, -1)
    return x, conditioning


def promoted(x: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that x * conditioning has: ops want one, and PyTorch would promote."""
    if x.dtype == conditioning.dtype:
        return x, conditioning
    dtype = torch.promote_types(x.dtype, conditioning.dtype)
    return x.to(dtype), conditioning.to(dtype)
