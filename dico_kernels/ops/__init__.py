"""Fused ops: each a torch.library op with gradients, fakes and autocast, on whichever backend can run it.

Also callable as ``torch.ops.dico_kernels.*``, where an op that keeps statistics for its backward returns them too.
"""

from dico_kernels.ops import convolution as convolution  # what models need of it is in nn: not a public op
from dico_kernels.ops._flops import register_formulas
from dico_kernels.ops.adaln import adaln_modulate, gated_residual, gated_residual_adaln
from dico_kernels.ops.block import conv_half, ffn_half
from dico_kernels.ops.cca import cca_gate
from dico_kernels.ops.depthwise import depthwise_adaln, pointwise_depthwise_gelu
from dico_kernels.ops.fcdm_block import fcdm_block
from dico_kernels.ops.grn import grn
from dico_kernels.ops.pixel_shuffle import pixel_shuffle_skip

register_formulas()

__all__ = [
    "adaln_modulate",
    "cca_gate",
    "conv_half",
    "depthwise_adaln",
    "fcdm_block",
    "ffn_half",
    "gated_residual",
    "gated_residual_adaln",
    "grn",
    "pixel_shuffle_skip",
    "pointwise_depthwise_gelu",
]
