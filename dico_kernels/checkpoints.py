"""Loading published checkpoints, safely and completely or not at all."""

from __future__ import annotations

import argparse
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_LISTED = 8  # keys shown a kind of mismatch; the count is always whole
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


class LoadReport(NamedTuple):
    """What load_checkpoint did.

    Attributes:
        source: "ema", "model", or "state_dict" for a file or mapping that is itself the weights.
        missing: keys of the model that the checkpoint lacks (empty when strict).
        unexpected: keys of the checkpoint that the model lacks (empty when strict).
    """

    source: str
    missing: list[str]
    unexpected: list[str]


def load_checkpoint(
    model: nn.Module,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    prefer_ema: bool = True,
    strict: bool = True,
) -> LoadReport:
    """Copy a checkpoint's weights into the model.

    Everything is read and compared before the first weight is written: a failure leaves the model as it was.

    Args:
        model: any module; its parameters keep their dtype, device and identity.
        path_or_state_dict: a ``.safetensors`` file; a ``torch.save`` file (any other suffix); or the loaded mapping.
            A mapping may be the weights themselves or a training checkpoint as DiT's and DiCo's code writes them,
            {"model": ..., "ema": ..., "opt": ..., "args": ...}. Prefixes that wrappers add to every key ("module.",
            "_orig_mod.") are removed, from the model's own keys as well.
        prefer_ema: of a training checkpoint, take "ema" when it is there, else "model".
        strict: refuse missing and unexpected keys. A wrong shape, or an integer or complex tensor for a
            floating one, is always refused.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is truncated, of another format or holds code; a mapping without weights; keys or
            shapes that differ from the model's (one error lists all kinds); a model on the meta device.

    ``torch.save`` files are unpickled with ``weights_only=True``, allowing tensors, containers and
    ``argparse.Namespace`` (which the published training code stores) and nothing else: a checkpoint cannot run code.
    """
    if isinstance(path_or_state_dict, Mapping):
        origin, content = "the mapping", path_or_state_dict
    else:
        path = Path(path_or_state_dict)
        origin, content = str(path), _read(path)
    source, weights = _select(content, prefer_ema, origin)
    weights = _strip_prefixes(weights)
    # A compiled or parallel model has the prefixes too; what stands behind them is compared.
    own = _strip_prefixes(model.state_dict())
    missing = [k for k in own if k not in weights]
    unexpected = [k for k in weights if k not in own]
    reshaped = [
        f"{k} (checkpoint {tuple(v.shape)}, model {tuple(own[k].shape)})"
        for k, v in weights.items()
        if k in own and v.shape != own[k].shape
    ]
    wrong_kind = [
        f"{k} (checkpoint {v.dtype}, model {own[k].dtype})"
        for k, v in weights.items()
        if k in own and own[k].is_floating_point() != v.is_floating_point()
    ]
    refused = {"wrongly shaped": reshaped, "of the wrong kind": wrong_kind}
    if strict:
        refused = {"missing": missing, "unexpected": unexpected, **refused}
    if any(refused.values()):
        lines = [f"  {kind} ({len(keys)}): {_listing(keys)}" for kind, keys in refused.items() if keys]
        raise ValueError(
            f"{origin} ({source}) does not fit {type(model).__name__} ({len(own)} tensors); nothing was loaded:\n"
            + "\n".join(lines)
            + "\nMake the model with the checkpoint's variant and settings (num_classes, in_channels, learn_sigma, "
            "input_size)."
        )
    homeless = [k for k, v in own.items() if v.is_meta]
    if homeless:
        raise ValueError(
            f"{type(model).__name__} has {len(homeless)} tensors on the meta device, which hold no values "
            f"({_listing(homeless)}); make it on a real device, or call model.to_empty(device=...) first"
        )
    with torch.no_grad():
        for key, value in own.items():  # state_dict shares memory with the model
            if key in weights:
                value.copy_(weights[key])
    return LoadReport(source, missing, unexpected)


def _listing(keys: list[str]) -> str:
    more = f", and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: expected a .safetensors file or one torch.save wrote")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete .safetensors file ({error})") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mmap: of {"model", "ema", "opt"} only what is used is read. Only zip archives can be mapped.
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=True if zipfile.is_zipfile(path) else None
            )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        first = str(error).strip().splitlines()
        why = first[0] if first else type(error).__name__
        raise ValueError(
            f"{path}: not a complete torch.save file of weights ({why}). Accepted: tensors, containers and "
            "argparse.Namespace; other pickled objects are refused, because loading them can run code"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a mapping of weights")
    return content


def _select(content: Mapping[str, Any], prefer_ema: bool, origin: str) -> tuple[str, dict[str, Tensor]]:
    """The weights in a training checkpoint, or the mapping itself."""
    order = ("ema", "model") if prefer_ema else ("model", "ema")
    source = next((k for k in order if isinstance(content.get(k), Mapping) and content[k]), "state_dict")
    weights = content if source == "state_dict" else content[source]
    if not weights or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()):
        held = ", ".join(list(map(str, content))[:_LISTED]) or "nothing"
        raise ValueError(
            f"{origin}: holds {held}; expected parameter names with tensors, or a training checkpoint with "
            "'model' or 'ema'"
        )
    return source, dict(weights)


def _strip_prefixes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that wrappers put before every key."""
    for _ in _WRAPPER_PREFIXES:
        for prefix in _WRAPPER_PREFIXES:
            if all(k.startswith(prefix) for k in weights):
                weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights
