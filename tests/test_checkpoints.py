"""load_checkpoint: every published form loads, everything else is refused by name, and a refusal loads nothing."""

from __future__ import annotations

import argparse
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

import dico_kernels as dk
from dico_kernels.reference import DiCo


def tiny(**overrides):
    return DiCo(**{"hidden_size": 8, "depth": (1, 1, 1, 1, 1), "num_classes": 3, **overrides})


def weights(seed):
    torch.manual_seed(seed)
    return {k: torch.randn_like(v) for k, v in tiny().state_dict().items()}


def holds(model, expected):
    return all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


MODEL, EMA = weights(1), weights(2)
TRAINING = {
    "model": MODEL,
    "ema": EMA,
    "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
    "args": argparse.Namespace(model="DiCo-S", image_size=256, results_dir="results"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_training_checkpoint(tmp_path, legacy):
    path = tmp_path / "0400000.pt"
    torch.save(TRAINING, path, _use_new_zipfile_serialization=not legacy)
    model = tiny()
    before = {name: id(p) for name, p in model.named_parameters()}
    assert dk.load_checkpoint(model, path) == ("ema", [], [])
    assert holds(model, EMA)
    assert dk.load_checkpoint(model, str(path), prefer_ema=False).source == "model"
    assert holds(model, MODEL)
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_bare_state_dict_safetensors_and_mappings(tmp_path):
    torch.save(MODEL, tmp_path / "bare.pt")
    save_file(EMA, tmp_path / "weights.safetensors")
    model = tiny()
    assert dk.load_checkpoint(model, tmp_path / "bare.pt").source == "state_dict"
    assert holds(model, MODEL)
    assert dk.load_checkpoint(model, tmp_path / "weights.safetensors").source == "state_dict"
    assert holds(model, EMA)
    assert dk.load_checkpoint(model, MODEL).source == "state_dict"
    assert holds(model, MODEL)
    assert dk.load_checkpoint(model, TRAINING).source == "ema"
    assert dk.load_checkpoint(model, {"model": MODEL}).source == "model"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(prefix):
    model = tiny()
    dk.load_checkpoint(model, {prefix + k: v for k, v in MODEL.items()})
    assert holds(model, MODEL)


def test_keeps_the_models_dtype():
    model = tiny().bfloat16()
    dk.load_checkpoint(model, MODEL)
    assert holds(model, {k: v.bfloat16() for k, v in MODEL.items()})


def test_every_kind_of_mismatch_in_one_error():
    bad = dict(MODEL)
    del bad["x_embedder.proj.bias"]
    bad["extra.weight"] = torch.zeros(1)
    bad["latent.0.conv1.weight"] = torch.zeros(7, 32, 1, 1)
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        dk.load_checkpoint(model, bad)
    message = str(caught.value)
    assert "missing (1): x_embedder.proj.bias" in message
    assert "unexpected (1): extra.weight" in message
    assert "latent.0.conv1.weight (checkpoint (7, 32, 1, 1), model (32, 32, 1, 1))" in message
    assert holds(model, before)


def test_not_strict_reports_keys_but_still_refuses_shapes():
    partial = {k: v for k, v in MODEL.items() if k != "x_embedder.proj.bias"} | {"extra": torch.zeros(1)}
    model = tiny()
    assert dk.load_checkpoint(model, partial, strict=False) == (
        "state_dict",
        ["x_embedder.proj.bias"],
        ["extra"],
    )
    with pytest.raises(ValueError, match="wrongly shaped"):
        dk.load_checkpoint(tiny(num_classes=4), MODEL, strict=False)


def test_another_variant_is_named(tmp_path):
    with torch.device("meta"):
        other = dk.create_model("FCDM-S")
    with pytest.raises(ValueError, match=r"does not fit FCDM \(231 tensors\)") as caught:
        dk.load_checkpoint(other, MODEL)
    assert "and " in str(caught.value)
    assert len(str(caught.value).splitlines()) < 8
    assert "variant and settings" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path, suffix, kept):
    path = tmp_path / f"weights{suffix}"
    save_file(MODEL, path) if suffix == ".safetensors" else torch.save(MODEL, path)
    os.truncate(path, int(path.stat().st_size * kept))
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"weights{suffix}: not a complete"):
        dk.load_checkpoint(model, path)
    assert holds(model, before)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_damaged_file_is_named_whatever_breaks(tmp_path, legacy):
    path = tmp_path / "weights.pt"
    torch.save({k: MODEL[k] for k in list(MODEL)[:3]}, path, _use_new_zipfile_serialization=not legacy)
    whole = bytearray(path.read_bytes())
    generator, refused = torch.Generator().manual_seed(0), 0
    for position in torch.randint(min(1500, len(whole)), (150,), generator=generator).tolist():
        damaged = whole.copy()
        damaged[position] ^= 0x5A
        path.write_bytes(damaged)
        try:
            dk.load_checkpoint(tiny(), path, strict=False)
        except ValueError as error:
            assert "weights.pt" in str(error)  # noqa: PT017
            refused += 1
    assert refused > 20


def test_wrapped_models_load_too():
    for wrapped in (torch.compile(tiny()), torch.nn.DataParallel(tiny())):
        dk.load_checkpoint(wrapped, {f"module.{k}": v for k, v in MODEL.items()})
        inner = next(wrapped.children())
        assert holds(inner, MODEL)


def test_a_model_without_memory_is_refused():
    with torch.device("meta"):
        model = tiny()
    with pytest.raises(ValueError, match=r"DiCo has 99 tensors on the meta device.*to_empty"):
        dk.load_checkpoint(model, MODEL)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_tensors_of_another_kind_are_refused(dtype):
    with pytest.raises(ValueError, match=r"of the wrong kind \(99\): x_embedder.proj.weight \(checkpoint"):
        dk.load_checkpoint(tiny(), {k: v.to(dtype) for k, v in MODEL.items()})


def test_an_empty_ema_is_passed_over():
    assert dk.load_checkpoint(tiny(), {"ema": {}, "model": MODEL}).source == "model"


class RunsCode:
    def __reduce__(self):
        return exec, ("import test_checkpoints_ran_code",)


@pytest.mark.parametrize("wrap", [lambda o: o, lambda o: {"ema": MODEL, "args": o}])
def test_a_file_that_would_run_code_is_refused(tmp_path, wrap):
    torch.save(wrap(RunsCode()), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil.pt: .*can run code"):
        dk.load_checkpoint(tiny(), tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(wrap(RunsCode()), protocol=2))
    with pytest.raises(ValueError, match=r"plain.pt: .*can run code"):
        dk.load_checkpoint(tiny(), tmp_path / "plain.pt")


def test_loading_leaves_torchs_allow_list_alone(tmp_path):
    torch.save(TRAINING, tmp_path / "a.pt")
    dk.load_checkpoint(tiny(), tmp_path / "a.pt")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({}, "holds nothing"),
        ({"optimizer": {"lr": 1.0}}, "holds optimizer; expected parameter names"),
        ({"model": {"lr": 1.0}}, "holds model; expected parameter names"),
        ({0: torch.zeros(1)}, "holds 0; expected parameter names"),
    ],
)
def test_a_mapping_without_weights_is_refused(content, named):
    with pytest.raises(ValueError, match=named):
        dk.load_checkpoint(tiny(), content)


def test_a_file_of_another_type_or_none_is_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, expected a mapping"):
        dk.load_checkpoint(tiny(), tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent.pt"):
        dk.load_checkpoint(tiny(), tmp_path / "absent.pt")
