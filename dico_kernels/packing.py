"""pack and unpack: weights of fused blocks as oneDNN blocks them, for sampling on a CPU.

Given a plain weight, oneDNN deals with its layout in every product: 5 to 20% of the time at the shapes of these models.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor, nn

from dico_kernels import _linear
from dico_kernels.nn._fused import Fused

Model = TypeVar("Model", bound=nn.Module)


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """The weights that fused blocks multiply by."""
    for module in model.modules():
        if isinstance(module, Fused) and module.why_unfused() is None:
            yield from (module.get_submodule(name).get_parameter("weight") for name in module.fused_products)


def pack(model: Model) -> Model:
    """Keep the weights of fused 1x1 convolutions in oneDNN's own layout too, for inference on a CPU.

    Costs the memory of these weights once more. Forward passes without gradients use the packed weights; everything
    else, training, ``state_dict`` and copies of the model among it, sees the originals, which stay as they are. A
    weight that was changed or moved since is used unpacked, until packed anew. What PyTorch does not count as a change,
    writing through ``.data`` or from outside PyTorch, needs another call of pack.

    Args:
        model: a fused model, or one built from ``dico_kernels.nn``; float32 or bfloat16. On other devices than the
            CPU there is nothing to pack.

    Returns:
        The model itself.

    Warns:
        RuntimeWarning: nothing could be packed.
    """
    if not sum([_linear.pack(weight) for weight in _weights(model)]):
        warnings.warn(
            "nothing was packed: expected fused blocks (call dico_kernels.fuse before) with float32 or bfloat16 "
            "weights on a CPU, in a torch with oneDNN",
            RuntimeWarning,
            stacklevel=2,
        )
    return model


def unpack(model: Model) -> Model:
    """Forget the packed weights of a model and free their memory.

    Returns:
        The model itself.
    """
    for parameter in model.parameters():
        _linear.unpack(parameter)
    return model


__all__ = ["pack", "unpack"]
