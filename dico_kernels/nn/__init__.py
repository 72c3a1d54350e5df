"""Drop-in modules on the fused ops: the constructors and keys of what they replace."""

from dico_kernels.nn.adaln import AdaLNModulation, FCDMFinalLayer, FinalLayer
from dico_kernels.nn.block import DiCoBlock, FCDMBlock
from dico_kernels.nn.cca import CompactChannelAttention
from dico_kernels.nn.grn import GlobalResponseNorm
from dico_kernels.nn.pixel_shuffle import Downsample, SkipUpsample

__all__ = [
    "AdaLNModulation",
    "CompactChannelAttention",
    "DiCoBlock",
    "Downsample",
    "FCDMBlock",
    "FCDMFinalLayer",
    "FinalLayer",
    "GlobalResponseNorm",
    "SkipUpsample",
]
