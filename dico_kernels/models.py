"""Models by name."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from dico_kernels.fuse import fuse
from dico_kernels.reference import dico, dit, fcdm
from dico_kernels.reference.base import Denoiser

_FAMILIES: list[tuple[type[Denoiser], dict[str, dict[str, Any]]]] = [
    (dico.DiCo, dico.VARIANTS),
    (fcdm.FCDM, fcdm.VARIANTS),
    (dit.DiT, dit.VARIANTS),
]
_VARIANTS: dict[str, tuple[type[Denoiser], dict[str, Any]]] = {
    name: (family, config) for family, variants in _FAMILIES for name, config in variants.items()
}


def model_names() -> list[str]:
    """Every name create_model accepts: DiCo-S/B/L/XL/H, FCDM-S/B/L/XL, DiT-S/B/L/XL (/2)."""
    return list(_VARIANTS)


def create_model(name: str, fused: bool = True, **overrides: Any) -> Denoiser:
    """A model of a published size, at its published initialisation.

    Args:
        name: one of model_names().
        fused: run its blocks fused (dico_kernels.fuse); keys, values and results are the same. DiT has nothing to fuse.
        **overrides: constructor arguments that replace the published ones: in_channels, num_classes, learn_sigma,
            hidden_size, depth, mlp_ratio, class_dropout_prob; for DiT also input_size (32 for 256-pixel images, 64
            for 512), num_heads and patch_size.

    Returns:
        The model in float32, in training mode, on torch's default device; make it under ``torch.device("meta")`` or
        ``torch.device("cuda")`` to place it elsewhere.

    Raises:
        ValueError: an unknown name, or a value an argument does not accept.
        TypeError: an override the model does not have.

    Example:
        >>> model = create_model("DiCo-XL", num_classes=1000, in_channels=4, learn_sigma=True)
    """
    if name not in _VARIANTS:
        close = difflib.get_close_matches(str(name), _VARIANTS, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"name={name!r}: unknown model{hint}; accepted: {', '.join(_VARIANTS)}")
    family, config = _VARIANTS[name]
    accepted = [p for p in inspect.signature(family.__init__).parameters if p != "self"]
    if unknown := sorted(set(overrides) - set(accepted)):
        raise TypeError(f"{name} has no argument {', '.join(unknown)}; accepted: {', '.join(accepted)}")
    model = family(**{**config, **overrides})
    return fuse(model) if fused else model
