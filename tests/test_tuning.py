"""tune: what is measured decides who multiplies, for the case it was measured in and no other."""

from __future__ import annotations

import itertools
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from fake_device import Device
from fake_graphs import FakeGraphs
from support import DEVICE, threads

import dico_kernels as dk
from dico_kernels import _timing, native, tuning
from dico_kernels.ops import _tuning
from dico_kernels.ops._backends import recording
from dico_kernels.reference import DiCo
from dico_kernels.reference.weights import fill_

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    """A file of the test's own, and no choice left behind."""
    path = tmp_path / "deep" / "tuning.json"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    yield path
    dk.untune()


@pytest.fixture
def times(monkeypatch):
    """Seconds of a call by who multiplies, in place of a clock; what raises instead fails there."""
    table = {"library": 2.0, "mixed": 3.0, "fused": 1.0}

    def sample(run, calls, first, device, hold_s=0):
        for i in range(min(calls, 2)):
            run(first + i)
        return table[asked[-1]] * calls

    asked = []
    real = tuning.multiplying

    def multiplying(products):
        asked.append(products)
        if isinstance(table[products], Exception):
            raise table[products]
        return real(products)

    monkeypatch.setattr(_timing, "sample", sample)
    monkeypatch.setattr(tuning, "multiplying", multiplying)
    return table


def branch(n=2, c=8, side=4, dtype=torch.float32, hidden=None, grad=False, device="cpu"):
    """A call of conv_half."""
    k = hidden or c
    shapes = [(n, c)] * 3 + [(k, c), (k,), (k, 1, 3, 3), (k,), (k, k), (k,), (c, k), (c,)]
    args = [torch.randn(s, dtype=dtype, device=device) for s in [(n, c, side, side), *shapes]]
    args[4].requires_grad_(grad)
    return lambda: dk.ops.conv_half(*args)


def runs_on(call):
    """Who multiplies in a call."""
    rows = []
    with recording(rows.append):
        call()
    return {("fused" if row.backend == "native" else row.backend) for row in rows if row.entry == "pointwise"} or {
        "library"
    }


def test_the_fastest_is_used_from_then_on(times):
    call = branch()
    times |= {"library": 1.0, "fused": 2.0}
    before = call()
    rows = dk.tune(call)
    assert [(r.case.branch, r.images, r.products) for r in rows] == [("conv_half", 2, "library")]
    assert rows[0].ms == {"library": 1000.0, "fused": 2000.0}
    assert runs_on(call) == {"library"}
    torch.testing.assert_close(call(), before, rtol=1e-5, atol=1e-5)
    times |= {"library": 2.0, "fused": 1.0}
    assert dk.tune(call, again=True)[0].products == "fused"
    assert runs_on(call) == {"fused"}
    dk.untune()
    usual = "fused" if native.multiplies(torch.empty(1)) else "library"
    assert runs_on(call) == {usual}


@pytest.mark.parametrize(("gain", "wins"), [(0.99, False), (0.95, True)])
def test_a_change_has_to_gain_more_than_chance(gain, wins, times):
    usual, other = ("fused", "library") if native.multiplies(torch.empty(1)) else ("library", "fused")
    times |= {usual: 1.0, other: gain}
    assert dk.tune(branch())[0].products == (other if wins else usual)


def test_what_cannot_run_is_left_out_and_named(times):
    times |= {"library": 5.0, "fused": RuntimeError("out of resources\nmore")}
    rows = dk.tune(branch())
    assert rows[0].products == "library"
    assert rows[0].failures == {"fused": "RuntimeError: out of resources"}
    assert "failed" in str(rows)
    assert "out of resources" in str(rows)


def test_what_can_run_in_no_form_is_neither_used_nor_kept(file, times):
    call, right = branch(), dict(times)
    times |= dict.fromkeys(times, ValueError("no"))
    assert dk.tune(call) == []
    assert not file.exists()
    times |= right
    assert dk.tune(call)[0].products == "fused"


def test_what_lacked_memory_once_is_tried_again(file, times):
    call = branch()
    times |= {"fused": torch.OutOfMemoryError("too large")}
    rows = dk.tune(call)
    assert (rows[0].products, list(rows[0].failures)) == ("library", ["fused"])
    assert not file.exists()
    times |= {"fused": 1.0}
    assert dk.tune(call)[0].products == "fused"


def test_a_choice_is_for_its_case_alone(times):
    times |= {"library": 1.0, "fused": 2.0}
    dk.tune(branch())
    usual = "fused" if native.multiplies(torch.empty(1)) else "library"
    if usual == "library":
        pytest.skip("needs a processor for which native's own product is the rule: AVX-512")
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert runs_on(branch()) == {usual}
    finally:
        torch.set_float32_matmul_precision(precision)
    for other in ({"c": 16}, {"side": 6}, {"hidden": 24}, {"grad": True}, {"dtype": torch.bfloat16}):
        if other != {"dtype": torch.bfloat16} or native.multiplies(torch.empty(1, dtype=torch.bfloat16)):
            assert runs_on(branch(**other)) == {usual}, other
    assert runs_on(branch()) == {"library"}
    with threads(torch.get_num_threads() + 1):
        assert runs_on(branch()) == {usual}


def test_the_nearest_measured_batch_decides(times):
    times |= {"library": 1.0, "fused": 2.0}
    dk.tune(branch(n=2))
    times |= {"library": 2.0, "fused": 1.0}
    dk.tune(branch(n=16))
    assert [runs_on(branch(n=n)).pop() for n in (1, 2, 4, 8, 16, 40)] == [
        "library", "library", "library", "fused", "fused", "fused",
    ]  # fmt: skip


def test_named_products_are_not_overruled(times):
    times |= {"library": 1.0, "fused": 2.0}
    call = branch()
    dk.tune(call)
    with dk.backend("auto", products="fused"):
        assert runs_on(call) == {"fused"}
        with pytest.raises(ValueError, match=r"products='fused' is set.*expected 'auto'"):
            dk.tune(call)
    with _tuning.ignored():
        assert runs_on(call) == ({"fused"} if native.multiplies(torch.empty(1)) else {"library"})
    assert runs_on(call) == {"library"}


def test_what_was_measured_is_kept_in_a_file(file, times):
    call, training = branch(), branch(grad=True)
    times |= {"library": 1.0, "fused": 2.0}
    first = dk.tune(call)
    dk.tune(training)
    dk.untune()
    times |= {"library": 2.0, "fused": 1.0}
    again = dk.tune(call)
    assert again == [replace(first[0], cached=True)]
    assert "from the file" in str(again)
    assert runs_on(call) == {"library"}
    assert [r.cached for r in dk.tune(call, keep=False)] == [False]
    assert runs_on(call) == {"fused"}
    assert dk.tune(call)[0].products == "library"  # what is not to be kept is not
    assert dk.tune(call, again=True)[0].products == "fused"
    assert dk.tune(call)[0].products == "fused"
    (entries,) = json.loads(file.read_text()).values()
    assert sorted(e["case"]["saving"] for e in entries) == [False, True]
    assert not list(file.parent.glob("tuning.json.*"))


def test_other_software_measures_for_itself(file, times, monkeypatch):
    call = branch()
    dk.tune(call)
    monkeypatch.setattr(tuning, "source", lambda: "another")
    assert not dk.tune(call)[0].cached
    assert len(json.loads(file.read_text())) == 2  # and leaves what the other knows


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', "\xff"])
def test_a_file_that_cannot_be_read_is_measured_anew(text, file, times):
    file.parent.mkdir()
    file.write_text(text, encoding="latin-1")
    unreadable = text in ("{", "\xff")
    with pytest.warns(RuntimeWarning, match="cannot be read") if unreadable else nullcontext():
        assert not dk.tune(branch())[0].cached
    assert dk.tune(branch())[0].cached


def test_entries_of_another_form_are_passed_over(file, times):
    call = branch()
    dk.tune(call)
    found = json.loads(file.read_text())
    (software,) = found
    found[software] = [{**found[software][0], "products": "unheard of"}, {"case": {}}, 3]
    file.write_text(json.dumps(found))
    assert not dk.tune(call)[0].cached


def test_a_file_that_cannot_be_written_costs_a_warning(file, times):
    file.parent.write_text("in the way")
    with pytest.warns(RuntimeWarning) as said:
        rows = dk.tune(branch())
    assert any("tuning.json cannot be written" in str(w.message) for w in said)
    assert rows[0].products == "fused"
    assert runs_on(branch()) == {"fused"}


def test_a_model_is_tuned_by_running_it_once(times):
    model = dk.fuse(fill_(DiCo(hidden_size=8, depth=(1, 2, 1, 1, 1), num_classes=3))).eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_inference_mode_enabled()))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1]), torch.tensor([2])
    with torch.inference_mode():
        rows = dk.tune(model, *inputs)
        assert calls == [True]
        levels = {("conv_half", 8), ("ffn_half", 8), ("conv_half", 16), ("ffn_half", 16), ("conv_half", 32),
                  ("ffn_half", 32)}  # fmt: skip
        assert {(r.case.branch, r.case.channels) for r in rows} == levels
        # the second level's blocks are alike, and the last level's as wide on larger images
        assert len(rows) == 8
        assert not any(r.case.saving for r in rows)
    text = str(rows)
    assert len(text.splitlines()) == 10
    assert max(map(len, text.splitlines())) < 120
    assert "2x16x4x4" in text
    saved = dk.tune(model.train(), *inputs)
    assert all(r.case.saving for r in saved)


def test_nothing_to_choose_is_said():
    rows = dk.tune(torch.nn.ReLU(), torch.ones(1))
    assert rows == []
    assert str(rows).startswith("Nothing to choose")


def test_bad_arguments_are_named_as_ever(times):
    with pytest.raises(ValueError, match="x has"), _tuning.measuring(lambda at: None):
        dk.ops.conv_half(torch.ones(2, 3), *[torch.ones(2, 3)] * 11)


@pytest.mark.parametrize("through", ["the model", "the runner"])
def test_graphs_are_recorded_anew_for_another_choice(through, times):
    model = dk.fuse(fill_(DiCo(hidden_size=8, depth=(1, 1, 1, 1, 1), num_classes=3))).eval()
    graphs = FakeGraphs()
    step = dk.GraphRunner(model, graphs=graphs)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([1]), torch.tensor([2])
    with torch.inference_mode():
        step(*inputs)
        step(*inputs)
        assert graphs.captures == 1
        calls = []
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        assert len(dk.tune(model if through == "the model" else step, *inputs)) == 8
        hook.remove()
        assert len(calls) == 1  # by the model itself, not by a recording of it
        step(*inputs)
        step(*inputs)
        assert (graphs.captures, len(step)) == (2, 1)
        assert "dk.tune chose anew" in str(step.explain())
        dk.tune(model, *inputs)  # from the file, and as before
        step(*inputs)
        assert graphs.captures == 2
        if through == "the runner":
            assert "inside dk.tune" in str(step.explain())


def test_a_runner_that_has_recorded_nothing_is_tuned(times):
    model = dk.fuse(fill_(DiCo(hidden_size=8, depth=(1, 1, 1, 1, 1), num_classes=3))).eval()
    graphs = FakeGraphs()
    step = dk.GraphRunner(model, graphs=graphs)
    with torch.inference_mode():
        assert dk.tune(step, torch.randn(2, 4, 8, 8), torch.tensor([1]), torch.tensor([2]))
    assert (graphs.captures, len(step)) == (0, 0)


def test_triton_has_three_candidates(times):
    times |= {"library": 3.0, "mixed": 1.0, "fused": 2.0}
    call = branch(n=1, c=4, side=2, device=DEVICE)
    with dk.backend("triton"):
        before = call()
        rows = dk.tune(call)
        assert (rows[0].case.backend, rows[0].products) == ("triton", "mixed")
        assert list(rows[0].ms) == ["library", "mixed", "fused"]
        assert runs_on(call) == {"triton"}
        torch.testing.assert_close(call(), before, rtol=1e-5, atol=1e-5)
    if DEVICE == "cpu":
        assert runs_on(call) != {"triton"}  # native's choice is its own


def test_fcdm_blocks_are_tuned_too(times):
    model = dk.create_model("FCDM-S", hidden_size=8, depth=(1, 1, 1, 1, 1)).eval()
    with torch.no_grad():
        rows = dk.tune(model, torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.tensor([2]))
    assert {r.case.branch for r in rows} == {"fcdm_block"}
    assert {r.case.hidden // r.case.channels for r in rows} == {3}


def test_calls_are_timed_by_turns(monkeypatch):
    order = []

    def sample(run, calls, first, device, hold_s=0):
        for i in range(calls):
            run(first + i)
        return 0.01 * calls

    monkeypatch.setattr(_timing, "sample", sample)
    ms, failures = tuning.fastest({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, CPU)
    assert ms == {"a": 10.0, "b": 10.0}
    assert failures == {}
    turns = [name for name, _ in itertools.groupby(order)]
    assert turns[:2] == ["a", "b"]  # warm-up
    assert len(turns) > tuning._ROUNDS


def test_a_device_is_timed_and_not_its_caller(monkeypatch):
    device = Device(monkeypatch)
    runs = {"slow to launch": device.call(100e-6, 10e-6), "large": device.call(20e-6, 40e-6)}
    calls = {name: lambda run=run: run(0) for name, run in runs.items()}
    ms, failures = tuning.fastest(calls, torch.device("cuda"))
    assert failures == {}
    assert ms == {"slow to launch": pytest.approx(0.010, rel=0.01), "large": pytest.approx(0.040, rel=0.01)}


def test_the_real_clock_finds_the_slower():
    busy = torch.randn(300, 300)
    ms, _ = tuning.fastest({"once": lambda: busy @ busy, "often": lambda: [busy @ busy for _ in range(20)]}, CPU)
    assert ms["often"] > 3 * ms["once"]
