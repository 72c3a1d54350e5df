"""``python -m dico_kernels``: what is installed, and reports of benchmark results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

_EXAMPLES = """examples:
  python -m dico_kernels info
  python -m dico_kernels info --json
  python -m dico_kernels aot --targets sm_90                     compile the Triton kernels without a GPU
  pytest benchmarks/ --benchmark-only                            measure (in a clone)
  python -m dico_kernels bench gpu --out gpu-report/             a GPU's ceilings, kernels and models in 9 minutes
  python -m dico_kernels bench report bench-results/*.json       the same tables again, as Markdown
  python -m dico_kernels bench report FILE... --out report/      Markdown and PNG plots into a folder
"""


_GPU_EXAMPLES = """examples:
  python -m dico_kernels bench gpu --out gpu-report/             everything, in under 9 minutes
  python -m dico_kernels bench gpu --out gpu-report/             again: what was left for want of time
  python -m dico_kernels bench gpu --stages kernels --minutes 3  one stage, shorter
  python -m dico_kernels bench report gpu-report/gpu.json        the same tables again, as Markdown
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0, or 2 for arguments that cannot be used)."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and getattr(args, "run", None) is not _aot:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    if not hasattr(args, "run"):
        return _help(parser)
    return int(args.run(args))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m dico_kernels",
        description="Fused kernels for convolutional diffusion models.",
        epilog=_EXAMPLES,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    info = commands.add_parser("info", help="what was built, what is missing and what that costs")
    info.add_argument("--json", action="store_true", help="machine-readable")
    info.set_defaults(run=_info)

    aot = commands.add_parser(
        "aot", help="compile every Triton kernel for GPUs that need not be there, against a budget", add_help=False
    )
    aot.set_defaults(run=_aot)

    bench = commands.add_parser("bench", help="benchmark results", epilog=_EXAMPLES, formatter_class=raw)
    bench.set_defaults(run=lambda args: _help(bench))
    actions = bench.add_subparsers(title="actions", metavar="ACTION")
    report = actions.add_parser(
        "report", help="Markdown tables and PNG plots of result files", epilog=_EXAMPLES, formatter_class=raw
    )
    report.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON that `pytest benchmarks/` wrote")
    report.add_argument("--out", type=Path, help="folder for report.md and plots; default: Markdown to the terminal")
    report.set_defaults(run=_report)
    gpu = actions.add_parser(
        "gpu",
        help="tests, ceilings, kernels and models of this machine's GPU, within a time budget",
        description="Tests (in a clone), the card's ceilings, every fused op and whole models, the most important "
        "first. Installs nothing. Results are kept after every row; the same folder again, on the same device and "
        "commit, goes on with what is missing. Unverified until run on a GPU.",
        epilog=_GPU_EXAMPLES,
        formatter_class=raw,
    )
    gpu.add_argument("--out", type=Path, default=Path("bench-gpu"), help="folder for gpu.json, report.md and logs")
    gpu.add_argument("--stages", default="tests,ceilings,kernels,models", help="default: %(default)s")
    gpu.add_argument("--minutes", type=float, default=8.5, help="of all stages together (default: %(default)s)")
    gpu.set_defaults(run=_gpu)
    return parser


def _help(parser: argparse.ArgumentParser) -> int:
    parser.print_help()
    return 2


def _aot(args: argparse.Namespace) -> int:
    """The gate has a parser of its own, since it may have to start itself again without Triton's interpreter."""
    from dico_kernels import aot

    return aot.main(args.rest)


def _info(args: argparse.Namespace) -> int:
    from dico_kernels.info import build_info, render

    info = build_info()
    print(json.dumps(info, indent=2) if args.json else render(info))
    return 0


def _gpu(args: argparse.Namespace) -> int:
    from dico_kernels.benchmarks import gpu

    return gpu.main(args)


def _report(args: argparse.Namespace) -> int:
    from dico_kernels.benchmarks import report

    try:
        results = [report.load(path) for path in args.files]
        if args.out is None:
            print("\n\n".join(report.markdown(result) for result in results))
        else:
            for path in report.write(results, args.out):
                print(path)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
