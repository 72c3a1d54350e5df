"""Fused kernels for convolutional diffusion models, behind drop-in PyTorch modules."""

from dico_kernels.checkpoints import LoadReport, load_checkpoint
from dico_kernels.info import build_info
from dico_kernels.models import create_model, model_names
from dico_kernels.version import __version__

__all__ = ["LoadReport", "__version__", "build_info", "create_model", "load_checkpoint", "model_names"]
