"""Pure PyTorch: the definition of every op and model that the fused code is tested against.

Installed as ``dico_kernels.reference``.
"""

from .dico import DiCo, DiCoBlock
from .dit import DiT, DiTBlock
from .fcdm import FCDM, FCDMBlock

__all__ = ["FCDM", "DiCo", "DiCoBlock", "DiT", "DiTBlock", "FCDMBlock"]
