"""What several test files need: error measures, golden data, and the package as a changed copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dico_kernels
import dico_kernels.reference
from dico_kernels.reference.weights import named_input

ROOT = Path(__file__).resolve().parent.parent
# Kinds of devices there are; the last is where Triton runs, by its interpreter if that is the CPU.
PLACES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DEVICE = PLACES[-1]
EPS = torch.finfo(torch.float32).eps
GOLDEN = ROOT / "tests" / "golden"
REFERENCE_DIR = Path(dico_kernels.reference.__file__).parent


def added_up(parts: Tensor) -> Tensor:
    """(N, C) of the sums over pixels that a Triton kernel leaves in (N, parts, C)."""
    assert parts.ndim == 3
    assert parts.is_contiguous()
    assert parts.dtype in (torch.float32, torch.float64)
    return parts.sum(1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the context, operators use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    """A fresh interpreter with this environment's packages; no worker of a parallel run, whose benchmarks are off."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def cmake(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The cmake of this environment's package, told where this environment's Python, ninja and pybind11 are."""
    import cmake as package
    import ninja
    import pybind11

    found = [
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    return subprocess.run(
        [Path(package.CMAKE_BIN_DIR) / "cmake", *args, *([] if "--build" in args else found)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
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


def run_tests(copy: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run tests, named from the project's root, on a copied package, up to the first that fails."""
    paths = [str(ROOT / a) if a.startswith("tests/") else a for a in arguments]
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    return run_python("-m", "pytest", *options, *paths, cwd=Path("/"), PYTHONPATH=str(copy.parent), **env)


def assert_noticed(bug: str, tests: str, copy: Path, **env: str) -> None:
    """Run tests (a file or test, perhaps narrowed by -k) on a copied package: a comparison in them has to fail."""
    path, _, only = tests.partition(" -k ")
    done = run_tests(copy, path, "-k", only or "not test_macs", **env)
    assert done.returncode == 1, f"no test noticed: {bug}\n{done.stdout[-2000:]}"
    # By comparison, not by falling over: pytest ends a failed assertion's report so.
    assert "AssertionError" in done.stdout, done.stdout[-2000:]


def plant(path: Path, source: str, bug: str) -> None:
    """Change the one place in a file that reads like this."""
    text = path.read_text()
    assert text.count(source) == 1, f"{source!r} is {text.count(source)} times in {path.name}, not once: move the bug"
    path.write_text(text.replace(source, bug))


def results(model: nn.Module, inputs: Sequence[Tensor], **forward: Any) -> dict[str, Tensor]:
    """The output and every gradient, of the input first."""
    model.zero_grad()
    x = inputs[0].detach().clone().requires_grad_()
    out = model(x, *inputs[1:], **forward)
    weights = named_input(tuple(out.shape), "input.grad_out").to(out)
    (out * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "x": x.grad, **gradients}


def assert_within_budget(
    fused: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], band: float = 4 * EPS
) -> None:
    """At most twice eager's error, plus roundings; gradients of weights sum over pixels, whose error is eager's."""
    assert fused.keys() == eager.keys() == truth.keys()
    for key, value in truth.items():
        if value.norm() > 1e-9:
            assert rel_rms(fused[key], value) <= 2 * rel_rms(eager[key], value) + band, key


def saved_bytes(fn: Callable[..., Tensor], arguments: Sequence[Any], parameters: Iterable[Tensor]) -> int:
    """Bytes of the unique storages that autograd keeps for fn(*arguments), those of parameters apart."""
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    apart = {p.untyped_storage().data_ptr() for p in parameters}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fn(*arguments)
    assert out.requires_grad
    return sum(size for pointer, size in held.items() if pointer not in apart)


def conditioning(n: int, c: int, dtype: torch.dtype, count: int = 2) -> list[Tensor]:
    return [torch.randn(n, c, dtype=torch.float64).to(dtype) for _ in range(count)]
