"""What several test files need: error measures, golden data, and the package as a changed copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import dico_kernels
import dico_kernels.reference

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
REFERENCE_DIR = Path(dico_kernels.reference.__file__).parent


def rel_rms(actual: Tensor, expected: Tensor) -> float:
    """rms(actual - expected) / rms(expected); NaN anywhere gives NaN, which fails every comparison."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


@cache
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@cache
def layouts() -> dict[str, dict[str, list[int]]]:
    return json.loads((GOLDEN / "state_dict_layout.json").read_text())


def run_python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with this environment's packages."""
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def copy_package(target: Path) -> Path:
    """A copy of the package's Python files and extension, importable with PYTHONPATH=target."""
    import shutil

    package = target / "dico_kernels"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(dico_kernels.__file__).parent, package, ignore=ignore, dirs_exist_ok=True)
    shutil.copytree(REFERENCE_DIR, package / "reference", ignore=ignore, dirs_exist_ok=True)
    return package


def conditioning(n: int, c: int, dtype: torch.dtype, count: int = 2) -> list[Tensor]:
    return [torch.randn(n, c, dtype=torch.float64).to(dtype) for _ in range(count)]
