"""The reference models are the published ones: keys, sizes, MACs, outputs, gradients, behaviour in training."""

from __future__ import annotations

import pytest
import torch
from support import golden, layouts, rel_rms

import dico_kernels as dk
from dico_kernels.reference import FCDM, DiCo, DiT
from dico_kernels.reference.macs import count_macs, count_macs_by_op
from dico_kernels.reference.weights import fill_, named_input

TINY_DICO = "DiCo-tiny(hidden_size=24,depth=[1,2,1,1,1],mlp_ratio=2)"
TINY_FCDM = "FCDM-tiny(hidden_size=16,depth=[1,1,2,1,1],mlp_ratio=3)"
TINY = {
    TINY_DICO: lambda: DiCo(hidden_size=24, depth=[1, 2, 1, 1, 1], mlp_ratio=2),
    TINY_FCDM: lambda: FCDM(hidden_size=16, depth=[1, 1, 2, 1, 1], mlp_ratio=3),
}
# parameters, tensors, GMAC at 256 and at 512, to the published tables' digits
SIZES = {
    "DiCo-S": (33_137_672, 323, "4.2365", "16.904"),
    "DiCo-B": (129_992_712, 323, "16.856", "67.255"),
    "DiCo-L": (463_897_992, 631, "60.169", "240.004"),
    "DiCo-XL": (701_151_368, 673, "87.221", "347.860"),
    "DiCo-H": (1_037_408_328, 897, "194.029", "774.915"),
    "FCDM-S": (32_699_912, 231, "3.0734", "12.268"),
    "FCDM-B": (127_675_400, 231, "12.136", "48.443"),
    "FCDM-L": (504_453_128, 231, "48.231", "192.516"),
    "FCDM-XL": (698_754_056, 331, "64.530", "257.519"),
    "DiT-S/2": (32_963_360, 132, "6.056", "31.437"),
    "DiT-B/2": (130_512_416, 132, "23.005", "106.383"),
    "DiT-L/2": (458_102_816, 252, "80.698", "360.982"),
    "DiT-XL/2": (675_129_632, 292, "118.621", "524.538"),
}
GOLDEN_RUNS = sorted(k.rsplit("|", 1)[0] for k in golden() if k.endswith("|out") and "tiny" not in k)


def on_meta(name, **overrides):
    with torch.device("meta"):
        return dk.create_model(name, **overrides)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", TINY)
def test_tiny_outputs_and_every_gradient_are_the_published(variant, fused):
    model = fill_(TINY[variant]()).eval()
    model = dk.fuse(model) if fused else model
    x = named_input((3, 4, 8, 12)).requires_grad_()
    out = model(x, torch.tensor([999, 500, 37]), torch.tensor([207, 1000, 0]))
    expected = golden()[f"{variant}|out"]
    assert rel_rms(out, expected) < 1e-5
    (out * named_input(tuple(out.shape), "input.grad_out")).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    wanted = {k.split("|", 1)[1]: v for k, v in golden().items() if k.startswith(f"{variant}|grad")}
    assert len(wanted) == len(gradients) + 1
    for key, value in wanted.items():
        kind, name = key.split(".", 1)
        if key == "grad.x":
            actual = x.grad
        elif kind == "gradrow":
            actual = gradients[name][[207, 1000, 0]]
        else:
            actual = gradients[name]
        assert rel_rms(actual, value) < 1e-5, key


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("run", GOLDEN_RUNS)
def test_outputs_are_the_published(run, fused):
    name, size = run.split("|")
    h, w = map(int, size.split("x"))
    model = fill_(dk.create_model(name, fused=fused)).eval()
    x, t, y = named_input((2, 4, h, w)), torch.tensor([999, 500]), torch.tensor([207, 1000])
    with torch.no_grad():
        out = model(x, t, y)
        both = model.forward_with_cfg(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, 1000)]), 1.4
        )
    assert rel_rms(out, golden()[f"{run}|out"]) < 1e-5
    assert rel_rms(both[:2], golden()[f"{run}|cfg"]) < 1e-5
    assert torch.equal(both[:2, :3], both[2:, :3])
    assert not torch.equal(both[:2, 3:], both[2:, 3:])


@pytest.mark.parametrize("name", SIZES)
def test_layout_and_counts(name):
    model = on_meta(name)
    layout = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert list(layout.items()) == list(layouts()[name].items())
    params, tensors = SIZES[name][:2]
    assert sum(p.numel() for p in model.parameters()) == params
    assert len(layout) == tensors


@pytest.mark.parametrize("variant", TINY)
def test_tiny_layout(variant):
    layout = {k: list(v.shape) for k, v in TINY[variant]().state_dict().items()}
    assert list(layout.items()) == list(layouts()[variant].items())


def test_every_variant_is_listed():
    assert dk.model_names() == list(SIZES)


def test_dit_positions_are_fixed():
    model = on_meta("DiT-S/2")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 32_865_056


@pytest.mark.parametrize("name", SIZES)
def test_macs(name):
    for size, published in zip((32, 64), SIZES[name][2:], strict=True):
        model = on_meta(name, input_size=size) if name.startswith("DiT") else on_meta(name)
        digits = len(published.split(".")[1])
        assert f"{count_macs(model, size, size) / 1e9:.{digits}f}" == published


def test_macs_scale_with_the_batch_and_leave_the_model_alone():
    model = TINY[TINY_DICO]()
    assert count_macs(model, 8, 8, batch=3) == 3 * count_macs(model, 8, 8)
    by_op = count_macs_by_op(model, torch.empty(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert set(by_op) == {"convolution", "addmm"}
    assert sum(by_op.values()) == count_macs(model, 8, 8)
    assert model.training
    assert not next(model.parameters()).is_meta
    assert count_macs(dk.fuse(model), 8, 8) == sum(by_op.values())
    assert dk.explain(model).modules[0].fused


@pytest.mark.parametrize("name", ["DiCo-S", "FCDM-S", "DiT-S/2"])
def test_initialisation(name):
    model = dk.create_model(name)
    with torch.no_grad():
        out = model.eval()(torch.randn(1, 4, 32, 32), torch.tensor([10]), torch.tensor([3]))
    assert out.shape == (1, 8, 32, 32)
    assert torch.count_nonzero(out) == 0
    state = model.state_dict()
    for key, value in state.items():
        if "adaLN_modulation" in key or key.startswith(
            ("final_layer.out_proj", "final_layer.conv", "final_layer.linear")
        ):
            assert torch.count_nonzero(value) == 0, key
        elif "embedding_table" in key or ("t_embedder" in key and key.endswith("weight")):
            assert value.std().item() == pytest.approx(0.02, rel=0.05), key
        elif key.endswith("bias") or ".grn." in key:
            assert torch.count_nonzero(value) == 0, key
        elif key != "pos_embed":  # Xavier-uniform; the input convolution with its kernel flattened
            fan_in = value[0].numel()
            receptive = 1 if "x_embedder" in key else value[0, 0].numel()
            bound = (6 / (fan_in + value.shape[0] * receptive)) ** 0.5
            assert value.abs().max().item() == pytest.approx(bound, rel=0.1), key
            assert value.abs().max().item() <= bound * (1 + 1e-6), key


def test_dico_drops_one_mask_for_its_tables_and_fcdm_three():
    n = 4000
    y = torch.zeros(n, dtype=torch.long)
    masks = []
    with torch.no_grad():
        dico = TINY[TINY_DICO]().train().y_embedder
        embedded = dico(y)
        for level in range(3):
            table = dico.get_submodule(f"embedding_table_{level}").weight
            masks.append((embedded[level] == table[1000]).all(1))
        assert torch.equal(masks[0], masks[1])
        assert torch.equal(masks[0], masks[2])
        fcdm = TINY[TINY_FCDM]().train()
        for level in (1, 2, 3):
            embedder = fcdm.get_submodule(f"y_embedder_{level}")
            masks.append((embedder(y) == embedder.embedding_table.weight[1000]).all(1))
    for mask in masks:
        assert mask.float().mean().item() == pytest.approx(0.1, abs=0.02)
    agreement = (masks[3] == masks[4]).float().mean().item()
    assert agreement == pytest.approx(0.9 * 0.9 + 0.1 * 0.1, abs=0.03)  # independent


def test_labels_are_not_dropped_in_eval_or_with_probability_zero():
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([5, 6]), torch.tensor([1, 2])
    with torch.no_grad():
        model = fill_(TINY[TINY_FCDM]())
        assert torch.equal(model.eval()(x, t, y), model(x, t, y))
        never = fill_(FCDM(hidden_size=16, depth=[1] * 5, class_dropout_prob=0)).train()
        assert never.y_embedder_1.embedding_table.num_embeddings == 1000
        assert torch.equal(never(x, t, y), never(x, t, y))


def test_overrides_are_honoured():
    model = on_meta(
        "DiCo-XL",
        num_classes=10,
        in_channels=16,
        learn_sigma=False,
        hidden_size=64,
        depth=(1, 0, 2, 0, 1),
        mlp_ratio=3,
    )
    layout = model.state_dict()
    assert layout["y_embedder.embedding_table_0.weight"].shape == (11, 64)
    assert layout["x_embedder.proj.weight"].shape == (64, 16, 3, 3)
    assert layout["final_layer.out_proj.weight"].shape == (16, 128, 3, 3)
    assert layout["latent.1.conv4.weight"].shape == (768, 256, 1, 1)
    assert not any(k.startswith(("encoder_level_2", "decoder_level_2")) for k in layout)
    assert on_meta("DiT-B/2", input_size=64, patch_size=4).pos_embed.shape == (1, 256, 768)
    assert on_meta("FCDM-S", learn_sigma=False)(torch.empty(1, 4, 8, 8, device="meta"), *meta_ty()).shape[1] == 4


def meta_ty():
    return torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.long, device="meta")


def replica(module):
    """As nn.DataParallel makes them: a copy whose weights are plain attributes, with no parameters."""
    copy = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        copy._modules[name] = replica(child)
    for name, parameter in module._parameters.items():
        setattr(copy, name, None if parameter is None else parameter.detach())
    return copy


@pytest.mark.parametrize("make", [*TINY.values(), lambda: DiT(8, hidden_size=24, depth=2, num_heads=2)])
class TestForward:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @torch.no_grad()
    def test_a_replica_does_what_the_model_does(self, make, dtype):
        model = fill_(make()).eval().to(dtype)
        given = torch.randn(3, 4, 8, 8, dtype=dtype), torch.tensor([5, 6, 999]), torch.tensor([1, 2, 3])
        copy = replica(model)
        assert not list(copy.parameters())
        assert torch.equal(copy(*given), model(*given))

    def test_t_and_y_of_batch_one_broadcast(self, make):
        model, x = fill_(make()).eval(), torch.randn(3, 4, 8, 8)
        with torch.no_grad():
            one = model(x, torch.tensor([7]), torch.tensor([5]))
            many = model(x, torch.tensor([7] * 3), torch.tensor([5] * 3))
        assert rel_rms(one, many) < 1e-6

    def test_t_may_be_float_or_integer(self, make):
        model, x, y = fill_(make()).eval(), torch.randn(2, 4, 8, 8), torch.tensor([5, 6])
        with torch.no_grad():
            whole = model(x, torch.tensor([7, 900]), y)
            assert torch.equal(whole, model(x, torch.tensor([7.0, 900.0]), y))
            assert not torch.equal(whole, model(x, torch.tensor([7.5, 900.5]), y))

    def test_channels_last_and_dtypes(self, make):
        model, x = fill_(make()).eval(), torch.randn(2, 4, 8, 8)
        t, y = torch.tensor([7, 900]), torch.tensor([5, 1000])
        with torch.no_grad():
            exact = make().double()
            exact.load_state_dict(model.state_dict())
            truth = exact.eval()(x.double(), t, y)
            assert rel_rms(model(x, t, y), truth) < 5e-6
            last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, y)
            assert rel_rms(last, truth) < 5e-6
            with torch.autocast("cpu", torch.bfloat16):
                assert rel_rms(model(x, t, y), truth) < 5e-2
            out = model.bfloat16()(x.bfloat16(), t, y)
        assert out.dtype == torch.bfloat16
        assert rel_rms(out, truth) < 1e-1

    @pytest.mark.parametrize(
        ("x", "t", "y", "named"),
        [
            ((2, 4, 8), (2,), (2,), "x has shape"),
            ((0, 4, 8, 8), (1,), (1,), r"x has shape .*N > 0"),
            ((2, 3, 8, 8), (2,), (2,), r"expected \(N, 4, H, W\)"),
            ((2, 4, 7, 8), (2,), (2,), "H and W must be positive multiples of"),
            ((2, 4, 8, 9), (2,), (2,), "H and W must be positive multiples of"),
            ((2, 4, 0, 8), (2,), (2,), "H and W must be positive multiples of"),
            ((2, 4, 8, 8), (3,), (2,), r"t has shape \(3,\): expected \(2,\)"),
            ((2, 4, 8, 8), (2, 1), (2,), "t has shape"),
            ((2, 4, 8, 8), (), (2,), "t has shape"),
            ((2, 4, 8, 8), (2,), (3,), r"y has shape \(3,\): expected \(2,\)"),
        ],
    )
    def test_bad_shapes_name_the_argument(self, make, x, t, y, named):
        with pytest.raises(ValueError, match=named):
            make()(torch.zeros(x), torch.zeros(t), torch.zeros(y, dtype=torch.long))

    @pytest.mark.parametrize("label", [-1, 1001])
    def test_a_label_out_of_range_is_named(self, make, label):
        with pytest.raises(ValueError, match=r"y holds labels .*expected 0 to 1000 \(1000 is the null label\)"):
            make()(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.tensor([0, label]))

    def test_bad_dtypes_name_the_argument(self, make):
        x, t, y = torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long)
        for dtype in (torch.float32, torch.uint8, torch.bool):
            with pytest.raises(ValueError, match=r"y has dtype .*expected torch.int64 or torch.int32"):
                make()(x, t, y.to(dtype))
        with pytest.raises(ValueError, match="t has dtype"):
            make()(x, t.to(torch.complex64), y)

    def test_guidance_wants_two_halves(self, make):
        with pytest.raises(ValueError, match="conditional and unconditional halves"):
            make().forward_with_cfg(torch.zeros(3, 4, 8, 8), torch.zeros(3), torch.zeros(3, dtype=torch.long), 1.5)


def test_guidance_never_reaches_the_variance():
    model = fill_(DiCo(in_channels=2, hidden_size=8, depth=[1] * 5, num_classes=3)).eval()
    x, t, y = torch.randn(2, 2, 4, 4), torch.tensor([5, 5]), torch.tensor([1, 3])
    with torch.no_grad():
        guided = model.forward_with_cfg(x, t, y, 3.0)
        plain = model(torch.cat([x[:1], x[:1]]), t, y)
    assert torch.equal(guided[:, 2:], plain[:, 2:])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (
            lambda: dk.create_model("DiCo-M"),
            ValueError,
            r"'DiCo-M': unknown model \(did you mean 'DiCo-.*accepted: DiCo-S",
        ),
        (lambda: dk.create_model("DiCo-S", width=3), TypeError, "no argument width; accepted: in_channels"),
        (lambda: dk.create_model("DiCo-S", depth=(1, 2)), ValueError, r"depth=\(1, 2\): expected 5 integers"),
        (
            lambda: dk.create_model("FCDM-S", hidden_size=7),
            ValueError,
            "hidden_size=7: expected an integer >= 1, a multiple of 2",
        ),
        (
            lambda: dk.create_model("DiT-S/2", input_size=33),
            ValueError,
            "input_size=33: expected an integer >= 1, a multiple of 2",
        ),
        (lambda: dk.create_model("DiT-S/2", num_heads=7), ValueError, "num_heads=7: expected a divisor"),
        (lambda: dk.create_model("DiCo-S", num_classes=0), ValueError, "num_classes=0: expected an integer >= 1"),
        (
            lambda: dk.create_model("DiCo-S", class_dropout_prob=2),
            ValueError,
            "class_dropout_prob=2: expected a prob",
        ),
        (
            lambda: fill_(torch.nn.Linear(1, 1), "soft"),
            ValueError,
            "regime='soft': expected 'hard' or 'small'",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, named):
    with torch.device("meta"), pytest.raises(error, match=named):
        call()


def test_dit_names_the_resolution_it_was_made_for():
    model = on_meta("DiT-S/2")
    with pytest.raises(ValueError, match="input_size=32; expected 32x32"):
        model(torch.empty(1, 4, 64, 64, device="meta"), *meta_ty())
