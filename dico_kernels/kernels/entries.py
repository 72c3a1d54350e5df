"""Every entry of the kernel interface that Triton runs, under one roof for the table of backends."""

from dico_kernels.kernels.adaln import (
    adaln_modulate,
    adaln_modulate_backward,
    adaln_modulate_backward_residual,
    gate_gradient,
    gated_residual,
    gated_residual_adaln,
    gated_residual_adaln_backward,
    gated_residual_backward,
)
from dico_kernels.kernels.block import conv_half_forward, fcdm_block_forward, ffn_half_forward
from dico_kernels.kernels.channel import channel_affine, channel_dots, channel_sums
from dico_kernels.kernels.depthwise import depthwise, depthwise_backward
from dico_kernels.kernels.grn import grn_rescale, grn_scale, grn_scale_backward
from dico_kernels.kernels.pixel_shuffle import pixel_shuffle_skip, pixel_shuffle_skip_backward
from dico_kernels.kernels.pointwise import gelu, gelu_backward, pointwise
from dico_kernels.kernels.sums import add_up
from dico_kernels.kernels.vectors import channel_attention, channel_attention_backward, conditioning

__all__ = [
    "adaln_modulate",
    "adaln_modulate_backward",
    "adaln_modulate_backward_residual",
    "add_up",
    "channel_affine",
    "channel_attention",
    "channel_attention_backward",
    "channel_dots",
    "channel_sums",
    "conditioning",
    "conv_half_forward",
    "depthwise",
    "depthwise_backward",
    "fcdm_block_forward",
    "ffn_half_forward",
    "gate_gradient",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_adaln_backward",
    "gated_residual_backward",
    "gelu",
    "gelu_backward",
    "grn_rescale",
    "grn_scale",
    "grn_scale_backward",
    "pixel_shuffle_skip",
    "pixel_shuffle_skip_backward",
    "pointwise",
]
