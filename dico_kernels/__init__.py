"""Fused kernels for convolutional diffusion models, behind drop-in PyTorch modules."""

from dico_kernels import nn, ops
from dico_kernels.checkpoints import LoadReport, load_checkpoint
from dico_kernels.explain import explain
from dico_kernels.fuse import fuse, unfuse
from dico_kernels.info import build_info
from dico_kernels.models import create_model, model_names
from dico_kernels.ops._backends import BackendError, backend
from dico_kernels.packing import pack, unpack
from dico_kernels.sampling import GraphRunner
from dico_kernels.tuning import tune, untune
from dico_kernels.version import __version__

__all__ = [
    "BackendError",
    "GraphRunner",
    "LoadReport",
    "__version__",
    "backend",
    "build_info",
    "create_model",
    "explain",
    "fuse",
    "load_checkpoint",
    "model_names",
    "nn",
    "ops",
    "pack",
    "tune",
    "unfuse",
    "unpack",
    "untune",
]
