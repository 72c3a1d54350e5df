"""Timing, memory and the contenders: what they claim to measure is what they measure."""

from __future__ import annotations

import time

import pytest
import torch
from fake_device import Device
from support import rel_rms

from dico_kernels.benchmarks import contenders, harness, presets
from dico_kernels.benchmarks.harness import Contender, describe_failure, interleave, peak_bytes, relative_error
from dico_kernels.benchmarks.limits import Ceiling
from dico_kernels.reference import DiCo, DiT
from dico_kernels.reference.weights import fill_

CPU = torch.device("cpu")


def test_interleave_takes_turns_and_times_each():
    calls = []

    def sleeper(name, seconds):
        def run(i):
            calls.append((name, i))
            time.sleep(seconds)

        return Contender(run)

    found = interleave({"short": sleeper("short", 0.01), "long": sleeper("long", 0.03)}, 4, CPU)
    assert found["short"].median >= 0.01
    assert found["long"].median >= 0.03
    assert found["short"].median < found["long"].median
    timed = [name for name, _ in calls if calls][-8:]
    assert timed == ["short", "long", "long", "short"] * 2  # rotating by one each round
    assert {i for name, i in calls if name == "long"} == {0, 1, 2, 3}


def test_short_calls_are_repeated_within_a_sample():
    count = 0

    def run(i):
        nonlocal count
        count += 1
        time.sleep(0.0005)

    found = interleave({"x": Contender(run)}, 3, CPU)
    assert count > 15
    assert 0.0005 <= found["x"].median < 0.005  # a call, not a sample of ten


def test_a_contender_that_fails_leaves_the_others_their_times():
    def fails_later(i):
        if i:
            raise RuntimeError("gave up\nat length")
        time.sleep(0.006)

    def out_of_memory(i):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    def silent(i):
        raise AssertionError

    runs = {"good": lambda i: time.sleep(0.006), "later": fails_later, "oom": out_of_memory, "silent": silent}
    found = interleave({name: Contender(run) for name, run in runs.items()}, 3, CPU)
    assert len(found["good"].samples) == 3
    assert found["good"].failure is None
    assert [found[n].failure for n in ("later", "oom", "silent")] == ["gave up", "OOM", "AssertionError"]
    assert interleave({}, 3, CPU) == {}


def test_queued_samples_time_the_device_and_not_its_caller(monkeypatch):
    device = Device(monkeypatch)
    monkeypatch.setattr(harness, "peak_bytes", lambda run, device: 0)
    calls = {"slow to launch": device.call(100e-6, 10e-6), "large": device.call(100e-6, 400e-6)}
    contenders = {name: Contender(run) for name, run in calls.items()}
    cuda = torch.device("cuda")
    found = interleave(contenders, 3, cuda, 0.02)
    assert found["slow to launch"].median == pytest.approx(100e-6, rel=0.01)  # its caller's
    assert found["slow to launch"].host_s is None
    found = interleave(contenders, 3, cuda, 0.02, queued=True)
    assert found["slow to launch"].median == pytest.approx(10e-6, rel=0.01)
    assert found["large"].median == pytest.approx(400e-6, rel=0.01)
    assert found["large"].host_s == pytest.approx(100e-6)


def test_no_more_is_queued_than_a_queue_holds(monkeypatch):
    device = Device(monkeypatch, queue=100)
    monkeypatch.setattr(harness, "peak_bytes", lambda run, device: 0)
    contender = Contender(device.call(100e-6, 10e-6, 30))
    found = interleave({"x": contender}, 3, torch.device("cuda"), 0.02, queued=True)
    assert found["x"].median == pytest.approx(10e-6, rel=0.01)


def test_failures_are_described_in_a_line():
    class CompilationError(Exception):
        pass

    class CompilerFailed(RuntimeError):
        inner_exception = CompilationError("at 4:24:\n    x = tl.load(p)\n        ^\nNameError('p is not defined')")

    expected = "CompilationError at 4:24: NameError('p is not defined')"
    assert describe_failure(CompilerFailed("backend='inductor' raised:\n...")) == expected
    assert describe_failure(ValueError("x has rank 2: expected 4\nand so on")) == "x has rank 2: expected 4"


def test_pinned_attention_compiles_to_the_backend_it_names():
    """Pinned around the compiled call instead, every choice would run the graph of the first."""
    seen = []

    def backend(graph, inputs):
        seen.append({str(n.target) for n in graph.graph.nodes if n.op == "call_function"})
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    for name in ("MATH", "FLASH_ATTENTION"):
        model = contenders.with_pinned_attention(DiT(8, hidden_size=32, depth=1, num_heads=2).eval(), name)
        compiled = torch.compile(model, backend=aot_autograd(fw_compiler=backend))
        with torch.no_grad():
            compiled(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.tensor([1]))
    math, flash = (any("flash" in op for op in ops) for ops in seen)
    assert (math, flash) == (False, True)


def test_peak_bytes_counts_what_is_held_at_once():
    mib = 2**20

    def run():
        a = torch.empty(mib, dtype=torch.uint8)
        b = torch.empty(2 * mib, dtype=torch.uint8)
        del a
        c = torch.empty(mib // 2, dtype=torch.uint8)
        return b, c

    assert peak_bytes(run, CPU) == 3 * mib
    assert peak_bytes(lambda: None, CPU) == 0


def test_relative_error():
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(truth.float(), truth) == 0
    assert relative_error(truth * 1.01, truth) == pytest.approx(0.01)


def test_ceiling_takes_the_slower_of_the_two():
    ceiling = Ceiling(flops=200.0, bytes=10.0)
    assert ceiling.seconds(macs=100, moved=5) == 1.0
    assert ceiling.seconds(macs=100, moved=50) == 5.0


@pytest.mark.parametrize(("gpu", "preset"), [(g, p) for g in (False, True) for p in presets.PRESETS if g or p != "gpu"])
def test_presets_hold_comparable_rows(gpu, preset):
    models, halves, ops = presets.arenas(presets.resolve(preset, gpu), gpu)
    assert bool(models) == (preset not in ("ops", "blocks"))
    assert bool(halves) == (preset not in ("ops", "blocks", "targets"))
    assert ops or preset in ("cpu", "auto", "targets")
    assert len(set(models)) == len(models)
    for arena in models:
        rows = list(arena.rows(gpu))
        assert len(set(rows)) == len(rows)
        families = {name.split("-")[0] for name, _ in rows}
        assert families == {"DiCo", "FCDM", "DiT"} or (preset == "targets" and families < {"DiCo", "FCDM"})


def test_unusable_presets_are_named():
    with pytest.raises(ValueError, match="preset='fast': expected one of auto, smoke"):
        presets.resolve("fast", gpu=True)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        presets.resolve("gpu", gpu=False)


def test_precision_flags_are_set_and_restored():
    before = torch.get_float32_matmul_precision()
    with contenders.precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    with contenders.precision("fp32"):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == before


def test_linear_pointwise_is_the_same_function():
    model = fill_(DiCo(hidden_size=8, depth=(1, 1, 1, 1, 1), num_classes=3)).eval()
    args = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])
    with torch.no_grad():
        before = model(*args)
        contenders.with_linear_pointwise(model)
        assert not any(getattr(m, "kernel_size", None) == (1, 1) for m in model.modules())
        assert rel_rms(model(*args), before) < 1e-5


@pytest.mark.parametrize("name", ["DiCo-S", "DiT-S/2"])
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_model_contenders_do_the_work(name, mode):
    arena = presets.ModelArena("S", 64, 2, "bf16", mode)
    contender = contenders.model_contender(arena, name, "eager", CPU)
    out = contender.run(0)
    assert torch.isfinite(out).all()
    if mode == "inference":
        assert out.shape == (2, 8, 8, 8)
        assert 1e-4 < contender.error < 5e-2
        assert contender.macs > 1e8
    else:
        losses = [float(contender.run(0)) for _ in range(8)]
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("op", "macs"),
    [  # two samples of 64 tokens, 64 wide
        ("conv_half", 2 * (64 * (2 * 64 * 64 + 9 * 64) + 64 * 64)),
        ("attention_half", 2 * (64 * 4 * 64 * 64 + 2 * 64 * 64 * 64)),
    ],
)
def test_half_contenders_count_their_macs(op, macs):
    contender = contenders.half_contender(presets.HalfArena(64, 8, 2, "fp32"), op, "eager", CPU)
    assert contender.macs == macs
    assert contender.error < 1e-5
