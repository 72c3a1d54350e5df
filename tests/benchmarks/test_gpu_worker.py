"""What `bench gpu` keeps of each row, whatever happens to it, and whether it is right."""

from __future__ import annotations

import time

import pytest
import torch
from gpu_cases import CPU, MACHINE, model_unit, op_unit, sleeper, worker

import dico_kernels as dk
from dico_kernels.benchmarks import gpu, gpu_worker, op_contenders, report
from dico_kernels.benchmarks.gpu_store import Store
from dico_kernels.benchmarks.harness import Contender
from dico_kernels.benchmarks.presets import OpArena

# ---- store ----


def test_a_store_goes_on_where_it_was_on_the_same_device_and_source(store, tmp_path):
    store.result["ceilings"]["bf16"] = {"flops": 1.0, "bytes": 1.0}
    store.save()
    assert Store.open(store.path, MACHINE).result["ceilings"]
    other = Store.open(store.path, {**MACHINE, "commit": "def"})
    assert not other.result["ceilings"]
    aside = list(tmp_path.glob("gpu-*.json"))
    assert [report.load(p)["machine"]["commit"] for p in aside] == ["abc"]
    assert not list(tmp_path.glob("*.partial"))
    other.result["ceilings"]["bf16"] = {}
    other.save()
    assert not Store.open(store.path, {**MACHINE, "commit": "def", "source": "changed"}).result["ceilings"]


def test_what_was_in_flight_is_buried(store):
    unit = model_unit(("DiCo-S", "fused"), ("DiT-S/2", "eager"))
    assert not store.bury("nothing to bury")
    store.begin(unit, ("DiCo-S", "fused"))
    assert Store.load(store.path).bury("crashed")
    store = Store.load(store.path)
    assert store.result["in_flight"] is None
    assert store.settled(unit)["DiCo-S", "fused"]["failure"] == "crashed"
    assert "fused: crashed" in gpu.text(store.result)


# ---- worker ----


def test_rows_are_kept_at_once_and_replaced_by_those_timed_in_turns(store):
    unit = model_unit(("DiCo-S", "fused"), ("DiT-S/2", "eager"))
    kept = []

    def build(arena, name, how, device):
        kept.append([(r["contender"], r["alone"]) for r in report.load(store.path)["models"]])
        return sleeper(0.006)

    worker(store, [unit], build).run()
    assert kept == [[], [("fused", True)]]
    rows = report.load(store.path)["models"]
    assert [(r["model"], r["alone"], len(r["samples_s"])) for r in rows] == [
        ("DiCo-S", False, 2),
        ("DiT-S/2", False, 2),
    ]
    assert all(r["img_s"] == pytest.approx(2 / r["median_s"]) for r in rows)
    worker(store, [unit], build).run()
    assert len(kept) == 2  # settled


def test_a_row_that_would_not_fit_is_left_and_measured_another_time(store):
    unit = model_unit(("DiCo-S", "fused"), ("DiCo-S", "compile_default"))
    built = []

    def build(arena, name, how, device):
        built.append(how)
        return sleeper(0.006)

    first = worker(store, [unit], build, until=30)  # compiling is expected to take 40
    first.run()
    assert (built, first.skipped) == (["fused"], 1)
    assert "1 rows left for want of time" in store.result["stages"]["models"]["note"]
    second = worker(store, [unit], build)
    second.run()
    assert built == ["fused", "fused", "compile_default"]  # again, for turns with the other
    assert not any(r["alone"] for r in store.result["models"])
    assert store.result["stages"]["models"]["note"] == ""


def test_a_contender_that_cannot_be_built_leaves_the_others(store, capsys):
    def build(arena, op, how, device):
        if how == "native":
            raise RuntimeError("no such kernel\nat length")
        return sleeper(0.006)

    worker(store, [op_unit()], build, stage="kernels").run()
    found = {r["contender"]: r["failure"] for r in store.result["kernels"]}
    assert found == {"channels_last": None, "native": "no such kernel"}
    said = capsys.readouterr().err
    assert "==== grn-S-2x8x4x4-fp32-forward  grn native" in said
    assert "in build" in said  # the traceback


def test_a_kernel_that_fails_when_first_run_fails_alone(store):
    def at_fault(i):
        raise RuntimeError("an illegal memory access")

    def build(arena, op, how, device):
        return Contender(at_fault) if how == "native" else sleeper(0.006)

    worker(store, [op_unit()], build, stage="kernels").run()
    rows = {r["contender"]: r for r in store.result["kernels"]}
    assert rows["native"]["failure"] == "an illegal memory access"
    assert len(rows["channels_last"]["samples_s"]) == 2


def test_what_fails_only_beside_the_others_keeps_its_own_time(store):
    calls = []

    def large(i):
        calls.append(i)
        if len(calls) > 10:  # after its own warm-up and rounds
            raise torch.OutOfMemoryError("CUDA out of memory")
        time.sleep(0.006)

    def build(arena, name, how, device):
        return Contender(large) if how == "fused" else sleeper(0.006)

    unit = model_unit(("DiCo-S", "fused"), ("DiCo-S", "channels_last"), rounds=8)
    worker(store, [unit], build).run()
    rows = {r["contender"]: r for r in store.result["models"]}
    assert rows["fused"]["failure"] is None
    assert rows["fused"]["median_s"] >= 0.006
    assert len(rows["fused"]["samples_s"]) == 3
    assert len(rows["channels_last"]["samples_s"]) == 8
    assert set(store.settled(unit)) == set(unit.rows)


def test_what_was_left_is_left_without_collecting(store, monkeypatch):
    monkeypatch.setattr(gpu_worker.gc, "collect", lambda: pytest.fail("took time for nothing"))
    late = worker(store, [op_unit("grn"), op_unit("cca_gate")], None, until=-1, stage="kernels")
    late.run()
    assert late.skipped == 4


def test_preparing_runs_each_row_of_ours_once_and_reports_nothing(capsys):
    ran = []

    def build(arena, op, how, device):
        if op == "grn":
            raise RuntimeError("will fail again where it is measured")
        return Contender(lambda i: ran.append((op, how)))

    rows = ("channels_last", "triton")
    plan = [op_unit("grn", rows), op_unit("cca_gate", rows), op_unit("conv_half", ("triton/library", "triton/fused"))]
    gpu_worker.prepare(plan, time.time() + 60, CPU, build)
    assert ran == [("cca_gate", "triton"), ("conv_half", "triton/library"), ("conv_half", "triton/fused")]
    gpu_worker.prepare(plan, time.time() - 1, CPU, build)
    assert len(ran) == 3
    assert capsys.readouterr().err == ""


def test_errors_are_of_gradients_too(monkeypatch):
    arena = OpArena("adaln_modulate", "S", 4, 8, 4, "fp32", True)
    assert op_contenders.op_contender(arena, arena.op, "native", CPU).error < 1e-5
    real = dk.ops.adaln_modulate

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    monkeypatch.setattr(dk.ops, "adaln_modulate", lambda x, *rest: real(Doubled.apply(x), *rest))
    assert op_contenders.op_contender(arena, arena.op, "native", CPU).error == pytest.approx(1, rel=1e-3)
    monkeypatch.setattr(dk.ops, "gated_residual_adaln", lambda x, *rest: (x, x * float("nan")))
    arena = OpArena("gated_residual_adaln", "S", 4, 8, 4, "fp32", False)
    error = op_contenders.op_contender(arena, arena.op, "native", CPU).error
    assert error != error


def test_input_sets_outgrow_the_second_level_cache(monkeypatch):
    class Properties:
        L2_cache_size = 1 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    arguments = [torch.ones(1 << 18, requires_grad=True), torch.ones(8)]
    sets = op_contenders._input_sets(arguments, torch.device("cuda"))
    assert sum(a.nbytes for s in sets for a in s) >= 4 << 20
    assert len({a.data_ptr() for s in sets for a in s}) == 2 * len(sets)
    assert all(s[0].requires_grad and not s[1].requires_grad for s in sets)
    assert op_contenders._input_sets(arguments, CPU) == [arguments]
