"""explain on modules: which are fused, why others are not, and what runs each kernel."""

from __future__ import annotations

import torch
from foreign import Block, FCDMBlock
from test_fuse import hard
from torch import nn

import dico_kernels as dk


def test_a_fused_model():
    model, inputs = hard("DiCo")
    shown = dk.explain(model)
    assert [v.fits for v in shown.modules] == [True] * 8
    assert not any(v.fused for v in shown.modules)
    assert "not fused yet: call dico_kernels.fuse" in str(shown)
    assert shown == []  # not called
    dk.fuse(model)
    before = model(*inputs)
    rows = dk.explain(model, *inputs)
    assert [v.module for v in rows.modules] == [
        *("", "encoder_level_1.0", "encoder_level_2.0", "encoder_level_2.1", "latent.0"),
        *("decoder_level_2.0", "decoder_level_1.0", "final_layer"),
    ]
    assert all(v.fused for v in rows.modules)
    assert rows.modules[0].figure is None  # our own forward needs no proof
    assert all(v.figure < 1e-10 for v in rows.modules[1:])
    assert {r.module for r in rows} >= {v.module for v in rows.modules}
    assert all(r.choice.backend for r in rows)
    assert torch.equal(model(*inputs), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_neighbours_that_are_alike_share_a_line():
    model, inputs = hard("DiCo")
    text = str(dk.explain(dk.fuse(model), *inputs))
    assert "encoder_level_2.0-1  DiCo block, fused" in text
    assert "encoder_level_2.1 " not in text
    assert text.count("final layer, fused") == 1
    assert "DiCo block, unfused" not in text
    assert max(map(len, text.splitlines())) < 220


def test_one_that_fell_back_is_told_from_its_neighbours():
    blocks = nn.Sequential(*(dk.nn.FCDMFinalLayer(8, 4) for _ in range(3)), FCDMBlock(16), FCDMBlock(16))
    dk.fuse(blocks)
    blocks[4].pwconv1.register_forward_hook(lambda *_: None)
    rows = dk.explain(blocks)
    assert [v.fused for v in rows.modules] == [True] * 4 + [False]
    assert rows.modules[4].reason == "pwconv1 has forward hooks"
    text = str(rows)
    assert "0-2  " in text
    assert "pwconv1 has forward hooks" in text


def test_a_refusal_carries_the_probes_figure():
    verdict = dk.explain(Block(16, approximate="tanh")).modules[0]
    assert 1e-5 < verdict.figure < 1e-2
    assert f"{verdict.figure:.1e}" in str(dk.explain(Block(16, approximate="tanh")))


def test_backends_are_named():
    model, inputs = hard("FCDM")
    dk.fuse(model)
    with dk.backend("reference"):
        rows = dk.explain(model, *inputs)
    assert {r.choice.backend for r in rows} == {"reference"}
    assert "reference" in str(rows)


def test_every_kernel_of_a_block_is_named():
    """Those that a backend may do without, too."""
    x, c = torch.randn(1, 16, 8, 8), torch.randn(1, 16)
    for block, wanted in ((dk.nn.DiCoBlock(16), "depthwise"), (dk.nn.FCDMBlock(16), "grn_scale")):
        with torch.no_grad():
            entries = {row.choice.entry for row in dk.explain(block.eval(), x, c)}
        assert any(entry.startswith(wanted) for entry in entries), entries
