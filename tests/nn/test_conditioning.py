"""The conditioning of a level at once: the same numbers as head by head, and every head that must be called is."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from support import DEVICE
from torch import nn

import dico_kernels as dk
from dico_kernels.nn.adaln import AdaLNModulation, conditioned, modulation
from dico_kernels.ops import conditioning as op
from dico_kernels.ops._backends import recording
from dico_kernels.reference import FCDM, DiCo
from dico_kernels.reference.weights import fill_

pytest.importorskip("triton")
DEPTH = (1, 1, 3, 2, 1)
GROUPED = 2  # levels of more than one block


def inputs(dtype=torch.float32, n=2):
    x = torch.randn(n, 4, 4, 4, dtype=dtype, device=DEVICE)
    return x, torch.arange(n, device=DEVICE) * 300, torch.arange(n, device=DEVICE)


def model(kind=DiCo, dtype=torch.float32):
    return fill_(kind(hidden_size=8, depth=DEPTH, num_classes=3)).to(DEVICE, dtype).eval()


def run(network, args):
    """(output, how many levels were conditioned at once) on Triton."""
    rows = []
    with dk.backend("triton"), recording(rows.append), torch.inference_mode():
        out = network(*args)
    return out, sum(row.entry == "conditioning" for row in rows)


def through(level, x, c):
    with conditioned([level]):
        for block in level:
            x = block(x, c)
    return x


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(DiCo, torch.float32), (DiCo, torch.bfloat16), (DiCo, torch.float64), (FCDM, torch.float32)],
    ids=["DiCo fp32", "DiCo bf16", "DiCo fp64", "FCDM fp32"],
)
def test_as_head_by_head(kind, dtype, monkeypatch):
    network, args = dk.fuse(model(kind, dtype)), inputs(dtype)
    together, levels = run(network, args)
    assert levels == GROUPED
    monkeypatch.setattr(op, "_FEW", 0)
    apart, levels = run(network, args)
    assert levels == 0
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    assert (together - apart).double().norm() <= tolerance * apart.double().norm()


def test_one_vector_for_all_images():
    network = dk.fuse(model())
    x, t, y = inputs()
    together, levels = run(network, (x, t[:1], y[:1]))
    assert levels == GROUPED
    torch.testing.assert_close(together, network(x, t[:1], y[:1]), rtol=1e-4, atol=1e-5)


def test_weights_that_change_are_read_anew():
    network, args = dk.fuse(model()), inputs()
    run(network, args)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.5)
    changed, levels = run(network, args)
    assert levels == GROUPED
    torch.testing.assert_close(changed, network(*args), rtol=1e-4, atol=1e-4)


class Doubled(nn.Linear):
    def forward(self, c):
        return 2 * super().forward(c)


def with_hook(level):
    level[1].adaLN_modulation[1].register_forward_hook(lambda m, args, out: 2 * out)


def with_a_linear_of_its_own(level):
    old = level[1].adaLN_modulation[1]
    level[1].adaLN_modulation[1] = Doubled(old.in_features, old.out_features, device=DEVICE)
    level[1].adaLN_modulation[1].load_state_dict(old.state_dict())


def with_another_c(level):
    level[1].register_forward_pre_hook(lambda m, args: (args[0], 2 * args[1]))


def with_c_changed_in_place(level):
    level[1].register_forward_pre_hook(lambda m, args: (args[1].mul_(2), None)[1])


def with_a_forward_of_its_own(level):
    head = level[1].adaLN_modulation
    head.forward = lambda c: 2 * nn.Sequential.forward(head, c)


def with_a_parametrization(level):
    nn.utils.parametrizations.weight_norm(level[1].adaLN_modulation[1])


def with_a_block_that_changes_weights(level):
    """As offloading and hot-swapping code does it: a forward of its own on the instance, around the class's."""
    block = level[1]
    doubled = 2 * block.adaLN_modulation[1].weight.detach()

    def changed(x, c):
        with torch.no_grad():
            block.adaLN_modulation[1].weight.copy_(doubled)
        return type(block).forward(block, x, c)

    block.forward = changed


def with_hook_on_the_block(level):
    level[0].register_forward_hook(lambda m, args, out: (args[1].mul_(2), None)[1])


@pytest.mark.parametrize(
    ("change", "levels", "same"),
    [
        (with_hook, 1, False),
        (with_a_linear_of_its_own, 1, False),
        (with_a_forward_of_its_own, 1, False),
        (with_a_parametrization, 1, True),
        (with_another_c, 0, False),
        (with_c_changed_in_place, 0, False),
        (with_hook_on_the_block, 0, False),
        (with_a_block_that_changes_weights, 0, False),
        (lambda level: level[1].adaLN_modulation[1].register_parameter("bias", None), 0, False),
        (lambda level: None, 1, True),
    ],
    ids=[
        "hook",
        "linear",
        "forward",
        "parametrized",
        "another c",
        "c in place",
        "block's hook",
        "block's own",
        "no bias",
        "nothing",
    ],
)
def test_heads_that_are_not_plain_are_called(change, levels, same):
    network = dk.fuse(model())
    level, x, c = network.latent, torch.randn(2, 32, 1, 2, device=DEVICE), torch.randn(2, 32, device=DEVICE)
    plain, _ = run(lambda: through(level, x, c.clone()), ())
    change(level)
    found, grouped = run(lambda: through(level, x, c.clone()), ())
    assert grouped == levels
    with torch.inference_mode():
        wanted = through(dk.unfuse(network).latent, x, c.clone())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert same == ((found - plain).abs().max() < 1e-3)


def test_left_to_the_heads_where_more_than_numbers_is_wanted(monkeypatch):
    network = dk.fuse(model())
    level, x, c = network.latent, torch.randn(2, 32, 1, 2, device=DEVICE), torch.randn(2, 32, device=DEVICE)
    rows = []
    with dk.backend("triton"), recording(rows.append):
        through(level, x, c).sum().backward()
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
            through(level, x, c)
        with torch.no_grad():
            monkeypatch.setattr(op, "_FEW", 1)
            through(level, x, c)
    assert not [row for row in rows if row.entry == "conditioning"]
    assert all(p.grad is not None for p in level[0].adaLN_modulation.parameters())


def test_a_block_may_want_gradients_after_all():
    network = dk.fuse(model())
    level, x, c = network.latent, torch.randn(2, 32, 1, 2, device=DEVICE), torch.randn(2, 32, device=DEVICE)
    with dk.backend("triton"), torch.no_grad(), conditioned([level]), torch.enable_grad():
        level[0](x, c).sum().backward()
    assert level[0].adaLN_modulation[1].weight.grad is not None


def test_compiled_blocks_do_without():
    network = dk.fuse(model())
    network.latent[0].compile(backend="eager")
    level, x, c = network.latent, torch.randn(2, 32, 1, 2, device=DEVICE), torch.randn(2, 32, device=DEVICE)
    _, grouped = run(lambda: through(level, x, c), ())
    assert grouped == 0


def test_under_torch_compile():
    network, args = dk.fuse(model()), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*args), network(*args), rtol=1e-4, atol=1e-5)


def test_explain_shows_what_runs():
    network, args = dk.fuse(model()), inputs()
    with dk.backend("triton"):
        rows = dk.explain(network, *args)
    assert [(r.module, r.choice.backend) for r in rows if r.choice.entry == "conditioning"] == [
        ("", "triton")
    ] * GROUPED


def test_what_was_computed_is_for_its_context_and_thread_alone():
    heads = [fill_(AdaLNModulation(8, 6)).to(DEVICE) for _ in range(2)]
    blocks = [copy.deepcopy(dk.nn.DiCoBlock(8)).to(DEVICE) for _ in heads]
    for block, head in zip(blocks, heads, strict=True):
        block.adaLN_modulation = head
    c, calls = torch.randn(2, 8, device=DEVICE), []
    other = c.clone()

    def called(head, c):
        count = len(calls)
        y = modulation(head, c)
        return len(calls) - count, y

    original = AdaLNModulation.forward
    try:
        AdaLNModulation.forward = lambda self, c: (calls.append(1), original(self, c))[1]
        with dk.backend("triton"), torch.no_grad():
            with conditioned([blocks]):
                assert called(heads[0], c)[0] == 0
                assert called(heads[0], other)[0] == 1
                seen = []
                thread = threading.Thread(target=lambda: seen.append(called(heads[1], c)[0]))
                thread.start()
                thread.join()
                assert seen == [1]
                with conditioned([blocks]):
                    assert called(heads[1], other)[0] == 0
                    assert called(heads[1], c)[0] == 1
                assert called(heads[1], c)[0] == 0
            assert called(heads[0], c)[0] == 1
    finally:
        AdaLNModulation.forward = original
