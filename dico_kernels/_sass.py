"""What the machine code of a Hopper kernel shows of its matrix products: faults that ptxas makes without a word."""

from __future__ import annotations

import itertools
import re

_INSTRUCTION = re.compile(r"\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\S* gsb0, 0x([0-9a-f]+)\b")
_MATMUL_OR_WAIT = re.compile(r"\b(HGMMA)\b|WARPGROUP\.DEPBAR\S* gsb0, 0x0\b")


def serialised(sass: str) -> bool:
    """Whether everything in flight is waited for behind every wgmma instruction."""
    matmuls = [match[1] is not None for match in _MATMUL_OR_WAIT.finditer(sass)]
    return any(matmuls) and not any(a and b for a, b in itertools.pairwise([*matmuls, True]))


def loop(sass: str) -> list[str]:
    """The instructions of the innermost loop around wgmma; empty where there is none."""
    position: dict[str, int] = {}
    instructions: list[str] = []
    loops: list[list[str]] = []
    for line in sass.splitlines():
        if match := re.match(r"\s*(\.L\w+):", line):
            position[match[1]] = len(instructions)
        elif line.rstrip().endswith(";"):
            instructions.append(line)
            match = re.search(r"\bBRA\b.*?(\.L\w+)", line)
            if match and match[1] in position:
                loops.append(instructions[position[match[1]] :])
    # waits jump back from outside of the loop, which makes larger ones of it
    return min((found for found in loops if any("HGMMA" in line for line in found)), key=len, default=[])


def loop_spills(sass: str) -> int:
    """Accesses to spilled registers in the loop around wgmma."""
    return sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in loop(sass))


def written(line: str) -> range:
    """The general registers that an instruction writes."""
    match = _INSTRUCTION.match(line)
    if not match or "SETP" in match[1] or match[1].startswith("HGMMA"):
        return range(0)
    # An address in brackets, a uniform register or a barrier is no general register; predicates may come before it.
    target = re.match(r"(?:U?P\w+, )*R(\d+)\b", match[2])
    if not target:
        return range(0)
    count = 1
    if size := re.search(r"\.(64|96|128)\b", match[1]):
        count = int(size[1]) // 32
    elif matrices := re.search(r"^LDSM\S*\.([124])$", match[1]):
        count = int(matrices[1])
    elif ".WIDE" in match[1] or re.match(r"D(ADD|MUL|FMA)|CS2R(?!\.32)", match[1]):
        count = 2
    return range(int(target[1]), int(target[1]) + count)


def overwritten(sass: str) -> list[str]:
    """Instructions in the loop around wgmma that write what a wgmma in flight still reads.

    Its first factor may lie in registers, which it reads as it goes along: they are free only once a wait covers it.
    ptxas before 13.3 reuses them earlier.
    """
    found: list[str] = []
    flying: list[set[int]] = []  # what each committed group reads, the oldest first
    reads: set[int] = set()  # and what is not yet committed
    for line in loop(sass) * 2:  # what is in flight at the loop's end still is at its beginning
        if match := re.search(r"\bHGMMA\.\S+ +R\d+, R(\d+),", line):
            reads |= set(range(int(match[1]), int(match[1]) + 4))
        if "HGMMA" in line:
            if "gsb0" in line:
                flying, reads = [*flying, reads], set()
        elif match := _WAIT.search(line):
            kept = int(match[1], 16)
            flying = flying[-kept:] if kept else []
        elif any(register in group for register in written(line) for group in (*flying, reads)):
            found.append(line.strip())
    return sorted(set(found))
