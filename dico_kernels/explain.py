"""What runs where: every op that a call meets, who runs it, and why the other backends do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dico_kernels.ops._backends import Choice, recording


@dataclass(frozen=True)
class Row:
    """One kernel of one module: where it is, what runs it, and each refusal by backend."""

    module: str
    choice: Choice


class Explanation(list[Row]):
    """Rows in the order of the calls; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "No dico_kernels op was called."
        cells = [("module", "kernel", "input", "dtype", "runs on", "why not the others")]
        for row in self:
            c = row.choice
            reasons = "; ".join(f"{name}: {why}" for name, why in c.refusals.items()) or "-"
            shape = "x".join(map(str, c.shape))
            cells.append((row.module or "-", c.entry, shape, str(c.dtype).removeprefix("torch."), c.backend, reasons))
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]) - 1)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) for line in cells]
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


@contextmanager
def _module_names(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the name of the module that is running on top of the stack."""

    def enter(name: str) -> Any:
        return lambda *_: stack.append(name)

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name), prepend=True))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def explain(call: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Run ``call(*args, **kwargs)`` once, without gradients, and say which backend ran each op and why.

    Args:
        call: a module or function. For a module, each row names the submodule; it is left as it was.
        *args: what to call it with.
        **kwargs: likewise.

    Returns:
        Rows in the order of the calls; print it for a table.
    """
    rows, stack = Explanation(), [""]
    module = call if isinstance(call, nn.Module) else nn.Identity()

    def record(choice: Choice) -> None:
        rows.append(Row(stack[-1], choice))

    with _module_names(module, stack), recording(record), torch.no_grad():
        call(*args, **kwargs)
    return rows
