"""Which GPU architectures a compiled library holds device code for, read from the file itself.

Needs neither a GPU nor the CUDA tools, so that ``build_info`` reports what is inside and not what was asked for.
Format: the fatbin container that nvcc embeds (a header, then one entry an architecture, PTX or machine code).
"""

from __future__ import annotations

import struct
from pathlib import Path

_MAGIC = struct.pack("<I", 0xBA55ED50)
_PTX, _MACHINE_CODE = 1, 2
_MAX_ARCH = 999
# Bit of an entry's flags word that marks architecture-specific code (the "a" of sm_90a).
_FLAG_ARCH_SPECIFIC = 1 << 20


def device_code(library: str | Path) -> list[str]:
    """Architectures in a library, sorted: ``["sm_80", "sm_90a", "compute_100"]``; empty when there is none.

    ``sm_`` is machine code, ``compute_`` PTX that a driver compiles for newer cards.

    Args:
        library: path of a shared library or object file.
    """
    data = Path(library).read_bytes()
    found: set[tuple[int, str]] = set()
    start = data.find(_MAGIC)
    while start >= 0:
        header_size, body_size = struct.unpack_from("<HQ", data, start + 6)
        entry, end = start + header_size, start + header_size + body_size
        while entry + 64 <= min(end, len(data)):
            kind, _, entry_header, payload = struct.unpack_from("<HHIQ", data, entry)
            (arch,) = struct.unpack_from("<I", data, entry + 28)
            (flags,) = struct.unpack_from("<Q", data, entry + 40)
            if kind not in (_PTX, _MACHINE_CODE) or not 0 < arch <= _MAX_ARCH or entry_header < 64:
                break
            suffix = "a" if flags & _FLAG_ARCH_SPECIFIC else ""
            found.add((arch, f"{'sm' if kind == _MACHINE_CODE else 'compute'}_{arch}{suffix}"))
            entry += entry_header + payload
        start = data.find(_MAGIC, start + 4)
    return [name for _, name in sorted(found)]
