"""What is measured: each preset is a list of arenas, within which every contender takes turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Preset = Literal["auto", "smoke", "cpu", "gpu", "full"]
PRESETS: dict[str, str] = {
    "auto": "cpu, or gpu where torch sees one",
    "smoke": "seconds: one model size, batch 1, to see that everything runs",
    "cpu": "under 3 minutes on 2 cores: size S, batch 1 and 4, eager",
    "gpu": "sizes S and XL, batch 1 and 64, eager and torch.compile, inference and training",
    "full": "every size the device can hold, all batches, torch.compile: hours on a GPU, an hour on a CPU",
}
SCALES = {
    "S": ("DiCo-S", "FCDM-S", "DiT-S/2"),
    "B": ("DiCo-B", "FCDM-B", "DiT-B/2"),
    "L": ("DiCo-L", "FCDM-L", "DiT-L/2"),
    "XL": ("DiCo-XL", "FCDM-XL", "DiT-XL/2"),
}


@dataclass(frozen=True)
class ModelArena:
    """Models of one scale under equal conditions.

    Attributes:
        scale: key of SCALES.
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
        for model in SCALES[self.scale]:
            dit = model.startswith("DiT")
            contenders = ["eager"] if dit else ["eager", "channels_last"]
            if self.compiled:
                contenders.append("compile")
                if dit and gpu:
                    contenders += ["compile_flash", "compile_cudnn"]
                elif not dit and gpu:
                    contenders.append("compile_linear")
            for contender in contenders:
                yield model, contender

    def title(self) -> str:
        """What all its rows share."""
        return f"{self.scale}-{self.resolution}-b{self.batch}-{self.dtype}-{self.mode}"


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


def arenas(preset: str, gpu: bool) -> tuple[list[ModelArena], list[HalfArena]]:
    """The arenas of a resolved preset."""
    if preset == "smoke":
        quick: dict[str, Any] = {"rounds": 2}
        return [ModelArena("S", 256, 1, "fp32", **quick)], [HalfArena(128, 16, 1, "fp32", **quick)]
    if preset == "cpu":
        models = [
            ModelArena("S", resolution, batch, dtype)
            for resolution, batch in ((256, 1), (256, 4), (512, 1))
            for dtype in ("fp32", "bf16")
        ]
        return models, [HalfArena(384, side, 4, dtype) for side in (16, 32) for dtype in ("fp32", "bf16")]
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
        return models, halves
    return _full(gpu)


def _full(gpu: bool) -> tuple[list[ModelArena], list[HalfArena]]:
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
    return models, [HalfArena(width, side, batch, dtype, True) for side in sides for dtype in ("bf16", "fp32")]
