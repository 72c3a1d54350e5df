"""Every entry of the kernel interface that Triton runs, under one roof for the table of backends."""

from dico_kernels.kernels.adaln import (
    adaln_modulate,
    adaln_modulate_backward,
    gated_residual,
    gated_residual_adaln,
    gated_residual_adaln_backward,
    gated_residual_backward,
)
from dico_kernels.kernels.channel import channel_affine, channel_dots, channel_sums
from dico_kernels.kernels.depthwise import depthwise, depthwise_backward
from dico_kernels.kernels.pixel_shuffle import pixel_shuffle_skip, pixel_shuffle_skip_backward

__all__ = [
    "adaln_modulate",
    "adaln_modulate_backward",
    "channel_affine",
    "channel_dots",
    "channel_sums",
    "depthwise",
    "depthwise_backward",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_adaln_backward",
    "gated_residual_backward",
    "pixel_shuffle_skip",
    "pixel_shuffle_skip_backward",
]
