"""Ahead-of-time compile gate: every Triton kernel, for GPUs that need not be there, against a written budget.

The launches are taken from the launchers themselves, run on meta tensors: what is compiled here is what a call with
that shape would run. Registers, spills and shared memory are compared with aot_budgets.json, per Triton version; more
than the budget is a failure, and so is an address computed in 32 bits (N * H * W * C exceeds 2^31).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dico_kernels._sass import loop_spills, overwritten, serialised
from dico_kernels.reference import dico, fcdm

if TYPE_CHECKING:
    from dico_kernels.kernels.common import Launch

BUDGETS = Path(__file__).with_name("aot_budgets.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_EXAMPLES = """examples:
  python -m dico_kernels aot                                    every kernel, every target
  python -m dico_kernels aot --targets sm_90 --kernels depthwise
  python -m dico_kernels aot --update                           write what was measured as the new budget
"""
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int64: "i64",
}
_LDS = 1 << 16  # bytes of an MI300's compute unit


@dataclass(frozen=True)
class Kernel:
    """One kernel in one configuration; `label` names it in the table and in the budget."""

    label: str
    launch: Launch
    dtype: torch.dtype


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes: registers a thread, spilled bytes a thread, shared bytes a block."""

    regs: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Result:
    """A compiled kernel, or why it did not compile.

    usage is None on targets that are only compiled for; wide: every address is 64-bit; serial: ptxas made each wgmma
    wait for the one before, which it does silently; slow: the loop has other faults, named.
    """

    label: str
    target: str
    usage: Usage | None = None
    wide: bool = False
    serial: bool = False
    slow: str = ""
    error: str = ""


def _label(launch: Launch, dtype: torch.dtype) -> str:
    constants = [
        name if value is True else f"{name}={value}"
        for name, value in launch.constants.items()
        if name not in ("ACC", "TYPE") and value is not False
    ]
    name = launch.kernel.__name__.removeprefix("_").removesuffix("_kernel")
    limit = [] if launch.maxnreg is None else [f"maxnreg={launch.maxnreg}"]
    return " ".join([name, _TYPES[dtype], *constants, *_unusual(launch, dtype), f"warps={launch.num_warps}", *limit])


def _unusual(launch: Launch, dtype: torch.dtype) -> list[str]:
    """The arguments that make another kernel of a launch: widths that 16 does not divide, a bias of another type."""
    found: dict[str, None] = {}
    for name, value, specialised in _arguments(launch):
        if isinstance(value, int) and specialised and value % 16 != 0:
            found[f"{name.rstrip('012345678')}={'1' if value == 1 else 'odd'}"] = None
        if name == "bias" and isinstance(value, torch.Tensor) and value.dtype not in (dtype, torch.int64):
            found[f"bias={_TYPES[value.dtype]}"] = None
    return list(found)


def _arguments(launch: Launch) -> Iterator[tuple[str, Any, bool]]:
    """Name and value of each argument that is no constant, and whether Triton looks for 1 and multiples of 16 in it."""
    from dico_kernels.kernels.common import is_count

    for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
        yield name, value, not is_count(name)


@cache
def kernels() -> dict[str, Kernel]:
    """Every kernel to compile, by label: all levels of DiCo and FCDM in bf16, some in other types, and odd widths."""
    from dico_kernels import _aot_calls as calls_of
    from dico_kernels.kernels.common import record

    found: dict[str, Kernel] = {}

    def add(calls: Iterable[partial[Any]], dtype: torch.dtype, capability: int) -> None:
        for call in calls:
            with record(capability) as launches:
                call()
            for launch in launches:
                label = _label(launch, dtype)
                first = found.setdefault(label, Kernel(label, launch, dtype)).launch
                if first is not launch and _specialised(first) != _specialised(launch):
                    raise RuntimeError(
                        f"two kernels have one label, {label}: {_specialised(first)}, {_specialised(launch)}"
                    )

    levels = [(torch.bfloat16, 64, c, size) for c, size in ((128, 32), (416, 32), (832, 16))]
    levels += [(torch.float32, 64, c, size) for c, size in ((128, 32), (416, 32), (832, 16))]
    # One pixel of one channel: Triton turns arguments equal to 1 into constants, a code path of its own.
    levels += [(torch.float64, 64, 416, 32), (torch.bfloat16, 1, 1, 1)]
    # Rows that no vector of 16 bytes divides, of images that no tile does.
    levels.append((torch.bfloat16, 64, 100, 15))
    precision = torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "high"):
            torch.set_float32_matmul_precision(setting)
            for dtype, n, c, size in levels:
                add(calls_of.every_launcher(dtype, n, c, size), dtype, 0)
            for capability in (80, 90):
                add(calls_of.products(torch.float32, 64, 416, 32), torch.float32, capability)
        # tiles of one sample, of two, and of any number; for GPUs without and with TMA, and for Hopper's wgmma
        for capability in (80, 90, 100):
            for n, c, size in ((64, 416, 32), (256, 1664, 8), (64, 416, 15)):
                add(calls_of.products(torch.bfloat16, n, c, size), torch.bfloat16, capability)
        add(calls_of.products(torch.float64, 64, 416, 32), torch.float64, 90)
        # as models call them for Hopper: every level of the published ones, for images of 256 and of 512 pixels
        for calls, variants in ((calls_of.branches, dico.VARIANTS), (calls_of.fcdm_branch, fcdm.VARIANTS)):
            widths = {config["hidden_size"] for config in variants.values()}
            for n, side, level, c in itertools.product((1 << i for i in range(9)), (32, 64), range(3), sorted(widths)):
                add(calls(torch.bfloat16, n, c << level, side >> level), torch.bfloat16, 90)
            add(calls(torch.float16, 64, min(widths), 32), torch.float16, 90)
            for side in (15, 32):
                add(calls(torch.bfloat16, 64, 100, side), torch.bfloat16, 90)
    finally:
        torch.set_float32_matmul_precision(precision)
    return found


def _wanted(kernel: Kernel, target: str) -> bool:
    constants = kernel.launch.constants
    # What a launcher adds for wgmma's sake is for Hopper alone, and nothing else is for Hopper where it adds that.
    if constants.get("DRAIN"):
        return target == "sm_90"
    in_registers = constants.get("PROLOGUE", "none") != "none"
    if target == "sm_90" and in_registers and (kernel.dtype.itemsize == 2 or constants["PRECISION"] == "tf32"):
        return False
    # The launcher takes TMA where the device has it; float32 does without.
    tma = constants.get("TMA")
    if kernel.dtype.itemsize == 2 and tma is not None and tma != (target in ("sm_90", "sm_100")):
        return False
    # float64 is for checking, float16 is bfloat16 but for its type, few rows have odd lengths, and AMD is a smoke
    # test: one target, and one type, are enough for those.
    if kernel.dtype in (torch.float64, torch.float16) or re.search(" [CNKS]=odd", kernel.label):
        return target == "sm_90"
    return target != "gfx942" or kernel.dtype == torch.bfloat16


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """(types, constants, attributes) that Triton's own call would compile: 1 is a constant, multiples of 16 marked."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    names = launch.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (name, value, specialised) in enumerate(_arguments(launch)):
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
            continue
        tensor = isinstance(value, torch.Tensor)
        if value is None or (not tensor and value == 1 and specialised):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = "*" + _TYPES[value.dtype] if tensor else "i32" if value < 2**31 else "i64"
        if tensor or (value % 16 == 0 and specialised):
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in launch.constants.items():
        signature[name], constants[(names.index(name),)] = "constexpr", value
    return signature, constants, attributes


def _source(launch: Launch) -> Any:
    from triton.compiler import ASTSource

    return ASTSource(launch.kernel, *_specialised(launch))


def narrow_offsets(ttir: str) -> list[str]:
    """The address computations of a kernel in Triton IR that are not 64-bit from the first multiplication on.

    An offset has to be i64, and nothing that was widened to i64 on the way may come from a 32-bit product with a
    run-time factor. Values cut down to 32 bits on purpose (positions within one image) are where the walk stops.
    """
    definition = {}
    for line in ttir.splitlines():
        if match := re.match(r"\s*(%[\w$.-]+)(?::\d+)? = ", line):
            definition[match[1]] = line
    found = []
    for line in ttir.splitlines():
        if not (match := re.search(r"= tt\.addptr (%\S+), (%\S+) : (.*)", line)):
            continue
        offset_type = re.sub(r"\s*loc\(.*", "", match[3])
        if not re.search(r"[x ]i64>?$", offset_type):
            found.append(line.strip())
            continue
        todo, seen = [match[2]], set()
        while todo:
            value = todo.pop().split("#")[0]
            if value in seen or value not in definition:
                continue
            seen.add(value)
            made = definition[value]
            if "arith.trunci" in made or "= scf." in made:
                continue
            operands = re.findall(r"%[\w$.#-]+", made.split(" = ", 1)[1].split(" : ")[0])
            product = re.search(r"= arith\.muli .* : (?:tensor<[\dx]*)?i32>?(?: |$)", made)
            if product and not any("arith.constant" in definition.get(o, "") for o in operands):
                found.append(made.strip())
            todo += operands
    return found


def _dump(tool: Any, option: str, cubin: bytes) -> str:
    """What one of the tools bundled with Triton says about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool.path, option, file.name], capture_output=True, text=True, check=True).stdout


def _faults(launch: Launch, target: str, asm: Any, sass: str) -> str:
    """What keeps a product that is made for tensor cores from them, or makes it wrong."""
    matrix = {"sm_90": "wgmma", "sm_100": "tcgen05.mma"}.get(target)
    # which take at least 64 rows
    if launch.constants.get("TMA") and launch.constants["BM"] >= 64 and matrix and matrix not in asm["ptx"]:
        return f"no {matrix} instruction"
    if early := overwritten(sass):
        return f"overwrites what a wgmma in flight reads: {early[0]}"
    return "registers spill in the loop" if loop_spills(sass) else ""


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, spilled bytes) a thread."""
    import triton

    text = _dump(triton.knobs.nvidia.cuobjdump, "-res-usage", cubin)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], max(usage["STACK"], usage["LOCAL"])


def _compile(job: tuple[str, str]) -> Result:
    import triton
    from triton.backends.compiler import GPUTarget

    from dico_kernels.kernels.common import OPTIONS

    label, target = job
    launch = kernels()[label].launch
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "maxnreg": launch.maxnreg, **OPTIONS}
    try:
        compiled = triton.compile(_source(launch), target=gpu, options=options)
        wide = not narrow_offsets(compiled.asm["ttir"])
        if target.startswith("gfx"):
            shared = compiled.metadata.shared
            error = f"{shared} bytes of shared memory, of {_LDS} there are" if shared > _LDS else ""
            return Result(label, target, None, wide, error=error)
        regs, spills = _resources(compiled.asm["cubin"])
        sass = ""
        if "wgmma" in compiled.asm["ptx"]:
            sass = _dump(triton.knobs.nvidia.nvdisasm, "-c", compiled.asm["cubin"])
        usage = Usage(regs, spills, compiled.metadata.shared)
        return Result(label, target, usage, wide, serialised(sass), _faults(launch, target, compiled.asm, sass))
    except Exception as error:  # whatever the compiler raises is the finding
        return Result(label, target, error=f"{type(error).__name__}: {str(error).strip()[-2000:]}")


def compile_all(
    targets: Sequence[str] = TARGETS, substring: str = "", jobs: int = 2, progress: bool = False
) -> list[Result]:
    """Compile every kernel whose label contains `substring` for the targets; sorted by label, then target.

    Needs a process without TRITON_INTERPRET. Raises ValueError for an unknown target or where no kernel matches.
    """
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise ValueError(f"unknown target {', '.join(unknown)}: expected some of {', '.join(TARGETS)}")
    wanted = [
        (label, target)
        for label, kernel in kernels().items()
        if substring in label
        for target in targets
        if _wanted(kernel, target)
    ]
    if not wanted:
        names = sorted({label.split()[0] for label in kernels()})
        raise ValueError(f"no kernel matches {substring!r}: the kernels are {', '.join(names)}")
    # fork would copy torch's threads in whatever state they are
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(wanted))) as pool:
        return sorted(_counted(pool.imap_unordered(_compile, wanted), len(wanted), progress), key=_order)


def _order(result: Result) -> tuple[str, int]:
    return result.label, TARGETS.index(result.target)


def _counted(results: Iterable[Result], total: int, progress: bool) -> Iterator[Result]:
    terminal = sys.stderr.isatty()
    for done, result in enumerate(results, 1):
        # a log gets a line every tenth, a terminal one line that counts
        if progress and (terminal or done % max(total // 10, 1) == 0 or done == total):
            end = "\n" if done == total or not terminal else ""
            print(f"{chr(13) if terminal else ''}{done}/{total} compiled", end=end, file=sys.stderr, flush=True)
        yield result


def _key(result: Result) -> str:
    return f"{result.label} @ {result.target}"


def problems(result: Result, budget: dict[str, dict[str, int]] | None) -> list[str]:
    """What is wrong with a result; budget maps keys to regs, spills and shared, None where a version has none."""
    if result.error:
        return [result.error]
    found = [] if result.wide else ["an address is computed in 32 bits"]
    if result.serial:
        found.append("each wgmma waits for the one before")
    if result.slow:
        found.append(result.slow)
    if result.usage is None or budget is None:
        return found
    allowed = budget.get(_key(result))
    if allowed is None:
        return [*found, "not in the budget (--update writes it)"]
    for name, value in vars(result.usage).items():
        if value > allowed[name]:
            found.append(f"{name} {value}, budget {allowed[name]}")
    return found


def table(results: Sequence[Result], budget: dict[str, dict[str, int]] | None) -> str:
    """The results as aligned text, one line a kernel and target."""
    lines = [("kernel", "target", "regs", "spills", "shared KiB", "64-bit", "budget", "ok")]
    for result in results:
        usage, allowed = result.usage, (budget or {}).get(_key(result))
        numbers = (str(usage.regs), str(usage.spills), f"{usage.shared / 1024:.1f}") if usage else ("-", "-", "-")
        limit = f"{allowed['regs']}/{allowed['spills']}/{allowed['shared'] / 1024:.1f}" if allowed else "-"
        verdict = "FAIL" if problems(result, budget) else "ok"
        lines.append((result.label, result.target, *numbers, "yes" if result.wide else "NO", limit, verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _write(path: Path, version: str, results: Sequence[Result], everything: bool) -> None:
    budgets = json.loads(path.read_text()) if path.exists() else {}
    measured = {_key(result): vars(result.usage) for result in results if result.usage}
    # A partial run may only add or change; a full one also drops what no longer exists.
    merged = measured if everything else {**budgets.get(version, {}), **measured}
    budgets[version] = dict(sorted(merged.items()))
    path.write_text(json.dumps(budgets, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 when everything compiles within budget, 1 when not, 2 for arguments that cannot be used."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="python -m dico_kernels aot",
        description="Compile every Triton kernel ahead of time, without a GPU, and compare with the written budget.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--targets", nargs="+", default=list(TARGETS), metavar="TARGET", help=f"some of {' '.join(TARGETS)}")
    add("--kernels", default="", metavar="SUBSTRING", help="only kernels whose label contains this")
    add("--jobs", type=int, default=2, metavar="N", help="compile processes (default: 2)")
    add("--budgets", type=Path, default=BUDGETS, metavar="FILE", help="default: the package's own")
    add("--update", action="store_true", help="write the measured figures as the budget of this Triton version")
    args = parser.parse_args(argv)

    if os.environ.get("TRITON_INTERPRET"):
        # Decorated under the interpreter, a kernel cannot be compiled, and it is decorated once a process.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, "-m", "dico_kernels.aot", *argv], env=environment, check=False
        ).returncode

    import triton

    if not args.update and not args.budgets.exists():
        print(f"error: --budgets {args.budgets}: no such file", file=sys.stderr)
        return 2
    try:
        results = compile_all(args.targets, args.kernels, args.jobs, progress=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.update:
        _write(args.budgets, triton.__version__, results, not args.kernels and set(args.targets) == set(TARGETS))
    budgets = json.loads(args.budgets.read_text())
    budget = budgets.get(triton.__version__)
    print(table(results, budget))
    if budget is None:
        known = ", ".join(sorted(budgets)) or "none"
        print(f"no budget for Triton {triton.__version__} (there is: {known}): figures not compared")
    failed = 0
    for result in results:
        for problem in problems(result, budget):
            failed = 1
            print(f"FAIL {_key(result)}: {problem}")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
