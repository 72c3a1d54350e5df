"""A pytest plugin: run a share of the tests, and write down each outcome as it comes.

    DICO_KERNELS_SHARD=INDEX/COUNT/SKIP/FILE pytest -p dico_kernels.benchmarks.gpu_shard ...

The share is every COUNT-th test of an order that mixes files, so that a run that is cut short has seen some of each;
its first SKIP tests are left out. Where the GPU takes no more work after a test, pytest ends with status DEVICE_LOST.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE_LOST = 70
VARIABLE = "DICO_KERNELS_SHARD"
_INDEX, _COUNT, _SKIP, _FILE = (os.environ.get(VARIABLE) or "0/1/0/").split("/", 3)


def _write(**line: Any) -> None:
    with Path(_FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep this share of what -k left."""
    items.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
    items[:] = items[int(_INDEX) :: int(_COUNT)]
    if _SKIP == "0":
        _write(collected=len(items))
    items[:] = items[int(_SKIP) :]


def pytest_runtest_logstart(nodeid: str) -> None:
    """Write down what is running, and since when, for whoever finds this process dead, or has to end it."""
    _write(start=nodeid, at=time.time())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write down an outcome: "passed", "failed" or "skipped"."""
    if report.when == "call" or report.outcome != "passed":
        _write(id=report.nodeid, outcome=report.outcome)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Stop where the device is lost: every later test would fail without cause."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            _write(lost=item.nodeid)
            pytest.exit(f"{item.nodeid}: the device is lost: {error}", returncode=DEVICE_LOST)
