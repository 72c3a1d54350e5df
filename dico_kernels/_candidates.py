"""Which modules might be fused: by their structure, which nominates and proves nothing.

Names and shapes of inner layers decide. What only forward code knows (GELU's form, chunk order, 1 + scale, most eps)
is for the probe.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from dico_kernels.nn._fused import Fused, find, hooked, settings, unreadable
from dico_kernels.nn.adaln import FusedFinalLayer
from dico_kernels.nn.block import FusedDiCoBlock, FusedFCDMBlock, FusedPlainDiCoBlock
from dico_kernels.nn.grn import LAYOUTS, FusedGlobalResponseNorm
from dico_kernels.nn.pixel_shuffle import FusedUShape
from dico_kernels.reference import FCDM, DiCo
from dico_kernels.reference.functional import GRN_EPS, LN_EPS

CALLED = "adaLN_modulation"  # whatever it is, its forward is called, so it is nobody's business here


class UnfitError(Exception):
    """Why a nominated module is left alone.

    Attributes:
        family: what it resembles.
    """

    family = ""


@dataclass(frozen=True)
class Candidate:
    """A module nominated for fusion.

    Attributes:
        mixin: the fused forward.
        options: the mixin's class attributes for this module, sorted by name; hashable.
        channels: C of its input.
        chunks: how many vectors adaLN_modulation makes; 0 without conditioning.
        image_last: input is (N, H, W, C).
        residual: the output is the input plus something.
        known: a class of this package, which needs no proof.
    """

    mixin: type[Fused]
    channels: int
    options: tuple[tuple[str, Any], ...] = ()
    chunks: int = 0
    image_last: bool = False
    residual: bool = True
    known: bool = False


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, or what it was before fuse()."""
    return getattr(type(module), "fused_original", None) or type(module)


def _convolution(block: nn.Module, path: str, inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> None:
    conv = find(block, tuple(path.split(".")))
    if type(conv) is not nn.Conv2d:
        raise UnfitError(f"{path} is a {type(conv).__name__}, not a plain nn.Conv2d")
    wanted = (inputs, outputs, (kernel, kernel), groups)
    got = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups)
    if got != wanted:
        raise UnfitError(f"{path} has (inputs, outputs, kernel, groups) {got}, not {wanted}")
    padding = (0, 0) if conv.padding == "valid" else conv.padding
    same = (kernel // 2, kernel // 2)
    if conv.stride != (1, 1) or conv.dilation != (1, 1) or padding not in (same, "same"):
        raise UnfitError(f"{path} has stride {conv.stride}, dilation {conv.dilation}, padding {conv.padding}")
    if conv.padding_mode != "zeros" and kernel > 1:
        raise UnfitError(f"{path} pads with {conv.padding_mode!r}, not with zeros")


def _inner(block: nn.Module, called: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Descendants that a fused forward bypasses, with their paths."""
    for name, child in block._modules.items():
        if child is None or name in called:
            continue
        yield (name,), child
        for path, deeper in _inner(child, ()):
            yield (name, *path), deeper


def _layout(block: nn.Module, known: set[str], called: tuple[str, ...] = (CALLED,)) -> tuple[Any, ...]:
    """Types of all inner layers; UnfitError where bypassing one would skip something."""
    layout = []
    for path, layer in [((), block), *_inner(block, called)]:
        name = ".".join(path)
        if path and (reason := hooked(layer)):
            raise UnfitError(f"{name} {reason}")
        for key in [*layer._parameters, *layer._buffers]:
            full = f"{name}.{key}" if name else key
            if full not in known and layer.__dict__["_parameters"].get(key, 0) is not None:
                raise UnfitError(f"{full} is a tensor that the fused form does not know")
        if reason := unreadable(layer):
            raise UnfitError(f"{name}.{reason}" if name else reason)
        if path:
            layout.append((path, type(layer), settings(layer)))
    return tuple(layout)


def _weights(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def _eps(module: nn.Module | None, default: float) -> float:
    """A norm's own eps where it has one, else the published."""
    eps = getattr(module, "eps", None)
    return float(eps) if isinstance(eps, float) else default


def _has(module: nn.Module, *names: str) -> bool:
    return all(module._modules.get(name) is not None for name in names)


def _norms(block: nn.Module, known: tuple[str, ...]) -> list[str]:
    """Direct children that are not among the known and are norms by their class's name."""
    found = [(name, child) for name, child in block._modules.items() if child is not None and name not in known]
    return [name for name, child in found if "norm" in type(child).__name__.lower()]


_DICO = ("conv1", "conv2", "conv3", "conv4", "conv5", "ca")


def _dico(block: nn.Module) -> Candidate | None:
    if not _has(block, *_DICO):
        return None
    conv1, conv4 = block._modules["conv1"], block._modules["conv4"]
    c, ffn = getattr(conv1, "in_channels", 0), getattr(conv4, "out_channels", 0)
    _convolution(block, "conv1", c, c)
    _convolution(block, "conv2", c, c, kernel=3, groups=c)
    _convolution(block, "conv3", c, c)
    _convolution(block, "conv4", c, ffn)
    _convolution(block, "conv5", ffn, c)
    ca = block._modules["ca"]
    assert ca is not None
    kinds = [type(m) for m in ca._modules.values()]
    if type(ca) is not nn.Sequential or kinds != [nn.AdaptiveAvgPool2d, nn.Conv2d, nn.Sigmoid]:
        raise UnfitError(f"ca is a {type(ca).__name__} of {[k.__name__ for k in kinds]}: not pool, conv, sigmoid")
    _convolution(block, "ca.1", c, c)
    norms = _norms(block, (*_DICO, CALLED))
    eps = tuple(_eps(find(block, (name,)), LN_EPS) for name in norms) if len(norms) == 2 else (LN_EPS, LN_EPS)
    known = _weights(*_DICO[:5], "ca.1")
    if _has(block, CALLED):
        options = {"fused_layout": _layout(block, known), "fused_eps": eps}
        return Candidate(FusedDiCoBlock, c, _options(block, FusedDiCoBlock, options), chunks=6)
    if len(norms) != 2:
        raise UnfitError(f"has no {CALLED}, and {len(norms)} norms {norms} where two would stand for it")
    layout = _layout(block, known | _weights(*norms))
    for name in norms:
        for key, p in block._modules[name]._parameters.items():  # type: ignore[union-attr]
            if p is not None and p.numel() != c:
                raise UnfitError(f"{name}.{key} has shape {tuple(p.shape)}, not ({c},)")
    options = {"fused_layout": layout, "fused_eps": eps, "fused_norms": tuple((name,) for name in norms)}
    return Candidate(FusedPlainDiCoBlock, c, _options(block, FusedPlainDiCoBlock, options))


_FCDM = ("dwconv", "pwconv1", "grn", "pwconv2", CALLED)


def _fcdm(block: nn.Module) -> Candidate | None:
    if not _has(block, *_FCDM):
        return None
    pwconv1, grn = block._modules["pwconv1"], block._modules["grn"]
    assert grn is not None
    c, inner = getattr(pwconv1, "in_channels", 0), getattr(pwconv1, "out_channels", 0)
    _convolution(block, "dwconv", c, c, kernel=7, groups=c)
    _convolution(block, "pwconv1", c, inner)
    _convolution(block, "pwconv2", inner, c)
    names = _grn_parameters(grn)
    if names is None:
        raise UnfitError(f"grn is a {type(grn).__name__}, whose gamma and beta are not recognised")
    norms = _norms(block, _FCDM)
    ln = _eps(find(block, (norms[0],)), LN_EPS) if len(norms) == 1 else LN_EPS
    known = _weights("dwconv", "pwconv1", "pwconv2") | {f"grn.{name}" for name in names}
    options = {
        "fused_layout": _layout(block, known),
        "fused_eps": (ln, _eps(grn, GRN_EPS)),
        "fused_affine": names,
    }
    return Candidate(FusedFCDMBlock, c, _options(block, FusedFCDMBlock, options), chunks=3)


def _grn_parameters(module: nn.Module) -> tuple[str, str] | None:
    """Names of gamma and beta in any of the published layouts, or None."""
    for names, _, _ in LAYOUTS.values():
        if list(module._parameters) != list(names) or module._modules or module._buffers:
            continue
        shapes = [tuple(p.shape) for p in module._parameters.values() if p is not None]
        if len(shapes) == 2 and shapes[0] == shapes[1] and _channels(shapes[0]):
            return names
    return None


def _channels(shape: tuple[int, ...]) -> int:
    """C of a (C,), (1, C, 1, 1) or (1, 1, 1, C) parameter, else 0."""
    c = max(shape, default=0)
    return c if shape in ((c,), (1, c, 1, 1), (1, 1, 1, c)) else 0


def _grn(module: nn.Module) -> Candidate | None:
    names = _grn_parameters(module)
    called = original_class(module).__name__.lower()
    if names is None or not ("grn" in called or "responsenorm" in called):
        return None
    shape = tuple(module._parameters[names[0]].shape)  # type: ignore[union-attr]
    # (C,) says nothing of x's layout; timm's module keeps the index of its channels.
    last = (len(shape) == 1 and getattr(module, "channel_dim", -1) == -1) or (shape[-1] > 1 and len(shape) == 4)
    options = {"fused_eps": _eps(module, GRN_EPS), "fused_affine": names, "fused_channels_last": last}
    return Candidate(
        FusedGlobalResponseNorm,
        _channels(shape),
        _options(module, FusedGlobalResponseNorm, options),
        image_last=last,
        residual=False,
    )


def _final(layer: nn.Module) -> Candidate | None:
    """adaLN and an output convolution: two children that count, one of them a Conv2d."""
    if not _has(layer, CALLED):
        return None
    convs = [name for name, child in layer._modules.items() if isinstance(child, nn.Conv2d)]
    weighty = [n for n, m in layer._modules.items() if m is not None and next(m.parameters(), None) is not None]
    if len(convs) != 1 or set(weighty) != {convs[0], CALLED}:
        return None
    conv = layer._modules[convs[0]]
    norms = _norms(layer, (convs[0], CALLED))
    options = {
        "fused_layout": _layout(layer, set(), (CALLED, convs[0])),
        "fused_eps": _eps(find(layer, (norms[0],)), LN_EPS) if len(norms) == 1 else LN_EPS,
        "fused_output": convs[0],
    }
    return Candidate(
        FusedFinalLayer,
        conv.in_channels,  # type: ignore[union-attr,arg-type]
        _options(layer, FusedFinalLayer, options),
        chunks=2,
        residual=False,
    )


def _options(module: nn.Module, mixin: type[Fused], options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The mixin's class attributes, with the names of the inputs where they are not the mixin's own."""
    own = original_class(module).forward
    names = tuple(inspect.signature(own).parameters)[1:]
    kinds = [p.kind for p in inspect.signature(own).parameters.values()][1:]
    if len(names) < mixin.fused_arity or any(k is not inspect.Parameter.POSITIONAL_OR_KEYWORD for k in kinds):
        raise UnfitError(f"its forward takes {names}, not {mixin.fused_arity} inputs")
    required = [p for p in inspect.signature(own).parameters.values() if p.default is inspect.Parameter.empty][1:]
    if len(required) > mixin.fused_arity:
        raise UnfitError(f"its forward needs {tuple(p.name for p in required)}, not {mixin.fused_arity} inputs")
    options["fused_inputs"] = names
    return tuple(sorted(options.items()))


def _model(model: nn.Module) -> Candidate | None:
    """Our own definitions alone: what is between the blocks of anybody else's model is in its forward."""
    cls = original_class(model)
    if cls not in (DiCo, FCDM) or "join" in model.__dict__:
        return None
    return Candidate(FusedUShape, 0, _options(model, FusedUShape, {}), known=True)


_FAMILIES: dict[str, Callable[[nn.Module], Candidate | None]] = {
    FusedDiCoBlock.fused_family: _dico,
    FusedFCDMBlock.fused_family: _fcdm,
    FusedGlobalResponseNorm.fused_family: _grn,
    FusedFinalLayer.fused_family: _final,
    FusedUShape.fused_family: _model,
}


def nominate(module: nn.Module) -> Candidate | None:
    """A candidate, or None where the module resembles nothing that has a fused form.

    Raises:
        UnfitError: it resembles one and cannot be one; says why.
    """
    for family, recognise in _FAMILIES.items():
        try:
            candidate = recognise(module)
            if candidate is not None and "forward" in module.__dict__:
                raise UnfitError("has a forward of its own on the instance")
        except UnfitError as error:
            error.family = family
            raise
        if candidate is not None:
            return candidate
    return None
