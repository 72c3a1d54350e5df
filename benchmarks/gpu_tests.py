"""The tests stage of ``bench gpu``: what the test suite has for a GPU, in several processes, until a deadline."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .gpu_shard import DEVICE_LOST, VARIABLE

TESTS = (
    "tests/kernels",
    "tests/ops/test_numerics.py",
    "tests/ops/test_branches.py",
    "tests/ops/test_registration.py",
    "tests/nn/test_conditioning.py",
    "tests/test_gpu.py",
    "tests/test_sampling.py",
    "tests/test_graphs.py",
    "tests/test_training.py",
    "tests/cuda",
)
# The CPU and its backends are tested elsewhere; so is what takes long and has nothing of a GPU.
_ONLY = "not native and not reference and not cpu and not Refused and not every_level and not bytes_saved"
_GRACE_S = 8.0
# A test that takes longer is stuck, in a kernel or in compiling one: what is behind it goes on without it.
_STUCK_S = 180.0


def clone() -> Path | None:
    """The repository that this package runs from, or None where it is installed without one."""
    root = Path(__file__).resolve().parent.parent
    return root if (root / "pyproject.toml").is_file() and (root / "tests").is_dir() else None


def why_not(root: Path | None) -> str | None:
    """Why there can be no tests, or None."""
    if root is None:
        return "not run: no clone of the repository, and an installation has no tests"
    return None if find_spec("pytest") else "not run: pytest is not installed"


class _Shard:
    """One pytest process and, where the device is lost to it, the ones that go on after it."""

    def __init__(self, root: Path, folder: Path, index: int, count: int, tests: Sequence[str], only: str) -> None:
        self.root, self.index, self.count, self.tests, self.only = root, index, count, tests, only
        self.outcomes, self.log = folder / f"tests-{index}.jsonl", folder / f"tests-{index}.log"
        for path in (self.outcomes, self.log):
            path.unlink(missing_ok=True)
        self.start()

    def start(self) -> None:
        share = f"{self.index}/{self.count}/{len(self.ended())}/{self.outcomes.resolve()}"
        environment = {**os.environ, VARIABLE: share, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "dico_kernels.benchmarks.gpu_shard"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, "-k", self.only, *self.tests],
                cwd=self.root, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def lines(self) -> list[dict[str, Any]]:
        """Outcomes so far; a line cut off by the end of a process is left out."""
        found = []
        for line in self.outcomes.read_text().splitlines() if self.outcomes.exists() else ():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def ended(self) -> set[str]:
        """Ids of the tests that came to an end, or lost the device or their process."""
        return {line[key] for line in self.lines() for key in ("id", "lost") if key in line}

    def stuck(self) -> bool:
        """Whether its test has been running for too long."""
        started = [line for line in self.lines() if "start" in line][-1:]
        return any(s["start"] not in self.ended() and time.time() - s["at"] > _STUCK_S for s in started)

    def over(self) -> bool:
        """Whether there is nothing left to run."""
        if self.process.poll() is None and self.stuck():
            self.kill()
        status = self.process.poll()
        if status == DEVICE_LOST or (status is not None and status < 0 and self.bury()):
            self.start()
            return False
        return status is not None

    def bury(self) -> bool:
        """Record the test that took its process down as lost; whether there was one."""
        started = [line["start"] for line in self.lines() if "start" in line]
        if not started or started[-1] in self.ended():
            return False
        with self.outcomes.open("a") as file:
            file.write("\n" + json.dumps({"lost": started[-1]}) + "\n")
        return True

    @property
    def broken(self) -> str | None:
        """How pytest ended, where it was not with its tests run."""
        status = self.process.poll()
        usual = (None, 0, 1, 2, 5, -signal.SIGINT, -signal.SIGKILL)  # 2: asked to end; 5: no tests for it
        return None if status in usual else f"process {self.index} ended with {status}"

    def stop(self) -> None:
        """Ask pytest to end, which prints the failures so far."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(
    out: Path,
    deadline: float,
    processes: int | None = None,
    tests: Sequence[str] = TESTS,
    only: str = _ONLY,
    root: Path | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda counts: None,
    poll_s: float = 1.0,
) -> dict[str, Any]:
    """Run the tests until they are through or the deadline comes; output goes to out/tests.log.

    Args:
        out: folder.
        deadline: in seconds since the epoch.
        processes: how many at once; by default all cores but two, at most 14: kernels compile on one each.
        tests: paths in the clone.
        only: pytest's -k.
        root: the clone.
        keep: is given the counts again and again.
        poll_s: how often.

    Returns:
        ``collected``, ``passed``, ``failed``, ``skipped``, ``failures`` (ids), ``lost`` (ids of tests that took the
        device or their process down), ``broken`` (processes that ended otherwise), ``complete``; or ``note`` alone,
        saying why nothing was run.
    """
    root = root or clone()
    if root is None or (note := why_not(root)) is not None:
        return {"note": note if root else why_not(None)}
    count = processes or max(1, min(14, (os.cpu_count() or 2) - 2))
    tests = [path for path in tests if (root / path).exists()]
    folder = Path(tempfile.mkdtemp(prefix="tests-", dir=out))
    shards = [_Shard(root, folder, index, count, tests, only) for index in range(count)]
    try:
        while sum(not shard.over() for shard in shards) and time.time() < deadline - _GRACE_S:
            keep(counts(shards))
            time.sleep(poll_s)
        for shard in shards:
            shard.stop()
        while any(shard.process.poll() is None for shard in shards) and time.time() < deadline:
            time.sleep(0.1)
    finally:
        for shard in shards:
            shard.kill()
        found = counts(shards)
        with (out / "tests.log").open("wb") as log:
            for shard in shards:
                log.write(f"==== process {shard.index}\n".encode() + shard.log.read_bytes())
        shutil.rmtree(folder, ignore_errors=True)
    return found


def counts(shards: Sequence[_Shard]) -> dict[str, Any]:
    """What the processes found so far."""
    outcomes: dict[str, str] = {}
    lost: list[str] = []
    collected = 0
    for shard in shards:
        for line in shard.lines():
            collected += line.get("collected", 0)
            if "lost" in line:
                lost.append(line["lost"])
                outcomes[line["lost"]] = "failed"
            if "id" in line and outcomes.get(line["id"]) != "failed":
                outcomes[line["id"]] = line["outcome"]
    number = {o: sum(v == o for v in outcomes.values()) for o in ("passed", "failed", "skipped")}
    failures = sorted(i for i, outcome in outcomes.items() if outcome == "failed")
    broken = [found for shard in shards if (found := shard.broken)]
    complete = 0 < collected == len(outcomes) and not broken
    return {
        **{"collected": collected, **number, "failures": failures, "lost": lost},
        **{"broken": broken, "complete": complete},
    }


def line(found: dict[str, Any]) -> str:
    """Counts in words."""
    if "note" in found:
        return str(found["note"])
    text = f"{found['passed']:,} passed, {found['failed']:,} failed, {found['skipped']:,} skipped"
    left = found["collected"] - found["passed"] - found["failed"] - found["skipped"]
    text += f", {left:,} of {found['collected']:,} not reached" if left > 0 else ""
    return "; ".join([text, *found["broken"]])
