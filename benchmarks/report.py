"""Tables and plots of benchmark results.

A result is what ``pytest benchmarks/ --benchmark-only`` writes: one JSON object with ``schema``, ``created``,
``preset``, ``machine``, ``ceilings``, ``models`` and ``halves`` (rows; seconds, bytes, images).
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 1
Row = dict[str, Any]
Result = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
UNFUSED = ("eager", "channels_last", "compile")
README_BEGIN, README_END = "<!-- bench:begin -->", "<!-- bench:end -->"


def load(path: Path) -> Result:
    """Read a result file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a result, or of another schema.
    """
    try:
        result = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); expected a file that `pytest benchmarks/` wrote") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        found = result.get("schema") if isinstance(result, dict) else type(result).__name__
        raise ValueError(f"{path}: schema {found!r}; expected a result of schema {SCHEMA}")
    if absent := [k for k in ("created", "preset", "machine", "ceilings", "models", "halves") if k not in result]:
        raise ValueError(f"{path}: lacks {', '.join(absent)}; expected a file that `pytest benchmarks/` wrote")
    return result


# ---- columns ----


def _number(value: float | None, form: str, otherwise: str = "-") -> str:
    return otherwise if value is None else form.format(value)


def _img_s(row: Row) -> str:
    if row.get("failure"):
        return "OOM" if row["failure"] == "OOM" else "failed"
    rate = row["img_s"]
    return _number(rate, "{:,.0f}" if rate and rate >= 100 else "{:.2f}")


_SHARED: list[Column] = [
    ("limit", lambda r: _number(r.get("share"), "{:.0%}")),
    ("peak MiB", lambda r: _number(r["peak_bytes"] / 2**20 if r.get("peak_bytes") is not None else None, "{:.0f}")),
    ("error", lambda r: _number(r.get("error"), "{:.1e}")),
    ("compile s", lambda r: _number(r.get("compile_s"), "{:.0f}")),
]
MODEL_COLUMNS: list[Column] = [
    ("model", lambda r: r["model"]),
    ("contender", lambda r: r["contender"]),
    ("dtype", lambda r: r["dtype"]),
    ("batch", lambda r: str(r["batch"])),
    ("img/s", _img_s),
    ("vs DiT", lambda r: _number(r.get("vs_dit"), "{:.2f}x")),
    ("vs plain", lambda r: _number(r.get("vs_plain"), "{:.2f}x")),
    *_SHARED,
]
HALF_COLUMNS: list[Column] = [
    ("half", lambda r: r["op"]),
    ("contender", lambda r: r["contender"]),
    ("dtype", lambda r: r["dtype"]),
    ("batch", lambda r: str(r["batch"])),
    ("tokens", lambda r: str(r["tokens"])),
    ("width", lambda r: str(r["width"])),
    ("ms", lambda r: _number(r["median_s"] and r["median_s"] * 1e3, "{:.2f}", "failed")),
    ("vs attn", lambda r: _number(r.get("vs_attention"), "{:.2f}x")),
    ("GMAC", lambda r: _number(r["macs"] and r["macs"] / 1e9, "{:.2f}")),
    *_SHARED,
]


OP_COLUMNS: list[Column] = [
    ("op", lambda r: r["op"]),
    ("mode", lambda r: r["mode"]),
    ("dtype", lambda r: r["dtype"]),
    ("shapes", lambda r: str(r["shapes"])),
    ("slowest", lambda r: _number(r["least"], "{:.2f}x")),
    ("median", lambda r: _number(r["median"], "{:.2f}x")),
    ("fastest", lambda r: _number(r["most"], "{:.2f}x")),
    ("slowest at", lambda r: r["where"]),
]


def _short_mode(row: Row) -> str:
    return "fwd+bwd" if row["mode"] == "forward+backward" else "fwd"


KERNEL_COLUMNS: list[Column] = [
    ("op", lambda r: r["op"]),
    ("contender", lambda r: r["contender"]),
    ("mode", _short_mode),
    ("shape", lambda r: f"{r.get('batch')}x{r.get('channels', '?')}x{r.get('side', '?')}^2"),
    ("ms", lambda r: _number(r["median_s"] and r["median_s"] * 1e3, "{:.3f}", "failed")),
    ("vs eager", lambda r: _number(r.get("vs_eager"), "{:.2f}x")),
    ("MB", lambda r: _number(r.get("moved") and r["moved"] / 1e6, "{:,.0f}")),
    ("launch us", lambda r: _number(r.get("host_s") and r["host_s"] * 1e6, "{:.0f}")),
    ("GB/s", lambda r: _number(_rate(r, "moved", 1e9), "{:,.0f}")),
    ("TFLOP/s", lambda r: _number(_rate(r, "macs", 0.5e12), "{:.1f}")),
    ("limit", lambda r: _number(r.get("share"), "{:.0%}")),
    ("by", lambda r: r.get("bound", "-")),
    ("error", lambda r: _number(r.get("error"), "{:.1e}")),
]


def _rate(row: Row, of: str, unit: float) -> float | None:
    return row[of] / row["median_s"] / unit if row.get(of) and row["median_s"] else None


def _op_summary(rows: list[Row]) -> list[Row]:
    """The fused contenders' speed over the best eager layout, over the shapes of each op, mode and dtype."""
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["contender"] not in UNFUSED and row.get("vs_eager") is not None:
            groups[row["op"], row["mode"], row["dtype"]].append(row)
    found = []
    for (op, mode, dtype), members in groups.items():
        members = sorted(members, key=lambda r: r["vs_eager"])
        slowest = members[0]
        found.append(
            {
                **{"op": op, "mode": mode, "dtype": dtype, "shapes": len(members), "arena": op},
                "least": slowest["vs_eager"],
                "median": statistics.median(r["vs_eager"] for r in members),
                "most": members[-1]["vs_eager"],
                "where": f"{slowest['size']} {slowest['batch']}x{slowest['channels']}x{slowest['side']}^2",
            }
        )
    return found


def tables(result: Result) -> list[tuple[str, list[Column], list[Row]]]:
    """(title, columns, rows) of every table of a result: one a resolution and mode, then the halves of blocks."""
    by_title: dict[str, list[Row]] = defaultdict(list)
    for row in result["models"]:
        side = row["resolution"] // 8
        by_title[f"{row['resolution']} px (latent {side}x{side}), {row['mode']}"].append(row)
    found = [(title, _used(MODEL_COLUMNS, rows), rows) for title, rows in by_title.items()]
    if result["halves"]:
        title = "DiCo's convolution half against DiT's attention half, equal tokens and width"
        found.append((title, _used(HALF_COLUMNS, result["halves"]), result["halves"]))
    ops = [r for r in result.get("ops", []) if not r["op"].endswith("_block") or r["contender"] in ("native", "triton")]
    if ops:
        fused = next(r["contender"] for r in ops if r["contender"] not in UNFUSED)
        title = f"fused ops ({fused}) against the faster of eager NCHW and channels_last, over level shapes"
        found.append((title, OP_COLUMNS, _op_summary(ops)))
    blocks = [r for r in result.get("ops", []) if r not in ops]
    if blocks:
        targets = BLOCK_TARGETS if (result["machine"]["kind"], result["preset"]) == ("cpu", "blocks") else {}
        rows = _by_block(blocks, targets)
        found.append((BLOCK_TITLE, _used(BLOCK_COLUMNS, rows), rows))
    if result.get("kernels"):
        title = "fused ops against eager channels_last, on the device alone; launch: what a call takes its caller"
        title += "\nMB: least bytes; limit: of the copy or matmul rate, as by says"
        found.append((title, _used(KERNEL_COLUMNS, result["kernels"]), result["kernels"]))
    return found


def _by_block(rows: list[Row], targets: dict[tuple[str, str], float]) -> list[Row]:
    """One row a block, shape, dtype and mode, with every contender's time, the fastest that is not fused marked."""
    found: dict[str, Row] = {}
    for row in rows:
        own = found.setdefault(
            row["arena"], {**row, "arena": f"{row['op']} {row['size']}", "times": {}, "target": None}
        )
        own["times"][row["contender"]] = row["median_s"]
        if row.get("share"):
            own["least"] = row["share"] * row["median_s"]
        if row["contender"] not in UNFUSED and row.get("vs_eager") is not None:
            own["over"] = max(row["vs_eager"], own.get("over", 0))
            own["target"] = targets.get((row["mode"], row["dtype"]))
    for own in found.values():
        others = {name: t for name, t in own["times"].items() if name in UNFUSED and t is not None}
        own["best"] = min(others, key=lambda name: others[name], default=None)
        if others and own.get("least"):
            own["most"] = min(others.values()) / own["least"]
    return list(found.values())


def _milliseconds(contender: str) -> Column:
    def form(row: Row) -> str:
        mark = "*" if contender == row["best"] else ""
        return _number(row["times"].get(contender) and row["times"][contender] * 1e3, "{:.2f}" + mark)

    return contender, form


def _judged(row: Row) -> str:
    return "-" if row["target"] is None else f"{row['target']}x {'met' if row['over'] >= row['target'] else 'missed'}"


# What a block of preset "blocks" is to win on a CPU over the fastest of the others, by what a sample is and dtype.
BLOCK_TARGETS = {
    ("forward", "fp32"): 1.6,
    ("forward", "bf16"): 2.0,
    ("forward+backward", "fp32"): 1.3,
    ("forward+backward", "bf16"): 1.3,
}
BLOCK_TITLE = (
    "whole blocks, milliseconds; speed-up: the faster of fused and packed over the fastest other (*);\n"
    "at most: what the roofline of the rates measured in the same run would be over it"
)
BLOCK_COLUMNS: list[Column] = [
    (
        "block",
        lambda r: f"{r['op'].removesuffix('_block').replace('dico', 'DiCo').replace('fcdm', 'FCDM')}-{r['size']}",
    ),
    ("mode", _short_mode),
    ("dtype", lambda r: r["dtype"]),
    ("shape", lambda r: f"{r['batch']}x{r['channels']}x{r['side']}^2"),
    _milliseconds("eager"),
    _milliseconds("channels_last"),
    _milliseconds("compile"),
    _milliseconds("fused"),
    _milliseconds("packed"),
    ("speed-up", lambda r: _number(r.get("over"), "{:.2f}x")),
    ("at most", lambda r: _number(r.get("most"), "{:.2f}x")),
    ("target", _judged),
]


def _used(columns: list[Column], rows: list[Row]) -> list[Column]:
    """Without the columns in which no row says anything."""
    return [c for c in columns if any(c[1](row) != "-" for row in rows)]


# ---- text ----


# What native kernels run on, as its makers call it: processors of one name differ in it.
_ISAS = {"v4bf16": ", AVX-512 with bfloat16", "v4": ", AVX-512", "v3": ", AVX2"}


def provenance(result: Result) -> str:
    """One line: device, versions, date, commit."""
    machine = result["machine"]
    isa = _ISAS.get((machine["build"].get("native") or {}).get("isa", ""), "")
    cores = f"{isa}, {machine['threads']} threads" if machine["kind"] == "cpu" else ""
    return (
        f"{machine['device']}{cores}; torch {machine['build']['torch']}, dico_kernels {machine['build']['version']} "
        f"({machine['commit'] or 'no commit'}); {result['created'][:10]}, preset {result['preset']}"
    )


LEGEND = (
    "img/s: median of interleaved runs. vs DiT: over the fastest DiT contender of the same size, dtype and batch. "
    "vs plain: over the fastest of eager, channels_last and compile of the same model. "
    "limit: share of the roofline of the rates measured in the same run. peak: allocated during a call beyond weights "
    "and inputs (not shown for CUDA graphs). error: relative rms against float64."
)


def ceilings_line(result: Result) -> str:
    """The measured ceilings, one line."""
    parts = [f"{dtype} matmul {c['flops'] / 1e12:.2f} TFLOP/s" for dtype, c in result["ceilings"].items()]
    copies = [f"copy {c['bytes'] / 1e9:.0f} GB/s" for c in list(result["ceilings"].values())[:1]]
    return "measured ceilings: " + ", ".join(parts + copies)


def text(result: Result) -> str:
    """Plain tables for a terminal."""
    blocks = []
    for title, columns, rows in tables(result):
        cells = [[name for name, _ in columns], *[[form(row) for _, form in columns] for row in rows]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(_pad(c, w, i) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in cells]
        lines.insert(1, "  ".join("-" * w for w in widths))
        blocks.append("\n".join([title, *_separated(lines, rows)]))
    return "\n\n".join([*blocks, f"{provenance(result)}\n{ceilings_line(result)}"])


def _pad(cell: str, width: int, index: int) -> str:
    return cell.ljust(width) if index < 3 else cell.rjust(width)


def _separated(lines: list[str], rows: list[Row]) -> list[str]:
    """A blank line wherever the arena changes: rows are comparable between the lines."""
    out = lines[:2]
    for index, line in enumerate(lines[2:]):
        if index and rows[index]["arena"] != rows[index - 1]["arena"]:
            out.append("")
        out.append(line)
    return [line.rstrip() for line in out]


def failures(result: Result) -> str:
    """A line for each row of ``bench gpu`` that failed or is wrong, with the reason; "" where none did."""
    rows = [*result.get("kernels", []), *(result["models"] if "stages" in result else [])]
    found = [(r, r["failure"] or r.get("wrong")) for r in rows]
    return "\n".join(
        f"- {r['arena']}, {r.get('model') or r.get('op')} {r['contender']}: {reason}" for r, reason in found if reason
    )


def markdown(result: Result) -> str:
    """The same tables as Markdown."""
    blocks = [f"**{provenance(result)}**"]
    for title, columns, rows in tables(result):
        head = [name for name, _ in columns]
        aligned = ["---" if i < 3 else "---:" for i in range(len(head))]
        body = [[form(row) for _, form in columns] for row in rows]
        blocks.append(f"### {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in [head, aligned, *body]))
    blocks += [f"### failed\n\n{found}"] if (found := failures(result)) else []
    blocks.append(f"{ceilings_line(result)}. {LEGEND}")
    return "\n\n".join(blocks)


def readme_block(result: Result) -> str:
    """What README shows between its bench markers: the terminal's own output."""
    return f"{README_BEGIN}\n```text\n{text(result)}\n```\n{README_END}"


# ---- files ----


def write(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write report.md and the plots of results into a folder, made if need be; returns the paths written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, sections = [], []
    for index, result in enumerate(results):
        plots = [
            _throughput(result, folder / f"throughput-{index + 1}.png"),
            _shares(result, folder / f"limit-{index + 1}.png"),
        ]
        found = [p for p in plots if p is not None]
        written += found
        sections.append(markdown(result) + "\n\n" + "\n\n".join(f"![{p.stem}]({p.name})" for p in found))
    report = folder / "report.md"
    report.write_text("# Benchmarks\n\n" + "\n\n".join(sections) + "\n")
    return [report, *written]


def _plotter() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install -e ".[bench]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _panels(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Inference rows by what they share, at the largest batch of each resolution and dtype."""
    rows = [r for r in rows if r["mode"] == "inference"]
    largest: dict[tuple[int, str], int] = defaultdict(int)
    for row in rows:
        key = (row["resolution"], row["dtype"])
        largest[key] = max(largest[key], row["batch"])
    panels: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["batch"] == largest[row["resolution"], row["dtype"]]:
            panels[f"{row['resolution']} px, {row['dtype']}, batch {row['batch']}"].append(row)
    return panels


def _throughput(result: Result, path: Path) -> Path | None:
    return _bars(result, path, "img_s", "images / s", lambda v: f"{v:,.0f}" if v >= 100 else f"{v:.1f}")


def _shares(result: Result, path: Path) -> Path | None:
    return _bars(result, path, "share", "share of the measured limit", lambda v: f"{v:.0%}")


def _bars(result: Result, path: Path, key: str, label: str, form: Callable[[float], str]) -> Path | None:
    """Horizontal bars of one figure, a panel for each resolution and dtype; None where no row has the figure."""
    panels = {t: [r for r in rows if r.get(key) is not None] for t, rows in _panels(result["models"]).items()}
    panels = {t: rows for t, rows in panels.items() if rows}
    if not panels:
        return None
    plt = _plotter()
    colours = {"DiCo": "#1b6ca8", "FCDM": "#2a9d6f", "DiT": "#8a8f98"}
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(map(len, panels.values()))
    figure, axes = plt.subplots(lines, columns, figsize=(5.6 * columns, lines * (0.9 + 0.34 * tallest)), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        names = [f"{r['model']}  {r['contender']}" for r in rows]
        values = [r[key] for r in rows]
        bars = axis.barh(range(len(rows)), values, color=[colours[r["model"].split("-")[0]] for r in rows])
        axis.bar_label(bars, [form(v) for v in values], padding=3, fontsize=8)
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel(label, fontsize=8)
        axis.set_xlim(0, max(values) * 1.18)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(provenance(result), fontsize=8, color="#555", x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
