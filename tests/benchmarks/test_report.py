"""Result files: tables, Markdown, plots, and that README shows a committed one to the letter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import ROOT, run_python

from dico_kernels.benchmarks import report

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A real result of the smoke preset."""
    path = tmp_path_factory.mktemp("bench") / "smoke.json"
    done = run_python(
        "-m", "pytest", str(ROOT / "benchmarks"), "--benchmark-only", "--preset", "smoke", "--results", str(path),
        "-p", "no:cacheprovider", "-k", "DiCo-S or DiT or half or grn", cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return path, done.stdout


def test_a_run_prints_its_tables_and_writes_them(measured):
    path, printed = measured
    result = report.load(path)
    assert report.text(result) in printed
    assert "256 px (latent 32x32), inference" in printed
    assert "vs DiT" in printed
    assert max(map(len, report.text(result).splitlines())) < 120
    rows = {(r["model"], r["contender"]): r for r in result["models"]}
    assert set(rows) == {
        ("DiCo-S", "eager"),
        ("DiCo-S", "channels_last"),
        ("DiCo-S", "fused"),
        ("DiCo-S", "packed"),
        ("DiT-S/2", "eager"),
    }  # -k narrows
    dit = rows["DiT-S/2", "eager"]
    assert dit["vs_dit"] == 1
    plain = max(rows["DiCo-S", how]["img_s"] for how in ("eager", "channels_last"))
    assert rows["DiCo-S", "packed"]["vs_plain"] == pytest.approx(rows["DiCo-S", "packed"]["img_s"] / plain)
    assert "vs_plain" not in dit
    for row in result["models"]:
        assert row["vs_dit"] == pytest.approx(row["img_s"] / dit["img_s"])
        assert 1e-8 < row["error"] < 1e-5
        assert 0 < row["share"] < 1.5
        assert row["peak_bytes"] > 2**20
        assert len(row["samples_s"]) == 2
    assert result["machine"]["build"]["torch"]
    assert result["preset"] == "smoke"


@pytest.mark.parametrize(
    ("preset", "kinds"),
    [("cpu", "half model"), ("ops", "op"), ("blocks", "op"), ("targets", "model"), ("smoke", "half model op")],
)
def test_every_preset_collects_only_what_it_has(preset, kinds):
    done = run_python(
        "-m", "pytest", str(ROOT / "benchmarks"), "--benchmark-only", "--preset", preset, "--collect-only", "-q",
        "-p", "no:cacheprovider", cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    collected = [line.split("::")[1] for line in done.stdout.splitlines() if "::" in line]
    assert {line.split("[")[0].removeprefix("test_") for line in collected} == set(kinds.split())
    assert "NOTSET" not in done.stdout


def test_pytest_benchmark_sees_the_interleaved_samples(measured):
    path, printed = measured
    row = report.load(path)["models"][0]
    median = sum(row["samples_s"]) / 2 * 1e3
    assert f"{median:,.4f}" in printed


def _block_row(contender, ms, vs_eager=None, mode="forward"):
    row = {"op": "dico_block", "size": "S", "arena": mode, "mode": mode, "dtype": "fp32", "contender": contender}
    shape = {"batch": 4, "channels": 128, "side": 32, "share": 0.5 if ms == 8.0 else None}
    return {**row, **shape, "median_s": ms and ms / 1e3, "vs_eager": vs_eager}


@pytest.mark.parametrize(("preset", "judged"), [("blocks", True), ("smoke", False)])
def test_blocks_are_judged_against_the_fastest_other(preset, judged):
    ops = [_block_row("eager", 9.0), _block_row("channels_last", 8.0), _block_row("compile", None)]
    ops += [_block_row("fused", 6.0, 8 / 6), _block_row("packed", 5.0, 8 / 5)]
    ops += [_block_row("compile", 8.0, mode="forward+backward"), _block_row("fused", 7.0, 8 / 7, "forward+backward")]
    title, columns, rows = report.tables(
        {"models": [], "halves": [], "ops": ops, "preset": preset, "machine": {"kind": "cpu"}}
    )[0]
    assert "fastest other (*)" in title
    forward, training = ({name: form(row) for name, form in columns} for row in rows)
    assert (forward["mode"], training["mode"]) == ("fwd", "fwd+bwd")
    assert [forward[how] for how in ("eager", "channels_last", "fused", "packed")] == ["9.00", "8.00*", "6.00", "5.00"]
    assert (forward["compile"], training["compile"]) == ("-", "8.00*")
    assert (forward["speed-up"], forward["at most"]) == ("1.60x", "2.00x")
    assert training["speed-up"] == "1.14x"
    assert "target" not in forward or (forward["target"], training["target"]) == ("1.6x met", "1.3x missed")
    assert ("target" in forward) == judged


def test_markdown_and_plots(measured, tmp_path):
    done = run_python("-m", "dico_kernels", "bench", "report", str(measured[0]), "--out", str(tmp_path), cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["limit-1.png", "report.md", "throughput-1.png"]
    for plot in tmp_path.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert plot.name in (tmp_path / "report.md").read_text()
    printed = run_python("-m", "dico_kernels", "bench", "report", str(measured[0]), cwd=Path("/")).stdout
    assert printed.strip() in (tmp_path / "report.md").read_text()
    assert "| DiCo-S | channels_last | fp32 | 1 |" in printed


@pytest.mark.parametrize(
    ("content", "named"),
    [("{", "not JSON"), ('{"schema": 99}', "schema 99"), ("[]", "'list'"), ('{"schema": 1}', "lacks created")],
)
def test_a_file_that_is_no_result_is_named(tmp_path, content, named):
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    done = run_python("-m", "dico_kernels", "bench", "report", str(bad), cwd=Path("/"))
    assert done.returncode == 2
    assert named in done.stderr
    assert "bad.json" in done.stderr


def test_an_absent_file_is_named():
    done = run_python("-m", "dico_kernels", "bench", "report", "/absent.json", cwd=Path("/"))
    assert done.returncode == 2
    assert "/absent.json" in done.stderr


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.name)
def test_committed_results_are_whole(path):
    result = report.load(path)
    assert result["machine"]["commit"]
    assert "+changes" not in result["machine"]["commit"], "measured on a tree that no commit holds"
    for row in result["models"]:
        assert row["img_s"] == pytest.approx(row["batch"] / row["median_s"])
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("page", "tables"), [("README.md", 3)])
def test_pages_show_committed_results(page, tables):
    shown = re.findall(f"{report.README_BEGIN}.*?{report.README_END}", (ROOT / page).read_text(), re.DOTALL)
    assert len(shown) == tables
    assert set(shown) <= {report.readme_block(report.load(path)) for path in RESULTS}
