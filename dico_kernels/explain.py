"""What runs where: which modules are fused, every op that a call meets, who runs it, and why nobody else does."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dico_kernels.fuse import Verdict, survey
from dico_kernels.ops._backends import Choice, recording


@dataclass(frozen=True)
class Row:
    """One kernel of one module: where it is, what runs it, and each refusal by backend."""

    module: str
    choice: Choice


class Explanation(list[Row]):
    """Rows in the order of the calls; prints as a table.

    Attributes:
        modules: fuse's verdict on every candidate in the model, fused or not, in the model's order.
    """

    def __init__(self, modules: Iterable[Verdict] = ()) -> None:
        super().__init__()
        self.modules = list(modules)

    def __str__(self) -> str:
        blocks = [(v.module, _state(v), [r for r in self if r.module == v.module]) for v in self.modules]
        judged = {v.module for v in self.modules}
        others = itertools.groupby((r for r in self if r.module not in judged), key=lambda r: r.module)
        blocks += [(name, ("-", "-", ""), list(rows)) for name, rows in others]
        if not blocks:
            return "No dico_kernels op was called."
        cells: list[tuple[str, ...]] = [
            ("module", "form", "probe", "kernel", "input", "dtype", "runs on", "why not otherwise")
        ]
        for names, lines in _alike((name, _lines(state, rows)) for name, state, rows in blocks):
            cells += [(names if i == 0 else "", *line) for i, line in enumerate(lines)]
        if not self.modules:  # a function, or a model with nothing to fuse: no forms to speak of
            cells = [(c[0], *c[3:]) for c in cells]
            cells[0] = (*cells[0][:-1], "why not the others")
        elif not self:  # nothing was called: no kernels
            cells = [(*c[:3], c[-1]) for c in cells]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]) - 1)]
        table = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) for line in cells]
        return "\n".join([table[0], "  ".join("-" * w for w in widths), *table[1:]])


def _state(v: Verdict) -> tuple[str, str, str]:
    """A verdict in words: its form, the probe's figure and why it is not fused."""
    figure = "-" if v.figure is None else f"{v.figure:.0e}"
    how = ", recomputing" * v.recomputes + ", checkpointing" * v.checkpoints
    return f"{v.family}, {'fused' if v.fused else 'unfused'}{how}", figure, v.reason


def _lines(state: tuple[str, str, str], rows: list[Row]) -> list[tuple[str, ...]]:
    """The table's cells for one module, but for its name."""
    form, figure, reason = state
    lines: list[tuple[str, ...]] = [(form, figure, "-", "-", "-", "-", reason)] if reason or not rows else []
    above = ""
    for row in rows:
        c = row.choice
        why = "; ".join(f"{name}: {text}" for name, text in c.refusals.items()) or "-"
        said = ("", "") if lines else (form, figure)
        shape, dtype = "x".join(map(str, c.shape)), str(c.dtype).removeprefix("torch.")
        above, why = why, "as above" if why == above != "-" else why
        lines.append((*said, c.entry, shape, dtype, c.backend, why))
    return lines


def _alike(blocks: Iterable[tuple[str, list[tuple[str, ...]]]]) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Neighbours of one list that have the same lines, as one: encoder.0, encoder.1, encoder.2 as encoder.0-2."""
    run: tuple[str, int, int, list[tuple[str, ...]]] | None = None
    for name, lines in blocks:
        match = re.fullmatch(r"(.*?)(\d+)", name)
        if run and match and run[0] == match[1] and run[2] + 1 == int(match[2]) and run[3] == lines:
            run = (run[0], run[1], run[2] + 1, lines)
            continue
        if run:
            yield _span(run), run[3]
        run = (match[1], int(match[2]), int(match[2]), lines) if match else None
        if run is None:
            yield name or "-", lines
    if run:
        yield _span(run), run[3]


def _span(run: tuple[str, int, int, Any]) -> str:
    return f"{run[0]}{run[1]}" + (f"-{run[2]}" if run[2] > run[1] else "")


@contextmanager
def _module_names(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the name of the module that is running on top of the stack.

    By hooks on all modules there are: one that has a hook of its own is called where it would be bypassed.
    """
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, *_: Any) -> None:
        if module in names:
            stack.append(names[module])

    def leave(module: nn.Module, *_: Any) -> None:
        if module in names:
            stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def explain(call: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Say which modules are fused, and, with inputs, which backend runs each op, and why not otherwise.

    ``call(*args, **kwargs)`` runs once, without gradients.

    Args:
        call: a module or function. For a module, each row names the submodule; it is left as it was.
        *args: what to call it with. A module without any is not called: only its modules are judged.
        **kwargs: likewise.

    Returns:
        Rows in the order of the calls, and ``modules``: for each candidate whether it is fused, the reason why not,
        and the probe's figure. Print it for a table.
    """
    stack = [""]
    module = call if isinstance(call, nn.Module) else nn.Identity()
    rows = Explanation(verdict for _, verdict, _ in survey(module))
    if isinstance(call, nn.Module) and not args and not kwargs:
        return rows

    def record(choice: Choice) -> None:
        # The first block of a level has it computed for all of them: that is the doing of the module they are in.
        shared = choice.entry == "conditioning"
        rows.append(Row(stack[-2 if shared and len(stack) > 1 else -1], choice))

    with _module_names(module, stack), recording(record), torch.no_grad():
        call(*args, **kwargs)
    return rows
