"""GraphRunner's bookkeeping, on the CPU, with a stand-in that records and replays as a CUDA graph does."""

from __future__ import annotations

from operator import attrgetter

import pytest
import torch
from fake_graphs import FakeGraphs
from torch import nn

import dico_kernels as dk
from dico_kernels.reference import DiCo
from dico_kernels.reference.weights import fill_


@pytest.fixture(scope="module")
def weights():
    return fill_(DiCo(hidden_size=8, depth=(1, 1, 1, 1, 1), num_classes=3))


@pytest.fixture
def model(weights):
    made = DiCo(hidden_size=8, depth=(1, 1, 1, 1, 1), num_classes=3)
    made.load_state_dict(weights.state_dict())
    return made.eval()


def inputs(seed=0, n=2, side=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, side, side, generator=g), torch.arange(n) * 7 + seed, (torch.arange(n) + seed) % 3


@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_replays_give_what_the_model_gives_for_new_values(model, first):
    fake = FakeGraphs()
    run = dk.GraphRunner(model, graphs=fake, warmup=3)
    modes = [first, torch.no_grad, torch.inference_mode, torch.no_grad]
    for seed, mode in enumerate(modes):
        with mode():
            out = run(*inputs(seed))
            torch.testing.assert_close(out, model(*inputs(seed)), rtol=0, atol=0)
    assert (fake.captures, fake.warmups, fake.orders) == (1, 3, 4)
    (row,) = run.explain()
    assert (row.how, row.calls, row.reason) == ("graph", 4, "")
    assert row.call == "x 2x4x8x8 float32, t 2 int64, y 2 int64"


@torch.no_grad()
def test_the_callers_tensors_and_earlier_outputs_are_left_alone(model):
    run = dk.GraphRunner(model, graphs=FakeGraphs())
    x, t, y = inputs(0)
    before = x.clone()
    first = run(x, t, y)
    kept = first.clone()
    run(*inputs(1))
    assert torch.equal(first, kept)
    assert torch.equal(x, before)


@torch.no_grad()
def test_without_clone_the_output_is_overwritten_by_the_next_call(model):
    run = dk.GraphRunner(model, graphs=FakeGraphs(), clone=False)
    first = run(*inputs(0))
    second = run(*inputs(1))
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(first, model(*inputs(1)))


@torch.no_grad()
def test_guidance_by_position_name_and_method_is_one_kind_and_its_scale_part_of_it(model):
    fake = FakeGraphs()
    run = dk.GraphRunner(model, graphs=fake)
    x, t, y = inputs(0)
    expected = model.forward_with_cfg(x, t, y, 4.0)
    assert torch.equal(run(x, t, y, cfg_scale=4.0), expected)
    assert torch.equal(run.forward_with_cfg(x, t, y, 4.0), expected)
    assert fake.captures == 1
    assert torch.equal(run(x, t, y, 4.0), expected)
    assert torch.equal(run(x, t, y, cfg_scale=1.5), model.forward_with_cfg(x, t, y, 1.5))
    assert torch.equal(run(x, t, y), model(x, t, y))
    bound = dk.GraphRunner(model.forward_with_cfg, graphs=FakeGraphs())
    assert torch.equal(bound(x, t, y, 4.0), expected)
    # A scale that is a tensor is a value like any other.
    count = fake.captures
    for scale in (2.0, 3.0):
        out = run(x, t, y, cfg_scale=torch.tensor(scale))
        assert torch.equal(out, model.forward_with_cfg(x, t, y, torch.tensor(scale)))
    assert fake.captures == count + 1


@torch.no_grad()
def test_a_graph_is_for_one_kind_of_call(model):
    fake = FakeGraphs()
    run = dk.GraphRunner(model, graphs=fake, max_graphs=20)
    x, t, y = inputs(0)

    def captures(call):
        before = fake.captures
        call()
        call()
        return fake.captures - before

    assert captures(lambda: run(x, t, y)) == 1
    assert captures(lambda: run(*inputs(0, n=3))) == 1
    assert captures(lambda: run(*inputs(0, side=12))) == 1
    assert captures(lambda: run(x, t.float(), y)) == 1
    assert captures(lambda: run(x, t[:1], y)) == 1
    assert captures(lambda: run(x.contiguous(memory_format=torch.channels_last), t, y)) == 1
    with dk.backend("reference"):
        assert captures(lambda: run(x, t, y)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert captures(lambda: run(x, t, y)) == 1
        assert torch.equal(run(*inputs(5)), model(*inputs(5)))
    assert captures(lambda: run(x, t, y)) == 0
    assert len(run) == fake.captures == 8


@pytest.mark.parametrize("part", ["cuda.matmul", "cudnn.conv"])
@torch.no_grad()
def test_torchs_newer_precision_settings_are_part_of_the_kind(model, part):
    """The older ones' getters raise when these are set."""
    fake = FakeGraphs()
    run = dk.GraphRunner(model, graphs=fake)
    setting = attrgetter(part)(torch.backends)
    before = setting.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            setting.fp32_precision = precision
            run(*inputs(0))
    finally:
        setting.fp32_precision = before
    assert (fake.captures, len(run)) == (2, 2)


@torch.no_grad()
def test_the_least_recently_used_graph_makes_room(model):
    fake = FakeGraphs()
    run = dk.GraphRunner(model, graphs=fake, max_graphs=2)
    one, two, three = (inputs(0, n=n) for n in (1, 2, 3))
    for call in (one, two, one, three):  # three drops two
        run(*call)
    assert (len(run), fake.captures) == (2, 3)
    run(*one)
    assert fake.captures == 3
    run(*two)
    assert (len(run), fake.captures, run.explain().evicted) == (2, 4, 2)


@torch.no_grad()
def test_weights_written_in_place_are_used_and_keep_the_graph(model):
    fake = FakeGraphs()
    run = dk.GraphRunner(model, graphs=fake)
    before = run(*inputs(0))
    model.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})
    after = run(*inputs(0))
    assert not torch.equal(before, after)
    assert torch.equal(after, model(*inputs(0)))
    assert fake.captures == 1
    assert not run.explain().invalidated


def replace_parameter(model):
    model.x_embedder.proj.bias = nn.Parameter(torch.ones_like(model.x_embedder.proj.bias), requires_grad=False)
    return "x_embedder.proj.bias was replaced"


def assign_state(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return "x_embedder.proj.weight was replaced"


def move_data(model):
    model.latent[0].conv1.weight.data = model.latent[0].conv1.weight.data.clone()
    return "latent.0.conv1.weight has moved in memory"


def replace_module(model):
    model.latent[0].conv1 = nn.Conv2d(32, 32, 1).eval()
    return "latent.0.conv1 was replaced"


def fuse_it(model):
    dk.fuse(model)
    return "the model is now a DiCo[fused]"


@pytest.mark.parametrize("change", [replace_parameter, assign_state, move_data, replace_module, fuse_it])
def test_a_changed_model_is_recorded_anew(model, change):
    fake = FakeGraphs()
    run = dk.GraphRunner(model, graphs=fake)
    with torch.no_grad():
        run(*inputs(0))
        run(*inputs(0, n=3))
    what = change(model)
    with torch.no_grad():
        torch.testing.assert_close(run(*inputs(0)), model(*inputs(0)))
        assert (fake.captures, len(run)) == (3, 1)  # the graph of the other kind is gone, too
        run(*inputs(0))
    assert fake.captures == 3
    assert run.explain().invalidated == {what: 1}
    assert f"all graphs dropped 1x: {what}" in str(run.explain())


@torch.no_grad()
def test_without_watching_only_reset_drops_graphs(model):
    fake = FakeGraphs()
    run = dk.GraphRunner(model, graphs=fake, watch=False)
    run(*inputs(0))
    replace_parameter(model)
    run(*inputs(0))
    assert fake.captures == 1
    run.reset()
    assert len(run) == 0
    run(*inputs(0))
    assert fake.captures == 2


@torch.no_grad()
def test_a_stale_graph_is_recorded_anew_and_makes_room_for_itself(model):
    fake = FakeGraphs()
    run = dk.GraphRunner(model, graphs=fake, max_graphs=2)
    for n in (1, 2):
        run(*inputs(0, n=n))
    next(iter(run._kept.values())).graph.stale = True
    for n in (1, 2):
        torch.testing.assert_close(run(*inputs(1, n=n)), model(*inputs(1, n=n)), rtol=0, atol=0)
    assert (fake.captures, len(run), run.explain().evicted) == (3, 2, 0)


class Second(torch.Tensor):
    """A tensor on the CPU that says it is on a second one."""

    device = property(lambda self: torch.device("cpu", 1))


def eager_reason(run, *args, **kwargs):
    run(*args, **kwargs)
    row = run.explain()[-1]
    assert (row.how, row.calls) == ("eager", 1)
    return row.reason


class TestEager:
    def test_not_on_a_gpu(self, model):
        run = dk.GraphRunner(model)
        with torch.no_grad():
            assert torch.equal(run(*inputs(0)), model(*inputs(0)))
        assert run.explain()[0].reason == "x is on cpu: a graph needs every tensor on cuda"
        assert "x is on cpu" in str(run.explain())

    def test_gradients(self, model):
        run = dk.GraphRunner(model, graphs=FakeGraphs())
        assert "gradients are enabled" in eager_reason(run, *inputs(0))
        assert run(*inputs(0)).requires_grad

    @torch.no_grad()
    def test_training(self, model):
        run = dk.GraphRunner(model.train(), graphs=FakeGraphs())
        assert "the model is in training mode" in eager_reason(run, *inputs(0))
        model.eval()
        model.latent[0].train()
        run(*inputs(0))
        assert "a submodule is in training mode" in run.explain()[-1].reason
        model.eval()
        run(*inputs(0))
        assert run.explain()[-1].how == "graph"

    @torch.no_grad()
    def test_arguments_that_cannot_be_recorded(self, model):
        class Odd(nn.Module):
            def forward(self, x, extra):
                return x * 2

        run = dk.GraphRunner(Odd().eval(), graphs=FakeGraphs())
        assert "argument extra is a list" in eager_reason(run, torch.ones(1), extra=[1])
        sub = nn.Parameter(torch.ones(1))
        assert "x is a Parameter" in eager_reason(run, sub, None)

    @torch.no_grad()
    def test_several_devices(self, model):
        fake = FakeGraphs()
        run = dk.GraphRunner(model, graphs=fake)
        x, t, y = inputs(0)
        reason = "t is on cpu:1: a graph needs every tensor on one device, here cpu"
        assert eager_reason(run, x, t.as_subclass(Second), y) == reason
        model.register_buffer("elsewhere", torch.ones(1).as_subclass(Second))
        reason = "elsewhere is on cpu:1: a graph needs the whole model on one device, here cpu"
        assert eager_reason(run, x, t, y) == reason
        assert fake.captures == fake.warmups == 0
        del model.elsewhere
        run(x, t, y)
        assert run.explain()[-1].how == "graph"

    @torch.no_grad()
    def test_no_tensor_at_all(self):
        class Scalar(nn.Module):
            def forward(self, x):
                return torch.full((2,), x)

        run = dk.GraphRunner(Scalar().eval(), graphs=FakeGraphs())
        assert "no argument is a tensor" in eager_reason(run, 3.0)

    @torch.no_grad()
    def test_a_failed_capture_is_not_tried_again_until_the_model_changes(self, model):
        fake = FakeGraphs(RuntimeError("operation not permitted\nwhen stream is capturing"))
        run = dk.GraphRunner(model, graphs=fake, warmup=1)
        for _ in range(3):
            assert torch.equal(run(*inputs(0)), model(*inputs(0)))
        (row,) = run.explain()
        assert row.reason == "capture failed: RuntimeError: operation not permitted"
        assert (row.calls, fake.warmups) == (3, 1)
        fake.fails = None
        replace_parameter(model)
        run(*inputs(0))
        assert run.explain()[-1].how == "graph"

    @torch.no_grad()
    def test_an_output_that_is_no_tensor(self):
        class Dict(nn.Module):
            def forward(self, x):
                return {"out": x}

        run = dk.GraphRunner(Dict().eval(), graphs=FakeGraphs())
        assert "the output is a dict" in eager_reason(run, torch.ones(1))

    @torch.no_grad()
    def test_a_tuple_of_tensors_is_fine(self):
        class Pair(nn.Module):
            def forward(self, x):
                return x + 1, x * 2

        run = dk.GraphRunner(Pair().eval(), graphs=FakeGraphs())
        run(torch.zeros(2))
        a, b = run(torch.full((2,), 3.0))
        assert (a.tolist(), b.tolist()) == ([4.0, 4.0], [6.0, 6.0])


def test_the_models_own_errors_are_the_callers(model):
    run = dk.GraphRunner(model, graphs=FakeGraphs())
    with torch.no_grad(), pytest.raises(ValueError, match="y holds labels"):
        run(*inputs(0)[:2], torch.tensor([0, 99]))


def test_unusable_arguments_are_named(model):
    with pytest.raises(TypeError, match="model is a function: expected an nn"):
        dk.GraphRunner(lambda x: x)
    with pytest.raises(ValueError, match="max_graphs=0: expected an integer >= 1"):
        dk.GraphRunner(model, max_graphs=0)
    with pytest.raises(ValueError, match="warmup=True"):
        dk.GraphRunner(model, warmup=True)
    assert str(dk.GraphRunner(model).explain()) == "Nothing was called."


def on_gpu(seed, **sizes):
    return [v.cuda() for v in inputs(seed, **sizes)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnGpu:
    @pytest.mark.parametrize("fused", [False, True])
    def test_replays_equal_eager(self, model, fused):
        model = model.cuda()
        if fused:
            dk.fuse(model)
        run = dk.GraphRunner(model, max_graphs=2)
        for seed, n in ((0, 2), (1, 2), (2, 4), (3, 2), (4, 1), (5, 2)):
            given = on_gpu(seed, n=n)
            with torch.inference_mode():
                torch.testing.assert_close(run(*given), model(*given))
        assert {row.how for row in run.explain()} == {"graph"}, str(run.explain())

    @torch.no_grad()
    def test_weights_written_in_place(self, model):
        model, given = model.cuda(), on_gpu(0)
        run = dk.GraphRunner(model)
        before = run(*given)
        model.load_state_dict({k: v * 1.1 if v.is_floating_point() else v for k, v in model.state_dict().items()})
        after = run(*given)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, model(*given))
        assert run.explain().captured == 1

    @torch.no_grad()
    def test_under_autocast(self, model):
        model, given = model.cuda(), on_gpu(0)
        run = dk.GraphRunner(model)
        for _ in range(3):
            with torch.autocast("cuda", torch.bfloat16):
                torch.testing.assert_close(run(*given), model(*given))
        assert run.explain()[0].how == "graph", str(run.explain())
