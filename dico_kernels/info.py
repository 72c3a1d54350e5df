"""What was built, what is installed, and what is missing with what that costs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

from dico_kernels import native
from dico_kernels.fatbin import device_code
from dico_kernels.version import __version__


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def source() -> str:
    """A digest of the package's Python, for where there is no commit or it is not all: changes are another source."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def build_info() -> dict[str, Any]:
    """What this installation holds.

    Where torch sees a GPU, asking for its name initialises CUDA in this process, as anything on the GPU would: a
    process that is still to fork workers for CUDA calls this afterwards, or in a process of its own.

    Returns:
        A dictionary of JSON types:
        ``version``, ``python``, ``platform``, ``torch``, ``triton`` (None when absent);
        ``native``: None with ``native_missing`` saying why, or ``compiler``, ``openmp`` (bool), ``isas`` (runnable
        CPU instruction sets, best first), ``isas_compiled``, ``isa`` (in use), ``cuda`` (the nvcc used, or why none),
        ``device_code`` (GPU architectures found in the binary itself);
        ``gpu``: the current CUDA device's name, or None.
    """
    info: dict[str, Any] = {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "torch": str(torch.__version__),
        "triton": _installed("triton"),
        "native": None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    if not native.available():
        info["native_missing"] = native.why_unavailable
        return info
    module, built = native.extension(), native.build()
    info["native"] = {
        "compiler": built["compiler"],
        "openmp": bool(built["openmp"]),
        "isas": native.isas(),
        "isas_compiled": list(module.compiled_isas()),
        "isa": module.selected_isa(),
        "cuda": built["cuda"],
        "device_code": device_code(module.__file__),
    }
    return info


def missing(info: dict[str, Any]) -> list[tuple[str, str]]:
    """(what is missing, what that costs and how to get it) for a build_info()."""
    found: list[tuple[str, str]] = []
    built = info["native"]
    if built is None:
        found.append(("native kernels", f"CPU and CUDA kernels cannot run: {info['native_missing']}"))
    else:
        if not built["openmp"]:
            found.append(("OpenMP", "CPU kernels run on one thread; install your compiler's OpenMP and reinstall"))
        if not built["device_code"]:
            found.append(
                (
                    "CUDA kernels",
                    f"the C++ CUDA kernels are left out ({built['cuda']}); Triton kernels do not need them. "
                    "Put nvcc on PATH and reinstall to add them",
                )
            )
    if info["triton"] is None:
        found.append(
            (
                "Triton",
                "no Triton kernels: on a GPU only the CUDA ones remain; pip install triton (Linux only)",
            )
        )
    if info["gpu"] is None:
        found.append(("GPU", "torch sees no CUDA device; everything runs on the CPU"))
    return found


def render(info: dict[str, Any]) -> str:
    """A build_info() as text for a terminal."""
    rows = [("dico_kernels", info["version"]), ("Python", f"{info['python']} on {info['platform']}")]
    rows += [("torch", info["torch"]), ("Triton", info["triton"] or "-")]
    if built := info["native"]:
        threads = "OpenMP" if built["openmp"] else "one thread"
        rows += [
            ("native", f"{built['compiler']}, {threads}"),
            ("CPU kernels", ", ".join(built["isas_compiled"]) + f" (using {built['isa']})"),
            ("CUDA kernels", ", ".join(built["device_code"]) or "-"),
            ("built with", built["cuda"]),
        ]
    rows.append(("GPU", info["gpu"] or "-"))
    lines = [f"{name:<14}{value}" for name, value in rows]
    if gaps := missing(info):
        lines += ["", "Missing, and what it costs:"]
        lines += [f"  {name}: {cost}" for name, cost in gaps]
    else:
        lines += ["", "Nothing is missing."]
    return "\n".join(lines)
