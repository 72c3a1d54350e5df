"""tune and untune: measure on this machine who multiplies fastest in each branch of a model, and use that."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dico_kernels import _timing
from dico_kernels.info import build_info, source
from dico_kernels.ops import _tuning
from dico_kernels.ops._backends import PRODUCTS, current, multiplying
from dico_kernels.ops._tuning import Case, Occasion

VARIABLE = "DICO_KERNELS_TUNING"
# By whose own products stand against the library's.
CANDIDATES = {"triton": ("library", "mixed", "fused"), "native": ("library", "fused")}
_ROUNDS = 7
_SAMPLE_S = 0.02
# What another choice has to gain: less is not told from chance.
_GAIN = 0.03


@dataclass(frozen=True)
class TuningRow:
    """What was found for one branch at one shape.

    Attributes:
        case: what it is good for.
        images: at which batch it was measured.
        products: what the branch runs on from now on.
        ms: milliseconds of a call by products; on a GPU the device's own.
        failures: why others could not run, by products.
        cached: whether that was read from the file, not measured now.
    """

    case: Case
    images: int
    products: str
    ms: dict[str, float]
    failures: dict[str, str]
    cached: bool = False


class Tuning(list[TuningRow]):
    """Rows in the order in which the model met them; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "Nothing to choose: no branch was called for which there are products of our own."
        tried = {name for row in self for name in (*row.ms, *row.failures)}
        names = [name for name in PRODUCTS if name in tried]
        cells = [("branch", "input", "hidden", "dtype", "for", *(f"{n} ms" for n in names), "runs on", "")]
        for row in self:
            c = row.case
            shape = f"{row.images}x{c.channels}x{c.height}x{c.width}"
            dtype = c.dtype if c.stream == c.dtype else f"{c.dtype} on {c.stream}"
            times = [f"{row.ms[n]:.3f}" if n in row.ms else "failed" if n in row.failures else "-" for n in names]
            mode = "training" if c.saving else "inference"
            said = "; ".join(["from the file"] * row.cached + [f"{n}: {why}" for n, why in row.failures.items()])
            cells.append((c.branch, shape, str(c.hidden), dtype, mode, *times, row.products, said))
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]) - 1)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) for line in cells]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join(line.rstrip() for line in lines)


def _in_words(name: str, error: Exception) -> str:
    del name
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def _indexed(call: Callable[[], object]) -> _timing.Run:
    return lambda index: call()


def fastest(calls: dict[str, Callable[[], object]], device: torch.device) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of each call, by turns, and why others failed, such as a kernel that this device cannot hold.

    Args:
        calls: by name; each is called some twenty to a few thousand times.
        device: where they run; on a GPU calls are queued, and the time is the device's own.
    """
    found = {name: _timing.Timing() for name in calls}
    runs = {name: _indexed(call) for name, call in calls.items()}
    _timing.interleave(runs, found, _ROUNDS, device, _SAMPLE_S, queued=True, describe=_in_words)
    ms = {name: timing.median * 1e3 for name, timing in found.items() if timing.failure is None}
    return ms, {name: timing.failure for name, timing in found.items() if timing.failure is not None}


def _best(ms: dict[str, float], usual: str) -> str:
    """The fastest, if it beats what would run otherwise by more than chance."""
    best = min(ms, key=lambda name: ms[name], default=usual)
    return best if usual not in ms or ms[best] < (1 - _GAIN) * ms[usual] else usual


def _default_file() -> Path:
    if named := os.environ.get(VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "dico_kernels", "tuning.json")


def _software() -> str:
    info = build_info()
    return f"dico_kernels {info['version']} {source()}, torch {info['torch']}, triton {info['triton']}"


def _read(file: Path, warn: bool = False) -> dict[str, Any]:
    """What the file has of every software; nothing where there is none, or none that can be read."""
    try:
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) else {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        if warn:
            warnings.warn(f"{file} is measured anew: it cannot be read ({error})", RuntimeWarning, stacklevel=3)
        return {}


def _kept(found: dict[str, Any]) -> Iterable[TuningRow]:
    entries = found.get(_software())
    for entry in entries if isinstance(entries, list) else []:
        with suppress(KeyError, TypeError):  # of another form
            row = TuningRow(**{**entry, "case": Case(**entry["case"])})
            if row.products in CANDIDATES[row.case.backend] and hash(row.case):
                yield row


def _write(file: Path, rows: Iterable[TuningRow]) -> None:
    """Add rows to the file, in place of what it had of the same."""
    found = _read(file)
    merged = {(r.case, r.images): r for r in [*_kept(found), *rows]}
    found[_software()] = [{k: v for k, v in asdict(row).items() if k != "cached"} for row in merged.values()]
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(found, indent=1))
        part.replace(file)
    except OSError as error:
        warnings.warn(
            f"what was measured is not kept: {file} cannot be written ({error})", RuntimeWarning, stacklevel=3
        )


class _Measuring:
    """Measures every case it is handed once, unless the file has it."""

    def __init__(self, kept: Iterable[TuningRow]) -> None:
        self.kept = {(row.case, row.images): row for row in kept}
        self.rows: dict[tuple[Case, int], TuningRow] = {}

    def __call__(self, at: Occasion) -> None:
        key = at.case, at.images
        on_gpu = at.device.type == "cuda"
        if key in self.rows or (on_gpu and torch.cuda.is_current_stream_capturing()):
            return
        kept = self.kept.get(key)
        row = self._measured(at) if kept is None else replace(kept, cached=True)
        if row.ms:  # what can run in no form is for the call itself to report
            self.rows[key] = row
            _tuning.put(at.case, at.images, row.products)

    def _measured(self, at: Occasion) -> TuningRow:
        case = at.case
        if sys.stderr.isatty():
            shape = f"{at.images}x{case.channels}x{case.height}x{case.width}"
            print(f"tune: {case.branch} {shape} {case.dtype}", file=sys.stderr, flush=True)

        def by(products: str) -> Callable[[], object]:
            def call() -> object:
                with multiplying(products):
                    return at.call()

            return call

        with torch.cuda.device(at.device) if at.device.type == "cuda" else nullcontext():
            ms, failures = fastest({name: by(name) for name in CANDIDATES[case.backend]}, at.device)
        return TuningRow(case, at.images, _best(ms, at.usual), ms, failures)


def tune(call: Any, *args: Any, keep: bool = True, again: bool = False, **kwargs: Any) -> Tuning:
    """Measure who multiplies fastest in each fused branch of a model on this device, and use that from now on.

    A 1x1 convolution may be the library's product (cuBLAS, oneDNN) with fused passes around it, or a kernel of our own
    with those passes inside; which is faster depends on the device, the shape and the batch. Without tune a rule
    decides; where ``dk.backend`` or DICO_KERNELS_PRODUCTS name the products, they do. Numbers differ in the last bits,
    as between any two ways to sum.

    ``call(*args, **kwargs)`` runs once, as it is: under ``torch.inference_mode()`` to tune sampling, in training mode
    with gradients for training's forward pass (a backward pass has one form). Each branch that it meets is timed there
    on its own inputs, by turns, in each form that can run: some seconds for a model, and on a GPU what compiling takes.
    Another form than the rule's has to gain 3%. A choice holds in this process for its shape, dtype and mode at every
    batch that was not measured itself, the nearest measured one deciding. Call fuse and pack before, and torch.compile
    with CUDA graphs of its own after: those replay what they recorded.

    Args:
        call: a fused model, a GraphRunner, or any function that runs one.
        *args: what to call it with.
        keep: read what was measured before with this device and software from a file, and add to it, so that a later
            process's tune takes no time: DICO_KERNELS_TUNING, by default ``~/.cache/dico_kernels/tuning.json``.
        again: measure what the file has, too.
        **kwargs: as args.

    Returns:
        A row for each branch and shape. Print it for a table.

    Raises:
        ValueError: products are named, so there is nothing to choose.

    Warns:
        RuntimeWarning: the file cannot be read or written; the choices hold for this process.
    """
    if (named := current()[2]) != "auto":
        raise ValueError(f"products={named!r} is set, by dk.backend or DICO_KERNELS_PRODUCTS: expected 'auto' to tune")
    measuring = _Measuring(_kept(_read(_default_file(), warn=True)) if keep and not again else [])
    try:
        with _tuning.measuring(measuring):
            call(*args, **kwargs)
    finally:
        # Another time there may be the memory.
        new = [r for r in measuring.rows.values() if not r.cached and "OutOfMemoryError" not in str(r.failures)]
        if keep and new:
            _write(_default_file(), new)
    return Tuning(measuring.rows.values())


def untune() -> None:
    """Undo tune: choose by the rule again. The file stays."""
    _tuning.forget()


__all__ = ["Tuning", "TuningRow", "tune", "untune"]
