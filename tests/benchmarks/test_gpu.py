"""`bench gpu` without a GPU: its plan, what is left when it is cut off, and all of it run on the CPU by stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu_cases import model_unit, op_unit
from support import ROOT, run_python

import dico_kernels as dk
from dico_kernels.benchmarks import gpu, gpu_plan, report
from dico_kernels.benchmarks.gpu_worker import DEVICE_LOST
from dico_kernels.benchmarks.limits import op_work

# ---- plan ----


def test_stages_share_what_is_left_of_the_budget():
    everything = list(gpu_plan.STAGES)
    assert sum(gpu_plan.SHARES.values()) == pytest.approx(1)
    assert gpu_plan.deadline(everything, 100, 600) == pytest.approx(100 + 500 * 0.25)
    assert gpu_plan.deadline(["models"], 150, 600) == 600  # whatever the others left
    assert gpu_plan.deadline(["kernels", "models"], 700, 600) == 700  # too late already
    assert gpu_plan.checked_stages(["models", "tests"]) == ["tests", "models"]
    assert gpu_plan.MINUTES < 9


def test_the_plan_is_in_order_of_importance_and_complete():
    kernels, models = gpu_plan.kernel_units(), gpu_plan.model_units()
    for units in (kernels, models):
        assert len({u.title for u in units}) == len(units)
        assert len({(u.title, r) for u in units for r in u.rows}) == sum(len(u.rows) for u in units)
    assert {u.arena.op for u in kernels} == set(dk.ops.__all__)
    assert kernels[0].title == "conv_half-XL-64x416x32x32-bf16-forward"
    assert dict.fromkeys(c for u in kernels for _, c in u.rows).keys() == {
        "channels_last", "triton/library", "triton/mixed", "triton/fused", "triton",
    }  # fmt: skip
    assert all(u.arena.batch == 64 and u.arena.dtype == "bf16" for u in kernels)
    first = models[0]
    assert (first.title, first.rows[0]) == ("XL-256-b64-bf16-inference", ("DiCo-XL", "channels_last"))
    assert [u.title for u in models[1:3]] == ["XL-256-b32-bf16-training", "XL-256-b1-bf16-inference"]
    compiles = [any(c.startswith("compile") for _, c in u.rows) for u in models]
    assert compiles == sorted(compiles)  # what is dear comes last
    assert [u.arena.compiled for u in models] == compiles
    assert [c for _, c in models[-1].rows] == ["fused", "fused_mixed", "compile_default", "compile_default"]


def test_the_work_of_ops_adds_up_to_the_models():
    def forward(op, c):
        return op_work(op, 1, c, 1, False, 1)

    c = 16
    products = {"conv_half": 2 * c * c, "ffn_half": 4 * c * c, "fcdm_block": 6 * c * c}
    elements = {op: forward(op, c)[1] - products[op] for op in products}
    assert elements["conv_half"] + elements["ffn_half"] == 14 * c  # limits.py: (10 + 2r)C a pixel
    assert elements["fcdm_block"] == 11 * c
    assert {op: forward(op, c)[0] for op in products} == products
    for op in products:
        assert op_work(op, 1, c, 1, True, 1)[0] == 3 * products[op]
    assert op_work("adaln_modulate", 64, 416, 32, False, 2) == (0, 2 * 2 * 64 * 416 * 1024)


def test_wrong_results_are_named_and_change_the_exit_status(store):
    def row(contender, error, failure=None):
        return {
            **{"arena": "a", "op": "grn", "contender": contender, "error": error, "failure": failure},
            **{"dtype": "bf16", "median_s": None, "mode": "forward", "batch": 1},
        }

    rows = [row("channels_last", 3e-3), row("triton", 5e-3), row("triton/library", 2.0), row("bad", float("nan"))]
    store.result["kernels"] = [*rows, row("large", None, "OOM")]
    gpu.finish(store.result)
    assert [r["wrong"] for r in store.result["kernels"]] == [
        None,
        None,
        "WRONG: error 2.0e+00 where plain PyTorch has 3.0e-03",
        "WRONG: error nan where plain PyTorch has 3.0e-03",
        None,
    ]
    assert "grn triton/library: WRONG: error 2.0e+00" in gpu.text(store.result)
    assert gpu._at_fault(store.result)
    store.result["kernels"] = [rows[0], rows[1], row("large", None, "OOM")]
    gpu.finish(store.result)
    assert not gpu._at_fault(store.result)
    for key, value in (("tests", {"failures": ["t"]}), ("stages", {"models": {"state": "failed: x"}})):
        assert gpu._at_fault({**store.result, key: value})


def test_a_stage_that_fails_leaves_the_others(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(gpu, "_tests", broken)
    plan = {"kernels": [op_unit("adaln_modulate")], "ceilings": ["fp32"]}
    lines = []
    status = gpu.run(["tests", "ceilings", "kernels"], tmp_path, 2, device="cpu", plan=plan, say=lines.append)
    assert status == 1
    result = report.load(tmp_path / "gpu.json")
    states = {stage: kept["state"] for stage, kept in result["stages"].items()}
    assert states == {"tests": "failed: no space left", "ceilings": "done", "kernels": "done"}


# ---- the processes ----

FAKE = """
import os, sys, time
from dico_kernels.benchmarks.gpu_store import Store
from dico_kernels.benchmarks.gpu_worker import Worker, DEVICE_LOST, DeviceLostError
from dico_kernels.benchmarks.harness import Contender
sys.path.insert(0, {folder!r})
from gpu_cases import CPU, model_unit

HOW = ("good", "dies", "lost", "hangs", "late")
def build(arena, name, how, device):
    if how == "dies":
        print("Fatal: kernel at fault", file=sys.stderr, flush=True)
        os._exit(134)
    if how == "lost":
        raise_lost.append(1)
        raise RuntimeError("an illegal memory access")
    if how == "hangs":
        time.sleep(60)
    return Contender(lambda i: time.sleep(0.006))
raise_lost = []
import dico_kernels.benchmarks.gpu_worker as w
def check(device):
    if raise_lost:
        raise DeviceLostError("lost")
w._check_device = check
with open({log!r}, "a") as f: f.write("started\\n")
store = Store.load(w.Path(sys.argv[1]))
try:
    plan = [model_unit(*(("DiCo-S", h) for h in HOW))]
    Worker("models", store, float(sys.argv[2]), CPU, plan=plan, build=build).run()
except DeviceLostError:
    os._exit(DEVICE_LOST)
"""


@pytest.fixture
def fake(tmp_path):
    script, log = tmp_path / "fake.py", tmp_path / "starts"
    script.write_text(FAKE.format(folder=str(ROOT / "tests"), log=str(log)))

    def launch(stage, path, until):
        return [sys.executable, str(script), str(path), str(until)]

    launch.log = log
    return launch


def test_a_fault_costs_one_row(store, fake, monkeypatch):
    monkeypatch.setitem(gpu._HANGS_S, "models", 15.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    state = gpu._supervise("models", store, time.time() + 240, fake)
    rows = {r["contender"]: r for r in store.result["models"]}
    assert state == "done"
    assert rows["dies"]["failure"] == "the process ended with 134: Fatal: kernel at fault"
    assert rows["lost"]["failure"] == "an illegal memory access"
    assert rows["hangs"]["failure"] == "hung: ended after 15 s"
    assert {h: rows[h]["alone"] for h in ("good", "late")} == {"good": False, "late": False}
    assert rows["good"]["median_s"] > 0.005
    assert fake.log.read_text().count("started") == 4


def test_a_stage_ends_by_its_deadline(store, monkeypatch):
    monkeypatch.setattr(gpu, "_GRACE_S", 0.1)
    began = time.time()
    state = gpu._supervise("models", store, began + 1, lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    assert state == "cut off"
    assert time.time() - began < 10


def test_a_process_that_cannot_start_is_not_started_again(store):
    state = gpu._supervise(
        "kernels", store, time.time() + 60, lambda *_: [sys.executable, "-c", "import absent_module"]
    )
    assert state.startswith("failed: the process ended with 1")
    assert "absent_module" in state


def test_a_signal_leaves_a_report(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom dico_kernels.benchmarks import gpu\n"
        "sleep = lambda *_: [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        f"raise SystemExit(gpu.run(['models'], Path({str(tmp_path)!r}), 5, device='cpu', launch=sleep))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd="/")
    while "models: until" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert "bench gpu" in (tmp_path / "report.md").read_text()
    assert report.load(tmp_path / "gpu.json")["in_flight"] is None


# ---- all of it, on the CPU ----


def test_every_stage_runs_on_the_cpu(tmp_path, small_clone):
    lines = []
    triton = ("channels_last", "triton/library", "triton/fused") if os.environ.get("TRITON_INTERPRET") == "1" else ()
    plan = {
        "ceilings": ["fp32"],
        "kernels": [
            op_unit("adaln_modulate"),
            op_unit("gated_residual_adaln", backward=True),
            op_unit("pixel_shuffle_skip", backward=True),
            *(op_unit(op, ("channels_last", "native/library"), True) for op in ("conv_half", "ffn_half", "fcdm_block")),
            *(op_unit("ffn_half", triton) for _ in triton[:1]),
        ],
        "models": [model_unit(("DiCo-S", "channels_last"), ("DiCo-S", "fused_mixed"), ("DiCo-S", "fused_graph"),
                              ("DiCo-S", "fused_tuned"), ("DiT-S/2", "eager"))],
    }  # fmt: skip
    out = tmp_path / "out"
    status = gpu.run(gpu_plan.STAGES, out, 8, device="cpu", plan=plan, say=lines.append, root=small_clone,
                     tests=["tests"], processes=1, poll_s=0.2)  # fmt: skip
    assert status == 1  # a test failed, and there is no graph on a CPU
    result = report.load(out / "gpu.json")
    assert {s: v["state"] for s, v in result["stages"].items()} == dict.fromkeys(gpu_plan.STAGES, "done")
    failures = {(r["arena"], r["contender"]): r["failure"] for r in [*result["kernels"], *result["models"]]}
    assert {k for k, v in failures.items() if v} == {("S-64-b2-fp32-inference", "fused_graph")}
    assert "no CUDA graph: x is on cpu" in failures["S-64-b2-fp32-inference", "fused_graph"]
    for row in result["kernels"]:
        assert row["share"] > 0
        assert row["error"] < 1e-5
        assert row["vs_eager"] > 0
        assert row["bound"] in ("copy", "matmul")
    by_contender = {r["contender"]: r for r in result["models"] if not r["failure"]}
    assert by_contender["fused_mixed"]["error"] < 1e-5
    assert by_contender["fused_mixed"]["vs_dit"] > 0
    assert by_contender["fused_tuned"]["error"] < 1e-5
    assert by_contender["fused_tuned"]["compile_s"] > 1  # seven rounds of eight branches
    shown = lines[-2]
    assert "conv_half" in shown
    assert "native/library" in shown
    assert "6 passed, 1 failed, 1 skipped" in shown
    assert max(map(len, shown.splitlines())) < 140
    written = (out / "report.md").read_text()
    assert "| DiCo-S | fused_mixed | fp32 |" in written
    assert "`tests/test_some.py::test_bad`" in written
    json.dumps(result, allow_nan=False)
    # Again, with nothing left to do.
    assert gpu.run(["kernels", "models"], out, 8, device="cpu", plan=plan, say=lines.append) == 1
    assert report.load(out / "gpu.json")["kernels"] == result["kernels"]


def test_command_line():
    gpu_help = run_python("-m", "dico_kernels", "bench", "gpu", "--help", cwd=Path("/")).stdout
    assert "examples:" in gpu_help
    assert "bench gpu --stages kernels" in gpu_help
    assert str(gpu_plan.MINUTES) in gpu_help
    assert ",".join(gpu_plan.STAGES) in gpu_help


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    done = run_python("-m", "dico_kernels", "bench", "gpu", "--out", str(tmp_path / "none"), cwd=Path("/"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: torch sees no CUDA device, and bench gpu measures nothing else\n"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("stages", "minutes", "named"), [(["tests", "dance"], 1, "dance"), ([], 1, "''"), (["tests"], 0, "minutes=0")]
)
def test_unusable_arguments_are_named(tmp_path, capsys, stages, minutes, named):
    assert gpu.run(stages, tmp_path, minutes, device="cpu") == 2
    assert named in capsys.readouterr().err


def test_the_exit_status_of_a_lost_device_is_its_own():
    assert DEVICE_LOST not in (0, 1, 2)
