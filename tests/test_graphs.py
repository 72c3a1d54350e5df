"""Recording with CUDA graphs, against a stand-in for torch.cuda: memory, devices, streams, and the way back."""

from __future__ import annotations

import copy
import gc
from contextlib import suppress

import pytest
import torch
from fake_cuda import FakeCuda, OnFakeCuda
from torch import nn

import dico_kernels as dk
from dico_kernels import _graphs
from dico_kernels.reference import DiCo
from dico_kernels.reference.weights import fill_

GPU = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture
def cuda(monkeypatch):
    yield FakeCuda().install(monkeypatch)
    _graphs._streams.cache_clear()


@pytest.fixture
def older(monkeypatch):
    """A torch that cannot give up cuBLAS's workspace, which keeps the pool that it was allocated in."""
    yield FakeCuda(keeps_workspaces=True).install(monkeypatch)
    _graphs._streams.cache_clear()


class Model(nn.Module):
    """Doubles x; ``step`` is what else happens, every time."""

    def __init__(self, cuda, step=None):
        super().__init__()
        self.cuda, self.step, self.weight = cuda, step, nn.Parameter(torch.ones(()), requires_grad=False)
        self.eval()

    def forward(self, x):
        self.cuda.matmul()
        if self.step is not None:
            self.step()
        return x * 2 * self.weight


def runner(cuda, step=None, **options):
    return dk.GraphRunner(Model(cuda, step), graphs=OnFakeCuda(), **options)


def hows(run):
    return {(row.how, row.reason) for row in run.explain()}


# ---- memory ----


def reset(run):
    run.reset()


def replace_a_weight(run):
    module = next(m for m in run.module.modules() if isinstance(getattr(m, "weight", None), nn.Parameter))
    module.weight = nn.Parameter(module.weight.clone(), requires_grad=False)


def make_room(run):
    run(torch.ones(5))


@pytest.mark.parametrize("end", [reset, replace_a_weight, make_room])
@pytest.mark.parametrize("torchs", ["cuda", "older"])
@torch.no_grad()
def test_recording_goes_on_when_the_last_graph_is_gone(torchs, end, request):
    cuda = request.getfixturevalue(torchs)
    run = runner(cuda, max_graphs=1)
    for _ in range(3):
        run(torch.ones(2))
        end(run)
    assert torch.equal(run(torch.ones(3)), torch.full((3,), 2.0))
    assert hows(run) == {("graph", "")}
    assert sum(pool.uses for pool in cuda.pools.values()) == len(run) == 1


@torch.no_grad()
def test_recording_goes_on_after_an_output_that_is_no_tensor(older):
    run = runner(older)
    forward, run._call = run._call, lambda x: {"out": run.module(x)}
    run(torch.ones(2))
    run._call = forward
    run(torch.ones(3))
    assert [row.how for row in run.explain()] == ["eager", "graph"]


@torch.no_grad()
def test_graphs_that_live_together_share_a_pool_and_runners_do_not(cuda):
    run, other = runner(cuda), runner(cuda)
    for n in (1, 2, 3):
        run(torch.ones(n))
    assert [pool.uses for pool in cuda.pools.values()] == [3]
    other(torch.ones(1))
    assert [pool.uses for pool in cuda.pools.values()] == [3, 1]
    del run
    gc.collect()
    cuda.empty_cache()
    assert [pool.uses for pool in cuda.pools.values()] == [1]


@torch.no_grad()
def test_workspaces_are_freed_around_a_recording(cuda):
    """So each graph has its own, in its pool's memory, and nothing else keeps that."""
    run = runner(cuda)
    run(torch.ones(1))
    assert cuda.events == ["clear", "begin", "end", "clear", ("replay", "default 0")]
    assert not cuda.workspaces


@torch.no_grad()
def test_streams_are_two_for_a_device_whatever_is_recorded(cuda):
    for run in (runner(cuda), runner(cuda)):
        for n in (1, 2, 3):
            run(torch.ones(n))
    assert cuda.streams_made == 2
    for _ in range(2):
        _graphs.CudaGraphs().capture(lambda: None, 1, GPU[1])
    assert cuda.streams_made == 4


# ---- devices ----


def test_a_call_is_recorded_and_replayed_on_its_tensors_device(cuda):
    graphs, ran = _graphs.CudaGraphs(), []

    def call():
        ran.append((cuda.device, cuda.current_stream().name))
        return "output"

    for device in (0, 1, 0):
        assert graphs.capture(call, 1, GPU[device]).output == "output"
    assert [device for device, _ in ran] == [0, 0, 1, 1, 0, 0]
    assert {stream for _, stream in ran} == {"made 1", "made 2", "made 3", "made 4"}
    for index in (0, 1):
        side, here = _graphs._streams(index)[0], cuda.current[index]
        assert set(side.waited) == {here}
        assert set(here.waited) == {side}
    on_second = graphs.capture(call, 1, GPU[1])
    assert cuda.device == 0
    on_second.replay()
    assert cuda.events[-1] == ("replay", "default 1")
    assert (cuda.device, cuda.current[1].name) == (0, "default 1")


def test_devices_have_pools_of_their_own(older):
    """Or one device's would be taken for alive by the other's graph."""
    graphs = _graphs.CudaGraphs()
    kept = [graphs.capture(older.matmul, 1, device) for device in GPU]
    del kept[0]
    kept.append(graphs.capture(older.matmul, 1, GPU[0]))
    assert sorted((device, pool.uses) for (device, _), pool in older.pools.items()) == [(0, 0), (0, 1), (1, 1)]


def test_inputs_wait_for_the_last_replay_on_their_device(cuda):
    graphs = _graphs.CudaGraphs()
    recorded = [graphs.capture(lambda: None, 1, device) for device in GPU]
    earlier = [cuda.current[0], cuda.current[1]]
    for graph in recorded:
        graph.replay()
    for index, device in enumerate(GPU):
        here = cuda.current[index] = cuda.new_stream(index)
        graphs.order(device)
        assert here.waited == [earlier[index]]
        graphs.order(GPU[1 - index])
        assert here.waited == [earlier[index]]


# ---- failures ----


def raises(cuda):
    """A recording that can still be ended."""
    raise KeyError("its own")


def synchronizes(cuda):
    """torch.cuda.graph cannot end this one."""
    cuda.synchronize()


def synchronizes_and_goes_on(cuda):
    """Nor this, and that is the first that is heard of it."""
    with suppress(RuntimeError):
        cuda.synchronize()


def cannot_begin(cuda):
    raise AssertionError("never called")


FAILURES = {
    raises: (KeyError, "its own"),
    synchronizes: (RuntimeError, "not permitted when stream is capturing"),
    synchronizes_and_goes_on: (RuntimeError, "failed due to a previous error"),
    cannot_begin: (MemoryError, "no memory"),
}


def fail(cuda, graphs, how):
    """Try to record a call that fails so."""
    cuda.begins_badly = MemoryError("no memory") if how is cannot_begin else None
    error, message = FAILURES[how]
    said = ""
    try:
        graphs.capture(lambda: (cuda.matmul(), how(cuda)), 0, GPU[0])
    except error as found:  # not by pytest.raises, which keeps it, and with it all that is to be freed
        said = str(found)
    assert message in said
    cuda.begins_badly = None


@pytest.mark.parametrize("heals", [False, True])
@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_leaves_nothing_behind(cuda, how, heals):
    cuda.heals = heals
    graphs, before = _graphs.CudaGraphs(), (cuda.device, *cuda.current)
    cuda.generators[0].draw()
    kept = graphs.capture(cuda.matmul, 1, GPU[0])
    fail(cuda, graphs, how)
    assert (cuda.device, *cuda.current) == before
    gc.collect()
    assert not any(pool.recording for pool in cuda.pools.values())
    assert [pool.uses for pool in cuda.pools.values()] == [1]
    assert not cuda.workspaces
    assert cuda.generators[0].state.offset == 4
    cuda.generators[0].draw()
    again = graphs.capture(cuda.matmul, 1, GPU[0])
    assert [pool.uses for pool in cuda.pools.values()] == [1, 1]
    assert not again.stale
    # Recorded with a generator that is stuck: what it draws can no longer be replayed.
    assert kept.stale == (how is not raises and not heals)


@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_frees_memory_without_waiting_for_the_garbage_collector(cuda, how):
    graphs = _graphs.CudaGraphs()
    gc.collect()
    gc.disable()
    try:
        fail(cuda, graphs, how)
        cuda.empty_cache()
        assert not cuda.pools
    finally:
        gc.enable()


@pytest.mark.parametrize("how", FAILURES)
def test_what_this_torch_does_not_have_hides_no_error(cuda, how, monkeypatch):
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool", "_cuda_clearCublasWorkspaces"):
        monkeypatch.delattr(torch._C, name)
    monkeypatch.setattr(torch.cuda, "default_generators", ())
    fail(cuda, _graphs.CudaGraphs(), how)
    monkeypatch.delattr(torch.cuda, "default_generators")
    fail(cuda, _graphs.CudaGraphs(), how)


def test_a_failed_warmup_leaves_nothing_behind(cuda):
    graphs, before = _graphs.CudaGraphs(), (cuda.device, *cuda.current)
    with pytest.raises(KeyError):
        graphs.capture(lambda: raises(cuda), 1, GPU[1])
    assert (cuda.device, *cuda.current) == before
    (side,) = cuda.current[1].waited  # or its memory would be used again before it is done
    assert side.name.startswith("made")
    assert not cuda.pools


@pytest.mark.parametrize("heals", [False, True])
@torch.no_grad()
def test_after_a_failure_the_model_runs_as_it_is(cuda, heals):
    cuda.heals, bad = heals, torch.ones(3)

    def step():
        cuda.synchronize() if fails else None
        if cuda.current_stream() not in cuda.recording:
            cuda.generators[0].draw()

    fails, run = False, runner(cuda, lambda: step())
    run(torch.ones(2))
    fails = True
    for _ in range(2):
        assert torch.equal(run(bad), torch.full((3,), 2.0))
        assert (cuda.device, cuda.current[0].name) == (0, "default 0")
    fails = False
    run(torch.ones(2))
    run(torch.ones(4))
    assert [(row.how, row.calls) for row in run.explain()] == [("graph", 2), ("eager", 2), ("graph", 1)]
    reason = "capture failed: RuntimeError: operation not permitted when stream is capturing"
    assert run.explain()[1].reason == reason
    # The earlier graph holds the generator that got stuck, where there is one, and was recorded anew.
    assert run.explain().captured == (2 if heals else 3)
    assert len(run) == 2


# ---- on a GPU ----


def on_gpu(seed, n=2):
    g = torch.Generator().manual_seed(seed)
    given = torch.randn(n, 4, 8, 8, generator=g), torch.arange(n) * 7 + seed, (torch.arange(n) + seed) % 3
    return [v.cuda() for v in given]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    @pytest.fixture
    def model(self):
        return fill_(DiCo(hidden_size=8, depth=(1, 1, 1, 1, 1), num_classes=3)).eval().cuda()

    @pytest.mark.parametrize("end", ["reset", "another kind", "another weight"])
    @torch.no_grad()
    def test_recording_goes_on_when_the_last_graph_is_gone(self, model, end):
        given, other = on_gpu(0), on_gpu(0, n=3)
        run, reserved = dk.GraphRunner(model, max_graphs=1), []
        for _ in range(6):
            torch.testing.assert_close(run(*given), model(*given))
            if end == "reset":
                run.reset()
            elif end == "another kind":
                run(*other)
            else:
                replace_a_weight(run)
            torch.cuda.empty_cache()
            reserved.append(torch.cuda.memory_reserved())
        assert {row.how for row in run.explain()} == {"graph"}, str(run.explain())
        assert reserved[-1] <= reserved[1]

    @torch.no_grad()
    def test_recording_goes_on_after_an_output_that_is_no_tensor(self, model):
        given = on_gpu(0)
        run = dk.GraphRunner(model)
        run._call = lambda *args: {"out": model(*args)}
        run(*given)
        assert "the output is a dict" in run.explain()[0].reason
        run._call = model
        torch.testing.assert_close(run(*on_gpu(0, n=3)), model(*on_gpu(0, n=3)))
        assert run.explain()[-1].how == "graph", str(run.explain())

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    @torch.no_grad()
    def test_on_a_device_that_is_not_the_current_one(self, model):
        first, second = model, copy.deepcopy(model).cuda(1)
        runs = [dk.GraphRunner(first), dk.GraphRunner(second)]
        for seed in (0, 1):
            for index, run in enumerate(runs):
                given = [v.to(f"cuda:{index}") for v in on_gpu(seed)]
                torch.testing.assert_close(run(*given), (first, second)[index](*given))
                assert run.explain()[-1].how == "graph", str(run.explain())
        x, t, y = on_gpu(0)
        with pytest.raises(RuntimeError, match="device"):
            runs[0](x, t, y.to("cuda:1"))
        assert "y is on cuda:1: a graph needs every tensor on one device" in runs[0].explain()[-1].reason

    @torch.no_grad()
    def test_after_a_failed_capture_the_model_runs_as_it_is(self):
        class Draws(nn.Module):
            def forward(self, x, extra):
                return x * (2.0 if x.shape[0] == 2 else x.sum().item()) + torch.rand_like(x) + extra

        model, here = Draws().eval(), torch.cuda.current_stream()
        run = dk.GraphRunner(model)

        def same(n):
            x = torch.ones(n, 3, device="cuda")
            torch.cuda.manual_seed(5)
            expected = model(x, 0)
            torch.cuda.manual_seed(5)
            torch.testing.assert_close(run(x, 0), expected)
            return run.explain()[-1].how

        run(torch.ones(2, 3, device="cuda"), 0)
        assert same(2) == "graph"
        run(torch.ones(3, 3, device="cuda"), 0)
        assert same(3) == "eager"
        assert "capture failed" in run.explain()[-1].reason
        assert "previous error" not in run.explain()[-1].reason  # but what the call itself was refused
        assert torch.cuda.current_stream() == here
        assert torch.randn(2, device="cuda").isfinite().all()
        before = run.explain()[0].calls
        run(torch.ones(2, 3, device="cuda"), 0)
        same(2)
        assert run.explain()[0].calls == before + 2
        run(torch.ones(2, 4, device="cuda"), 0)
        assert run.explain()[-1].how == "graph", str(run.explain())

    @torch.no_grad()
    def test_inside_another_capture(self, model):
        given, run, outer = on_gpu(0), dk.GraphRunner(model), torch.cuda.CUDAGraph()
        expected = run(*given)
        with torch.cuda.graph(outer):
            out = run(*given)
        assert run.explain()[-1].reason == "inside another capture"
        outer.replay()
        torch.testing.assert_close(out, expected)

    @torch.no_grad()
    def test_streams_are_the_same_for_every_recording(self, model):
        for n in (1, 2):
            dk.GraphRunner(model)(*on_gpu(0, n=n))
        streams = _graphs._streams(0)
        dk.GraphRunner(model)(*on_gpu(0, n=3))
        assert _graphs._streams(0) is streams
        assert torch.cuda.graph.default_capture_stream not in streams

    @torch.no_grad()
    def test_torchs_newer_precision_settings(self, model):
        given = on_gpu(0)
        run, before = dk.GraphRunner(model), torch.get_float32_matmul_precision()
        try:
            for precision in ("ieee", "tf32"):
                torch.backends.cuda.matmul.fp32_precision = precision
                torch.testing.assert_close(run(*given), model(*given))
        finally:
            torch.set_float32_matmul_precision(before)
        assert run.explain().captured == 2
