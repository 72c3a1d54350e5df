"""What ``bench gpu`` measures, in order of importance, and until when each stage may go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .presets import BRANCH_LEVELS, OP_LEVELS, WIDTHS, ModelArena, OpArena

STAGES = ("tests", "ceilings", "kernels", "models")
MINUTES = 8.5
# Of the budget, where all stages run; a stage that needs less leaves the rest to those after it.
SHARES = {"tests": 0.25, "ceilings": 0.05, "kernels": 0.28, "models": 0.42}
CEILINGS = ("bf16", "fp16", "tf32")
_KERNEL_S = 3.0
_MODEL_S = {"XL": 12.0, "S": 6.0}
_COMPILE_S = {"XL": 75.0, "S": 40.0}
_TUNE_S = {"XL": 25.0}


@dataclass(frozen=True)
class Unit:
    """Contenders that take turns: an arena and its rows, (model or op, contender), the cheapest first."""

    stage: str
    arena: Any
    rows: tuple[tuple[str, str], ...]

    @property
    def title(self) -> str:
        """What its rows share."""
        return str(self.arena.title())

    def seconds(self, row: tuple[str, str], slowest: float) -> float:
        """What to expect of a row before it is begun. ``slowest``: of the kernels' rows so far."""
        if self.stage == "kernels":
            return max(_KERNEL_S, slowest)
        table = _COMPILE_S if row[1].startswith("compile") else _TUNE_S if "tuned" in row[1] else _MODEL_S
        return table.get(self.arena.scale, table["XL"])


def checked_stages(names: Sequence[str]) -> list[str]:
    """Stages in their order.

    Raises:
        ValueError: none, or one that is unknown.
    """
    if not names or (unknown := [n for n in names if n not in STAGES]):
        raise ValueError(f"stages={','.join(unknown if names else [])!r}: expected some of {','.join(STAGES)}")
    return [stage for stage in STAGES if stage in names]


def deadline(stages: Sequence[str], now: float, end: float) -> float:
    """When the first of the stages still to run has to stop, if all are to end by ``end``."""
    return now + max(0.0, end - now) * SHARES[stages[0]] / sum(SHARES[s] for s in stages)


def _kernels(op: str, size: str, backward: bool) -> list[Unit]:
    branch = op in BRANCH_LEVELS
    family, levels = (BRANCH_LEVELS if branch else OP_LEVELS)[op]
    fused = ("triton/library", "triton/mixed", "triton/fused") if branch else ("triton",)
    return [
        Unit(
            "kernels",
            OpArena(op, size, 64, multiple * WIDTHS[family, size], 32 // shrink, "bf16", backward, rounds=5),
            tuple((op, contender) for contender in ("channels_last", *fused)),
        )
        for multiple, shrink in levels
    ]


def kernel_units() -> list[Unit]:
    """Every op at the level shapes of DiCo (FCDM for its ops) XL and S: branches before ops, XL before S."""
    order = [
        (ops, size, backward)
        for size, backward, ops in (
            ("XL", False, BRANCH_LEVELS),
            ("XL", True, BRANCH_LEVELS),
            ("XL", False, OP_LEVELS),
            ("S", False, BRANCH_LEVELS),
            ("XL", True, OP_LEVELS),
            ("S", True, BRANCH_LEVELS),
            ("S", False, OP_LEVELS),
            ("S", True, OP_LEVELS),
        )
    ]
    return [unit for ops, size, backward in order for op in ops for unit in _kernels(op, size, backward)]


def model_units() -> list[Unit]:
    """Whole models, DiCo against DiT: what compiles nothing first, since torch.compile takes a minute a contender."""

    def unit(
        scale: str, resolution: int, batch: int, dico: Sequence[str], dit: Sequence[str], mode: str = "inference"
    ) -> Unit:
        rows = [(f"DiCo-{scale}", c) for c in dico] + [(f"DiT-{scale}/2", c) for c in dit]
        rows.sort(key=lambda row: (row[1].startswith("compile"), "tuned" in row[1]))
        compiled = any(how.startswith("compile") for _, how in rows)
        return Unit("models", ModelArena(scale, resolution, batch, "bf16", mode, compiled), tuple(rows))

    fused = "fused", "fused_mixed"
    graphs = "fused_graph", "fused_mixed_graph"
    plain = ("channels_last", *fused, *graphs), ("eager",)
    single = ("channels_last", "channels_last_graph", *fused, *graphs), ("eager", "eager_graph")
    compiled = (*fused, "compile_default"), ("compile_default",)
    return [
        # tune tries every form, whose kernels for these shapes the stage before has compiled
        unit("XL", 256, 64, (*plain[0], "fused_tuned"), plain[1]),
        unit("XL", 256, 32, ("channels_last", *fused, "fused_tuned"), ("eager",), "training"),
        unit("XL", 256, 1, *single),
        unit("XL", 512, 64, *plain),
        unit("S", 256, 64, *plain),
        unit("S", 256, 1, *single),
        unit("XL", 256, 64, *compiled),
        unit("XL", 256, 32, *compiled, "training"),
        unit("XL", 512, 64, *compiled),
        unit("S", 256, 64, *compiled),
    ]


def units(stage: str) -> list[Unit]:
    """What a stage measures."""
    return kernel_units() if stage == "kernels" else model_units()
