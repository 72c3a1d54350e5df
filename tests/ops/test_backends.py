"""Which backend runs, how to ask for one, and that a fallback is never silent."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from support import run_python
from torch import nn

import dico_kernels as dk
from dico_kernels import native
from dico_kernels.ops import _backends

X, V = torch.randn(2, 4, 3, 3), torch.randn(2, 4)


def who_runs():
    rows = dk.explain(dk.ops.adaln_modulate, X, V, V)
    assert len(rows) == 1
    return rows[0].choice


@pytest.fixture(autouse=True)
def _forget(monkeypatch):
    monkeypatch.setattr(_backends._SETTING, "warned", set())
    monkeypatch.setattr(_backends._SETTING, "tables", {})
    monkeypatch.setattr(_backends._SETTING, "chosen", (_backends._SETTING.name, {}))


def test_auto_is_native_on_a_cpu():
    choice = who_runs()
    assert choice.backend == "native"
    assert choice.refusals == {
        "triton": "Triton compiles for GPUs; x is on cpu",
        "cuda": "CUDA kernels run on a GPU; x is on cpu",
    }


def test_a_backend_can_be_asked_for_and_the_context_ends():
    with dk.backend("reference"):
        assert who_runs().backend == "reference"
        with dk.backend("native"):
            assert who_runs().backend == "native"
        assert who_runs().backend == "reference"
    assert who_runs().backend == "native"


def test_it_holds_for_backward_too():
    x = X.clone().requires_grad_()
    seen = []
    with dk.backend("reference"), _backends.recording(seen.append):
        dk.ops.adaln_modulate(x, V, V).sum().backward()
    assert [(c.entry, c.backend) for c in seen] == [
        ("adaln_modulate", "reference"),
        ("adaln_modulate_backward", "reference"),
    ]


def test_falling_back_warns_once_with_the_reasons():
    with dk.backend("cuda"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dk.ops.adaln_modulate(X, V, V)
        dk.ops.adaln_modulate(X, V, V)
    ours = [str(w.message) for w in caught if "dico_kernels" in str(w.message)]
    assert len(ours) == 1
    assert "adaln_modulate runs on native instead (cuda: CUDA kernels run on a GPU; x is on cpu" in ours[0]


def test_strict_raises_with_the_reasons():
    with dk.backend("cuda", strict=True), pytest.raises(dk.BackendError, match=r"cuda: CUDA kernels run on a GPU"):
        dk.ops.adaln_modulate(X, V, V)


def test_strict_auto_refuses_the_reference(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_unavailable", "it was not built")
    assert who_runs().backend == "reference"
    with dk.backend("auto", strict=True), pytest.raises(dk.BackendError, match="native: it was not built"):
        dk.ops.adaln_modulate(X, V, V)


def test_unknown_backends_are_named():
    expected = r"name='cudnn': expected one of auto, triton, cuda, native, reference"
    with pytest.raises(ValueError, match=expected), dk.backend("cudnn"):
        pass


@pytest.mark.parametrize(
    ("value", "expected"), [("reference", "reference"), ("auto", "native"), ("", "native"), ("bogus", "")]
)
def test_environment_variable(value, expected):
    code = (
        "import torch, dico_kernels as dk; x, v = torch.ones(1, 2, 1, 1), torch.ones(1, 2)\n"
        "print(dk.explain(dk.ops.adaln_modulate, x, v, v)[0].choice.backend)"
    )
    done = run_python("-c", code, cwd=Path("/"), DICO_KERNELS_BACKEND=value)
    assert done.stdout.strip() == expected
    if not expected:
        assert "DICO_KERNELS_BACKEND='bogus': expected one of auto" in done.stderr


class Gate(nn.Module):
    def forward(self, x, v):
        return dk.ops.gated_residual(x, x, v)


def test_explain_names_modules_and_leaves_no_hooks():
    model = nn.ModuleDict({"inner": nn.ModuleDict({"gate": Gate()})})
    outer = Gate()
    outer.add_module("child", model["inner"]["gate"])
    outer.forward = lambda x, v: dk.ops.adaln_modulate(outer.child(x, v), v, v)
    rows = dk.explain(outer, X, V)
    assert [(r.module, r.choice.entry) for r in rows] == [("child", "gated_residual"), ("", "adaln_modulate")]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in outer.modules())
    table = str(rows)
    assert "child" in table
    assert "why not the others" in table
    assert "2x4x3x3" in table
    assert str(dk.explain(nn.Identity(), X)) == "No dico_kernels op was called."


def test_a_choice_and_what_was_found_for_it_change_together(monkeypatch):
    """Another thread that enters a context between two reads of the setting must not spoil the table of before."""
    before, switched = _backends._why_not_native, []

    def why_not(entry, x):
        if not switched:
            switched.append(dk.backend("reference"))
            switched[0].__enter__()
        return before(entry, x)

    monkeypatch.setitem(_backends._BACKENDS, "native", (why_not, _backends._BACKENDS["native"][1]))
    x = torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    try:
        assert _backends.select("channel_sums", x) is native.channel_sums
        assert _backends.select("channel_sums", x).__module__ == "dico_kernels.ops._reference"
    finally:
        switched[0].__exit__(None, None, None)
    assert _backends.select("channel_sums", x) is native.channel_sums
