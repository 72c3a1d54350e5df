"""The roofline: the least time a forward pass can take on a device whose two ceilings are known.

Bytes assume that LayerNorm, modulation, channel scale, GELU, gate and residual are all fused into the kernels that
touch the tensor anyway, which no library does today: (10 + 2r)C elements a pixel and DiCo block with feed-forward
ratio r, 11C for an FCDM block of ratio 3, 22D a token and DiT block of ratio 4, and each convolution between them read
and written once. Weights are read once a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sized
from dataclasses import asdict, dataclass
from typing import cast

import torch
from torch import nn

from dico_kernels.reference import FCDM, DiCo, DiT
from dico_kernels.reference.base import Denoiser


@dataclass(frozen=True)
class Ceiling:
    """What a device reaches on plain work: matrix multiplication in flop/s (two a MAC), copying in bytes/s."""

    flops: float
    bytes: float

    def seconds(self, macs: float, moved: float) -> float:
        """The least time for this many MACs and bytes."""
        return max(2 * macs / self.flops, moved / self.bytes)

    def best(self, other: Ceiling) -> Ceiling:
        """The better of two measurements, rate by rate."""
        return Ceiling(max(self.flops, other.flops), max(self.bytes, other.bytes))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def _blocks(stage: object) -> int:
    return len(cast(Sized, stage))


def activation_elements(model: Denoiser, height: int, width: int) -> int:
    """Elements that one image's forward pass must read and write, weights apart.

    Args:
        model: a reference DiCo, FCDM or DiT (the meta device will do).
        height: H of the latent.
        width: W of the latent.
    """
    pixels = height * width
    if isinstance(model, DiT):
        d, p = model.pos_embed.shape[-1], model.patch_size
        tokens = pixels // p**2
        ends = tokens * 2 * d + pixels * (model.in_channels + model.out_channels)
        return 22 * d * tokens * _blocks(model.blocks) + ends
    if not isinstance(model, (DiCo, FCDM)):
        raise ValueError(f"model is a {type(model).__name__}: expected a DiCo, FCDM or DiT")
    if isinstance(model, DiCo):
        d = model.x_embedder.proj.out_channels
        first = next(m for m in model.modules() if type(m).__name__ == "DiCoBlock")
        ratio = cast(nn.Conv2d, first.conv4).out_channels / cast(nn.Conv2d, first.conv4).in_channels
        per_channel, last = int(10 + 2 * ratio), 2 * d
    else:
        d = model.x_embedder.out_channels
        per_channel, last = 11, d
    stages = [
        (d, pixels, model.encoder_level_1),
        (2 * d, pixels // 4, model.encoder_level_2),
        (4 * d, pixels // 16, model.latent),
        (2 * d, pixels // 4, model.decoder_level_2),
        (last, pixels, model.decoder_level_1),
    ]
    total = sum(per_channel * c * area * _blocks(stage) for c, area, stage in stages)
    total += pixels * (d + d // 2) + pixels // 4 * (2 * d + d)  # down: read C, write C/2
    total += pixels // 16 * (4 * d + 8 * d) + pixels // 4 * (2 * d + 4 * d)  # up: read C, write 2C
    total += pixels // 4 * (2 * d + 2 * d + 2 * d) + pixels * (d + d + last)  # skips: up, skip, out
    total += pixels * (model.in_channels + d) + pixels * (last + model.out_channels)
    if isinstance(model, FCDM):
        total += pixels * 2 * d  # output_layer
    return total


def bytes_moved(model: Denoiser, height: int, width: int, batch: int, element_size: int) -> int:
    """Bytes of one forward pass: every image's activations, and the weights once."""
    weights = sum(p.numel() for n, p in model.named_parameters() if "embedding_table" not in n)
    return element_size * (batch * activation_elements(model, height, width) + weights)


@dataclass(frozen=True)
class _OpWork:
    """What an op must do for each pixel, in channels C and inner channels K = inner * C.

    Attributes:
        forward: elements read and written, (C, K) -> number, with everything elementwise fused.
        backward: the same for the backward pass; what forward need not keep is recomputed on the way.
        products: elements of the weights that matrix products use, (C, K) -> number: also its MACs a pixel.
        inner: K over C.
    """

    forward: Callable[[int, int], int]
    backward: Callable[[int, int], int]
    products: Callable[[int, int], int]
    inner: int = 1


def _none(c: int, k: int) -> int:
    del c, k
    return 0


# Backward passes: a gradient of a product's input reads dy and writes dx, one of its weight reads both its input and
# dy; what has a reduction over the image in its middle (channel attention, GRN) reads its inputs twice.
_OP_WORK = {
    "adaln_modulate": _OpWork(lambda c, k: 2 * c, lambda c, k: 3 * c, _none),
    "gated_residual": _OpWork(lambda c, k: 3 * c, lambda c, k: 3 * c, _none),
    "gated_residual_adaln": _OpWork(lambda c, k: 4 * c, lambda c, k: 6 * c, _none),
    "pointwise_depthwise_gelu": _OpWork(lambda c, k: c + 3 * k, lambda c, k: 2 * c + 5 * k, lambda c, k: c * k),
    "cca_gate": _OpWork(lambda c, k: 3 * c, lambda c, k: 4 * c, _none),
    "depthwise_adaln": _OpWork(lambda c, k: 2 * c, lambda c, k: 3 * c, _none),
    "grn": _OpWork(lambda c, k: 3 * c, lambda c, k: 5 * c, _none),
    "pixel_shuffle_skip": _OpWork(lambda c, k: 2 * c, lambda c, k: 4 * c, lambda c, k: c * c),
    "conv_half": _OpWork(lambda c, k: 3 * c + 4 * k, lambda c, k: 6 * c + 7 * k, lambda c, k: 2 * c * k),
    "ffn_half": _OpWork(lambda c, k: 3 * c + 2 * k, lambda c, k: 6 * c + 5 * k, lambda c, k: 2 * c * k, 2),
    "fcdm_block": _OpWork(lambda c, k: 5 * c + 2 * k, lambda c, k: 11 * c + 8 * k, lambda c, k: 2 * c * k, 3),
}


def op_work(op: str, batch: int, channels: int, side: int, backward: bool, element_size: int) -> tuple[int, int]:
    """(MACs of matrix products, least bytes) of a fused op on (batch, channels, side, side) images.

    Depthwise taps and per-sample vectors count for nothing: neither binds. With ``backward``: of forward and backward.
    Weights of products are read by forward, read again and their gradients written by backward.
    """
    work, pixels = _OP_WORK[op], batch * side**2
    c, k = channels, work.inner * channels
    elements = pixels * work.forward(c, k) + work.products(c, k)
    macs = pixels * work.products(c, k)
    if backward:
        elements += pixels * work.backward(c, k) + 2 * work.products(c, k)
        macs *= 3
    return macs, elements * element_size


# A block's branches, and its weights that work on vectors of a sample, over C squared: channel attention and the head.
_BLOCKS: dict[str, tuple[tuple[str, ...], int]] = {
    "dico_block": (("conv_half", "ffn_half"), 7),
    "fcdm_block": (("fcdm_block",), 3),
}


def block_bytes(op: str, batch: int, channels: int, side: int, backward: bool, element_size: int) -> int:
    """Least bytes of a whole block with its conditioning head: those of its branches, and the other weights."""
    branches, square = _BLOCKS[op]
    passes = 3 if backward else 1
    moved = sum(op_work(branch, batch, channels, side, backward, element_size)[1] for branch in branches)
    return moved + passes * square * channels**2 * element_size


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> Ceiling:
    """Measure both ceilings now: the best of two matrix shapes, and a large device-to-device copy.

    A second or two. Random data: zeros can run faster than anything real.
    """
    gpu = device.type == "cuda"
    shapes = [(8192, 8192, 8192), (65536, 1664, 832)] if gpu else [(4096, 1024, 1024), (4096, 512, 256)]
    rate = 0.0
    for m, n, k in shapes:
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        seconds = _best_seconds(lambda a=a, b=b: nn.functional.linear(a, b), device)  # type: ignore[misc]
        rate = max(rate, 2 * m * n * k / seconds)
    source = torch.randn(2**29 if gpu else 2**25, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device)
    return Ceiling(rate, 2 * source.nbytes / seconds)


def _best_seconds(run: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats):
        synchronise()
        start = time.perf_counter()
        run()
        synchronise()
        times.append(time.perf_counter() - start)
    return min(times)
