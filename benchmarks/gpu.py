"""``python -m dico_kernels bench gpu``: tests, ceilings, kernels and models of one GPU within a time budget."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import gpu_tests, machine, report
from .gpu_plan import MINUTES, STAGES, Unit, checked_stages, deadline
from .gpu_store import Store
from .gpu_worker import DEVICE_LOST, DeviceLostError, Worker, print_line
from .harness import failed
from .limits import Ceiling
from .session import add_ratios

FILE, REPORT = "gpu.json", "report.md"
# A row that takes longer than this hangs. Compiling a large model is the longest that is none.
_HANGS_S = {"ceilings": 60.0, "kernels": 60.0, "models": 240.0}
_GRACE_S = 3.0  # for a row to end after its stage's deadline
_REPORT_S = 5.0  # of the budget
_WRONG = 4.0  # times plain PyTorch's error: the tests, which are exact about it, grant twice and a rounding
_USUAL_ERROR = 0.02  # a 16-bit model's, where plain PyTorch failed
Launch = Callable[[str, Path, float], list[str]]


class _TerminatedError(Exception):
    """SIGTERM or SIGINT came."""


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM as an exception, so that what there is gets written and the processes below get ended."""

    def stop(number: int, frame: Any) -> None:
        raise _TerminatedError(signal.Signals(number).name)

    try:
        before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _launch(stage: str, path: Path, until: float) -> list[str]:
    module = "dico_kernels.benchmarks.gpu_worker"
    return [sys.executable, "-m", module, "--stage", stage, "--results", str(path), "--deadline", str(until)]


def run(
    stages: Sequence[str] = STAGES,
    out: Path = Path("bench-gpu"),
    minutes: float = MINUTES,
    *,
    device: str = "cuda",
    plan: dict[str, Sequence[Unit]] | None = None,
    launch: Launch = _launch,
    say: Callable[[str], None] = print_line,
    **tests: Any,
) -> int:
    """Run stages one after the other within ``minutes``, and write gpu.json and report.md into ``out``.

    Each stage stops by its share of what is left of the budget. gpu.json is replaced after every row; run again with
    the same folder, on the same device and commit, it goes on with what is missing.

    Args:
        stages: some of STAGES.
        out: folder, made if need be.
        minutes: the budget of all stages together.
        device: anything but "cuda" is for tests: with a plan, measured in this process.
        plan: units of the stages "kernels" and "models" in the place of the usual ones; measured in this process.
        launch: (stage, results, deadline) -> the command that measures a stage.
        say: takes a line of progress.
        **tests: arguments for gpu_tests.run.

    Returns:
        0; 1 where a test or row failed, is wrong, or a stage ended otherwise than planned; 2 for arguments that cannot
        be used or where there is no GPU; 143 where it was ended by a signal.
    """
    try:
        stages = checked_stages(stages)
        if not minutes > 0:
            raise ValueError(f"minutes={minutes}: expected more than 0")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no CUDA device, and bench gpu measures nothing else", file=sys.stderr)
        return 2
    end = time.time() + minutes * 60 - min(_REPORT_S, minutes * 6)
    out.mkdir(parents=True, exist_ok=True)
    store = Store.open(out / FILE, machine.describe())
    status, left = 0, list(stages)
    try:
        with _signals():
            while left:
                stage, began = left[0], time.time()
                until = deadline(left, began, end)
                say(f"{stage}: until {until - began:.0f} s from now")
                try:
                    if stage == "tests":
                        state = _tests(store, out, until, tests)
                    elif plan is not None:
                        state = _inline(stage, store, until, torch.device(device), plan, say)
                    else:
                        if stage == "kernels":
                            _prepare(store.path, until, launch)
                        state = _supervise(stage, store, until, launch)
                except _TerminatedError:
                    raise
                except Exception as error:  # the other stages are still worth having
                    state = f"failed: {failed(stage, error)}"
                store = Store.load(store.path)
                kept = store.result["stages"].setdefault(stage, {})
                kept |= {"state": state, "seconds": round(time.time() - began, 1)}
                store.save()
                left.pop(0)
    except _TerminatedError as error:
        say(f"ended by {error}")
        status = 143
        store = Store.load(store.path)
        store.result["in_flight"] = None
    finish(store.result)
    store.save()
    (out / REPORT).write_text(markdown(store.result))
    say(text(store.result))
    say(f"\nwritten: {out / FILE}, {out / REPORT}")
    return status or int(_at_fault(store.result))


def _at_fault(result: report.Result) -> bool:
    """Whether anything went wrong that is no matter of time or memory."""
    tests = result["tests"] or {}
    rows = [*result["kernels"], *result["models"]]
    return bool(
        tests.get("failures")
        or tests.get("broken")
        or any(row.get("wrong") or row["failure"] not in (None, "OOM") for row in rows)
        or any(str(kept.get("state")).startswith("failed") for kept in result["stages"].values())
    )


def _tests(store: Store, out: Path, until: float, options: dict[str, Any]) -> str:
    if (store.result["tests"] or {}).get("complete"):
        return "done before"

    def keep(found: dict[str, Any]) -> None:
        if found != store.result["tests"]:
            store.result["tests"] = found
            store.save()

    found = gpu_tests.run(out, until, keep=keep, **options)
    store.result["tests"] = found
    store.save()
    return "not run" if "note" in found else "done" if found["complete"] else "cut off"


def _inline(
    stage: str, store: Store, until: float, device: torch.device, plan: dict[str, Sequence[Unit]],
    say: Callable[[str], None],
) -> str:  # fmt: skip
    worker = Worker(stage, store, until, device, plan=plan.get(stage, ()), say=say)
    try:
        worker.run(**({"ceilings": plan["ceilings"]} if stage == "ceilings" and "ceilings" in plan else {}))  # type: ignore[arg-type]
    except DeviceLostError as error:
        store.bury(str(error))
        return f"failed: {error}"
    return "cut off" if worker.skipped else "done"


def _prepare(path: Path, until: float, launch: Launch) -> None:
    """Let several processes compile what the kernels' stage measures, for a third of its time at most."""
    count = max(1, min(12, (os.cpu_count() or 2) - 2))
    end = time.time() + (until - time.time()) / 3
    log = path.parent / "kernels.log"
    with log.open("ab") as errors:
        found = [
            subprocess.Popen([*launch("kernels", path, end), "--prepare", f"{i}/{count}"], stdout=errors, stderr=errors)
            for i in range(count)
        ]
    try:
        while any(p.poll() is None for p in found) and time.time() < end + _GRACE_S:
            time.sleep(0.2)
    finally:
        for process in found:
            if process.poll() is None:
                process.kill()
            process.wait()


def _supervise(stage: str, store: Store, until: float, launch: Launch) -> str:
    """Start the process that measures a stage, and another wherever a row took one down."""
    log = store.path.parent / f"{stage}.log"
    while True:
        with log.open("ab") as errors:
            process = subprocess.Popen(launch(stage, store.path, until), stderr=errors)
        try:
            why = _wait(process, stage, store.path, until)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        store.result = Store.load(store.path).result
        if why is None and process.returncode == 0:
            return "cut off" if store.result["stages"].get(stage, {}).get("note") else "done"
        if why == "deadline":
            store.end()  # what was being measured is left for another run
            return "cut off"
        if why is None:
            lost = process.returncode == DEVICE_LOST
            why = f"{'the device was lost' if lost else f'the process ended with {process.returncode}'}: {_last(log)}"
        # A process that dies of its last row may have kept it already, with the reason.
        if not store.bury(why) and process.returncode != DEVICE_LOST:
            return f"failed: {why}"
        if time.time() >= until:
            return "cut off"


def _wait(process: subprocess.Popen[bytes], stage: str, path: Path, until: float) -> str | None:
    """Wait for a process to end: None, or why it has to be ended."""
    while process.poll() is None:
        now = time.time()
        if now > until + _GRACE_S:
            return "deadline"
        flight = Store.load(path).result["in_flight"]
        if flight is not None and now - flight["since"] > _HANGS_S[stage]:
            return f"hung: ended after {_HANGS_S[stage]:.0f} s"
        time.sleep(0.5)
    return None


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


# ---- report ----


def finish(result: report.Result) -> None:
    """Add what needs more than one row: ratios, and which ceiling binds."""
    add_ratios(result["models"], "vs_dit", lambda row: row["model"].startswith("DiT"))
    add_ratios(result["kernels"], "vs_eager", lambda row: row["contender"] == "channels_last")
    for row in result["kernels"]:
        if row["dtype"] in result["ceilings"] and row.get("moved"):
            ceiling = Ceiling(**result["ceilings"][row["dtype"]])
            row["bound"] = "matmul" if 2 * row["macs"] / ceiling.flops > row["moved"] / ceiling.bytes else "copy"
    for rows, plain in ((result["kernels"], ("channels_last",)), (result["models"], ("channels_last", "eager"))):
        _judge(rows, plain)


def _judge(rows: list[report.Row], plain: Sequence[str]) -> None:
    """Mark rows whose error is out of proportion to that of plain PyTorch in the same dtype, NaN included."""
    usual = {(r["arena"], r.get("model")): r["error"] for r in rows if r["contender"] in plain and not r["failure"]}
    for row in rows:
        row["wrong"] = None
        if row["failure"] or row["contender"] in plain or row.get("error") is None:
            continue
        beside = usual.get((row["arena"], row.get("model")))
        if beside is None:
            beside = _USUAL_ERROR
        if not row["error"] <= _WRONG * beside + 1e-6:
            row["wrong"] = f"WRONG: error {row['error']:.1e} where plain PyTorch has {beside:.1e}"


def _stages(result: report.Result) -> list[str]:
    lines = []
    for stage, kept in result["stages"].items():
        words = f"{stage}: {kept.get('state', '?')}, {kept.get('seconds', 0):.0f} s"
        if stage == "tests" and result["tests"]:
            words += f"; {gpu_tests.line(result['tests'])}"
        lines.append(words + (f"; {kept['note']}" if kept.get("note") else ""))
    if alone := sum(bool(r.get("alone") or r.get("apart")) for r in result["models"]):
        lines.append(f"{alone} models were timed without some of their set: compare with care, or run again")
    return lines


def text(result: report.Result) -> str:
    """What the terminal shows at the end."""
    rows = report.failures(result)
    tests = [f"failed test: {name}" for name in (result["tests"] or {}).get("failures", [])[:20]]
    blocks = ["", report.text(result), "\n".join([*_stages(result), *tests])]
    return "\n\n".join([*blocks, f"failed:\n{rows}"] if rows else blocks)


def markdown(result: report.Result) -> str:
    """report.md."""
    stages = "\n".join(f"- {line}" for line in _stages(result))
    names = (result["tests"] or {}).get("failures", [])
    tests = "\n\n### failed tests\n\n" + "\n".join(f"- `{name}`" for name in names) if names else ""
    return f"# bench gpu\n\n{stages}{tests}\n\n{report.markdown(result)}\n"


def main(args: Any) -> int:
    """From the command line's arguments."""
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    return run([s for s in args.stages.split(",") if s], args.out, args.minutes)
