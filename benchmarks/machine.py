"""What a result was measured on: device, clocks, versions, commit, flags."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from dico_kernels import build_info
from dico_kernels.info import cpu_name, source


def _output(*command: str) -> str | None:
    """A command's first line, or None where it is not there or fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _commit() -> str | None:
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def device() -> torch.device:
    """Where benchmarks run: the current CUDA device if torch sees one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def describe() -> dict[str, Any]:
    """A dictionary of JSON types that identifies the machine and the software."""
    where = device()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else cpu_name(),
        "kind": where.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "source": source(),
        "build": build_info(),
        "flags": "fp32 and bf16: matmul precision highest, cuDNN TF32 on (torch's defaults); tf32: high, on",
    }
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        found |= {
            "processors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "-i", _uuid(where), "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def _uuid(device: torch.device) -> str:
    """What nvidia-smi calls a device: its own numbering ignores CUDA_VISIBLE_DEVICES."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def clocks(device: torch.device) -> str | None:
    """Clocks now: ask right after timing, before the device idles. A CPU's are the highest of its cores'."""
    if device.type == "cuda":
        query = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
        return _output("nvidia-smi", "-i", _uuid(device), f"--query-gpu={query}", "--format=csv,noheader")
    try:
        found = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return None
    return f"{round(max(map(float, found)))} MHz" if found else None


def keep_heap() -> bool:
    """Let the C library keep freed memory for the next allocation, for all contenders alike; whether it will.

    glibc by default gives the top of its heap back to the system whenever enough of it is free, so whether an op's
    fresh pages are counted in its time is decided by what was freed before it, and changes from run to run by a
    factor of three. PyTorch's tuning guide advises a caching allocator on CPUs for that reason. This favours whoever
    allocates most: the unfused contenders.
    """
    try:
        c = ctypes.CDLL("libc.so.6")
        threshold, trim = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        return bool(c.mallopt(threshold, 1 << 30) and c.mallopt(trim, (1 << 31) - 1))
    except (OSError, AttributeError):
        return False
