"""What is measured: each preset is a list of arenas, within which every contender takes turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PRESETS: dict[str, str] = {
    "auto": "cpu, or gpu where torch sees one",
    "smoke": "seconds: one model size, batch 1, to see that everything runs",
    "cpu": "under 3 minutes on 2 cores: size S, batch 1 and 4, eager",
    "gpu": "sizes S and XL, batch 1 and 64, eager and torch.compile, inference and training",
    "blocks": "each block of sizes S and XL fused, against eager and torch.compile: half an hour on a CPU",
    "targets": "DiCo-S and FCDM-S at 256, batch 4, inference and training, with torch.compile: half an hour on a CPU",
    "ops": "each fused op against the best eager layout at the level shapes of sizes S and XL: some 4 minutes on a CPU",
    "full": "every size the device can hold, all batches, torch.compile: hours on a GPU, an hour on a CPU",
}
SCALES = {
    "S": ("DiCo-S", "FCDM-S", "DiT-S/2"),
    "B": ("DiCo-B", "FCDM-B", "DiT-B/2"),
    "L": ("DiCo-L", "FCDM-L", "DiT-L/2"),
    "XL": ("DiCo-XL", "FCDM-XL", "DiT-XL/2"),
    "H": ("DiCo-H", "FCDM-XL", "DiT-XL/2"),  # DiCo's largest, beside the others' largest
}

# Scales without the others of their size: what takes part beside them changes nothing, and torch.compile takes minutes.
ALONE = {"DiCo-S": ("DiCo-S",), "FCDM-S": ("FCDM-S",)}


@dataclass(frozen=True)
class ModelArena:
    """Models of one scale under equal conditions.

    Attributes:
        scale: key of SCALES, or of ALONE.
        resolution: image pixels a side; the latent has an eighth.
        batch: images a call; t and y differ by image.
        dtype: "fp32" (torch's default flags: cuDNN may use TF32, matmuls not), "tf32" (both may) or "bf16" (bfloat16
            weights in inference, autocast in training).
        mode: "inference" or "training" (forward, backward and AdamW).
        compiled: whether torch.compile takes part.
        rounds: timed samples a contender.
    """

    scale: str
    resolution: int
    batch: int
    dtype: str
    mode: str = "inference"
    compiled: bool = False
    rounds: int = 8

    def rows(self, gpu: bool) -> Iterator[tuple[str, str]]:
        """(model, contender) of everything that takes part."""
        for model in {**SCALES, **ALONE}[self.scale]:
            dit, training = model.startswith("DiT"), self.mode == "training"
            contenders = ["eager"] if dit else ["eager", "channels_last", "fused"]
            if not (training or dit):
                contenders.append("fused_tuned" if gpu else "packed")
            if training and not dit:
                if gpu:
                    contenders.remove("eager")  # each keeps weights and optimiser state: all at once must fit the card
                else:
                    contenders.append("fused_recompute")
            if self.compiled:
                contenders.append("compile")
                if gpu and not training:
                    contenders += ["compile_flash", "compile_cudnn"] if dit else ["compile_linear"]
            for contender in contenders:
                yield model, contender

    def title(self) -> str:
        """What all its rows share."""
        compiled = "-compiled" if self.compiled else ""
        return f"{self.scale}-{self.resolution}-b{self.batch}-{self.dtype}-{self.mode}{compiled}"


@dataclass(frozen=True)
class HalfArena:
    """DiCo's convolution half against DiT's attention half at equal tokens and width."""

    width: int
    side: int
    batch: int
    dtype: str
    compiled: bool = False
    rounds: int = 15

    def rows(self, gpu: bool) -> Iterator[tuple[str, str]]:
        """(op, contender) of everything that takes part."""
        del gpu
        yield from [("conv_half", "eager"), ("conv_half", "channels_last"), ("attention_half", "eager")]
        if self.compiled:
            yield from [("conv_half", "compile"), ("attention_half", "compile")]

    def title(self) -> str:
        """What all its rows share."""
        return f"C{self.width}-{self.side}x{self.side}-b{self.batch}-{self.dtype}"


@dataclass(frozen=True)
class OpArena:
    """One fused op, or a whole block, at one shape, against its definition in both memory layouts.

    Attributes:
        op: name in dico_kernels.ops; or "dico_block" or "fcdm_block".
        size: "S" or "XL", whose level the shape is.
        batch, channels, side: the image that the op works on; for pixel_shuffle_skip, the one it returns.
        dtype: "fp32" or "bf16".
        backward: whether a sample is forward and backward.
        compiled: whether torch.compile takes part.
    """

    op: str
    size: str
    batch: int
    channels: int
    side: int
    dtype: str
    backward: bool
    rounds: int = 9
    compiled: bool = False

    @property
    def mode(self) -> str:
        """What a sample is."""
        return "forward+backward" if self.backward else "forward"

    def rows(self, gpu: bool) -> Iterator[tuple[str, str]]:
        """(op, contender) of everything that takes part."""
        block = self.op in BLOCKS
        contenders = ["eager", "channels_last", "fused" if block else "triton" if gpu else "native"]
        if block and not (gpu or self.backward):
            contenders.append("packed")
        for contender in [*contenders, *(["compile"] if self.compiled else [])]:
            yield self.op, contender

    def title(self) -> str:
        """What all its rows share."""
        shape = f"{self.batch}x{self.channels}x{self.side}x{self.side}"
        return f"{self.op}-{self.size}-{shape}-{self.dtype}-{self.mode}"


BLOCKS = ("dico_block", "fcdm_block")
# (channels over D, 32 over the side) of the levels each op meets; FCDM's GRN sees three times the width.
DICO_LEVELS = ((1, 1), (2, 1), (2, 2), (4, 4))
FCDM_LEVELS = ((1, 1), (2, 2), (4, 4))
# The branches, whose rows say who multiplies; only `bench gpu` measures them level by level.
BRANCH_LEVELS = {
    "conv_half": ("DiCo", DICO_LEVELS),
    "ffn_half": ("DiCo", DICO_LEVELS),
    "fcdm_block": ("FCDM", FCDM_LEVELS),
}
OP_LEVELS = {
    "adaln_modulate": ("DiCo", DICO_LEVELS),
    "gated_residual": ("DiCo", DICO_LEVELS),
    "gated_residual_adaln": ("DiCo", DICO_LEVELS),
    "pointwise_depthwise_gelu": ("DiCo", DICO_LEVELS),
    "cca_gate": ("DiCo", DICO_LEVELS),
    "depthwise_adaln": ("FCDM", FCDM_LEVELS),
    "grn": ("FCDM", tuple((3 * c, s) for c, s in FCDM_LEVELS)),
    "pixel_shuffle_skip": ("DiCo", ((2, 1), (2, 2))),
}
WIDTHS = {("DiCo", "S"): 128, ("DiCo", "XL"): 416, ("FCDM", "S"): 128, ("FCDM", "XL"): 512}


def op_arenas(gpu: bool) -> list[OpArena]:
    """Every op at the level shapes of sizes S and XL."""
    batches = {"S": 64, "XL": 64} if gpu else {"S": 4, "XL": 1}
    return [
        OpArena(op, size, batches[size], multiple * WIDTHS[family, size], 32 // shrink, dtype, backward)
        for op, (family, levels) in OP_LEVELS.items()
        for size in ("S", "XL")
        for multiple, shrink in levels
        for dtype in ("fp32", "bf16")
        for backward in (False, True)
    ]


def block_arenas(gpu: bool) -> list[OpArena]:
    """The blocks of every level of DiCo-S, DiCo-XL and FCDM-S."""
    found: list[tuple[str, str, int, tuple[tuple[int, int], ...]]] = [
        ("dico_block", "S", 128, DICO_LEVELS),
        ("dico_block", "XL", 416, DICO_LEVELS),
        ("fcdm_block", "S", 128, FCDM_LEVELS),
    ]
    return [
        OpArena(
            op,
            size,
            64 if gpu else 4 if size == "S" else 1,
            multiple * width,
            32 // shrink,
            dtype,
            backward,
            compiled=True,
        )
        for op, size, width, levels in found
        for multiple, shrink in levels
        for dtype in ("fp32", "bf16")
        for backward in (False, True)
    ]


def resolve(preset: str, gpu: bool) -> str:
    """The preset that a name means here: "auto" is the default of the device.

    Raises:
        ValueError: an unknown preset, or "gpu" without one.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: expected one of {', '.join(PRESETS)}")
    if preset == "auto":
        return "gpu" if gpu else "cpu"
    if preset == "gpu" and not gpu:
        raise ValueError("preset='gpu': torch sees no CUDA device; use cpu, smoke or full")
    return preset


Arenas = tuple[list[ModelArena], list[HalfArena], list[OpArena]]


def arenas(preset: str, gpu: bool) -> Arenas:
    """The arenas of a resolved preset: whole models, halves of blocks, ops."""
    if preset == "ops":
        return [], [], op_arenas(gpu)
    if preset == "blocks":
        return [], [], block_arenas(gpu)
    if preset == "targets":
        models = [
            ModelArena(model, 256, 64 if gpu else 4, dtype, mode, compiled=True)
            for model in ALONE
            for dtype in ("fp32", "bf16")
            for mode in ("inference", "training")
        ]
        return models, [], []
    if preset == "smoke":
        quick: dict[str, Any] = {"rounds": 2}
        ops = [OpArena(op, "S", 1, 64, 16, "fp32", True, **quick) for op in (*OP_LEVELS, *BLOCKS)]
        return [ModelArena("S", 256, 1, "fp32", **quick)], [HalfArena(128, 16, 1, "fp32", **quick)], ops
    if preset == "cpu":
        models = [
            ModelArena("S", resolution, batch, dtype)
            for resolution, batch in ((256, 1), (256, 4), (512, 1))
            for dtype in ("fp32", "bf16")
        ]
        return models, [HalfArena(384, side, 4, dtype) for side in (16, 32) for dtype in ("fp32", "bf16")], []
    if preset == "gpu":
        models = [
            ModelArena(scale, resolution, batch, "bf16", compiled=True)
            for scale in ("XL", "S")
            for resolution in (256, 512)
            for batch in (64, 1)
        ]
        models += [ModelArena("XL", 256, 64, dtype) for dtype in ("fp32", "tf32")]
        models.append(ModelArena("XL", 256, 32, "bf16", "training", compiled=True))
        halves = [HalfArena(1152, side, 64, "bf16", compiled=True, rounds=8) for side in (16, 32, 64)]
        return models, halves, op_arenas(gpu)
    return _full(gpu)


def _full(gpu: bool) -> Arenas:
    scales = tuple(SCALES) if gpu else ("S", "B")
    batches = (1, 8, 64, 256) if gpu else (1, 4)
    models = []
    for scale in scales:
        for resolution in (256, 512):
            for batch in batches:
                models.append(ModelArena(scale, resolution, batch, "bf16", compiled=True))
                if gpu and batch != 64:
                    continue
                models.append(ModelArena(scale, resolution, batch, "fp32", compiled=not gpu))
                if gpu:
                    models.append(ModelArena(scale, resolution, batch, "tf32"))
        models.append(ModelArena(scale, 256, 32 if gpu else 4, "bf16", "training", compiled=True))
        models.append(ModelArena(scale, 256, 32 if gpu else 4, "fp32", "training", compiled=not gpu))
    width, batch, sides = (1152, 64, (8, 16, 32, 64)) if gpu else (384, 4, (8, 16, 32))
    halves = [HalfArena(width, side, batch, dtype, True) for side in sides for dtype in ("bf16", "fp32")]
    return models, halves, op_arenas(gpu)
