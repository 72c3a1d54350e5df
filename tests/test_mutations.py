"""The tests themselves, tested: each planted bug must turn one of them red.

Each case copies the package, changes one place in its source and runs the tests of that part against the copy. For
the C++ kernels see test_native_mutations.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support import assert_noticed, copy_package, plant, run_python

MODELS, OPS = "tests/reference/test_models.py", "tests/reference/test_functional.py"
GRN = "tests/ops/test_numerics.py::test_against_float64 -k grn-reference"

# name: (file, source as it is, source with the bug, tests that must notice, perhaps narrowed by pytest's -k)
BUGS = {
    "tanh GELU": ("reference/functional.py", "F.gelu(x)", 'F.gelu(x, approximate="tanh")', MODELS),
    "erf GELU in DiT": ("reference/dit.py", 'nn.GELU(approximate="tanh")', "nn.GELU()", MODELS + " -k DiT"),
    "LayerNorm eps": ("reference/functional.py", "LN_EPS = 1e-6", "LN_EPS = 1e-5", OPS),
    "GRN eps": ("reference/functional.py", "GRN_EPS = 1e-6", "GRN_EPS = 1e-4", OPS),
    "no channel attention": ("reference/dico.py", "h * self.ca(h)", "h * 0.5", MODELS),
    "no channel attention bias": (
        "reference/dico.py",
        "h * self.ca(h)",
        "h * self.ca[2](self.ca[1](self.ca[0](h)) - self.ca[1].bias[:, None, None])",
        MODELS,
    ),
    "no channel attention bias in the op": (
        "reference/functional.py",
        "pointwise(x.mean((2, 3), keepdim=True), weight, bias)",
        "pointwise(x.mean((2, 3), keepdim=True), weight, None)",
        OPS,
    ),
    "GRN gamma ignored": ("reference/fcdm.py", "self.gamma, self.beta", "self.gamma * 0, self.beta", MODELS),
    "1 + scale": ("reference/functional.py", "(1 + per_channel(scale))", "per_channel(scale)", MODELS),
    "chunk order": (
        "reference/dico.py",
        "shift1, scale1, gate1, shift2",
        "scale1, shift1, gate1, shift2",
        MODELS,
    ),
    "concat order": ("reference/functional.py", "F.pixel_shuffle(up, 2), skip", "skip, F.pixel_shuffle(up, 2)", OPS),
    "concat order in models": ("reference/base.py", "cat([up(x), skip], 1))", "cat([skip, up(x)], 1))", MODELS),
    "sin before cos": ("reference/embed.py", "angles.cos(), angles.sin()", "angles.sin(), angles.cos()", MODELS),
    "position axes swapped": ("reference/embed.py", "[across, down]", "[down, across]", MODELS + " -k DiT"),
    "four guided channels": (
        "reference/base.py",
        "GUIDED_CHANNELS = 3",
        "GUIDED_CHANNELS = 4",
        MODELS + " -k outputs_are",
    ),
    "a mask a table": (
        "reference/embed.py",
        'self.get_submodule(f"embedding_table_{level}")(y)',
        'self.get_submodule(f"embedding_table_{level}")(drop_labels(y, self.num_classes, self.dropout_prob))',
        MODELS + " -k one_mask",
    ),
    "adaLN not zeroed": ("reference/dico.py", "zero(m.adaLN_modulation)", "pass", MODELS + " -k initialisation"),
    "GRN eps under the root": (
        "ops/grn.py",
        "(x, x), gamma, eps)",
        "(x, x).add(eps), gamma, eps)",
        GRN,
    ),
    "GRN mean over samples too": (
        "ops/grn.py",
        "norm / (norm.mean(1, keepdim=True) + eps)",
        "norm / (norm.mean() + eps)",
        GRN,
    ),
}

# The same in the Triton kernels, which the interpreter runs where there is no GPU.
TRITON_BUGS = {
    "eps outside the root": (
        "adaln.py",
        "1.0 / tl.sqrt(var + EPS)",
        "1.0 / (tl.sqrt(var) + EPS)",
        "adaln.py::test_eps",
    ),
    "mean not subtracted": (
        "adaln.py",
        "tl.where(cmask, x - mean[:, None], 0.0)",
        "tl.where(cmask, x, 0.0)",
        "adaln.py::TestAgainstFloat64::test_adaln",
    ),
    "unbiased variance": (
        "adaln.py",
        "tl.sum(d * d, axis=1) / C",
        "tl.sum(d * d, axis=1) / (C - 1)",
        "adaln.py::TestAgainstFloat64::test_adaln",
    ),
    "scale for 1 + scale": (
        "adaln.py",
        "store(h + offset, xhat * a + b, mask)",
        "store(h + offset, xhat * (a - 1.0) + b, mask)",
        "adaln.py::TestAgainstFloat64::test_seam",
    ),
    "gradient's mean not subtracted": (
        "adaln.py",
        "(g - mean_g[:, None] - xhat * mean_gx[:, None])",
        "(g - xhat * mean_gx[:, None])",
        "adaln.py::TestAgainstFloat64::test_adaln",
    ),
    "the first sample's gate": (
        "adaln.py",
        "x, branch, gate, y, c, h * w, row_blocks, col_blocks, batch_stride(gate),",
        "x, branch, gate, y, c, h * w, row_blocks, col_blocks, 0,",
        "adaln.py::TestAgainstFloat64::test_gated_residual",
    ),
    "statistics of the unrounded sum": (
        "adaln.py",
        "v = rounded(v, y.dtype.element_ty)",
        "v = v",
        "adaln.py::test_statistics_are_those_of_the_rounded_sum",
    ),
    "last band of rows not summed": (
        "channel.py",
        "cdiv(h * w, tile.span), cdiv(c, tile.cols)",
        "max(h * w // tile.span, 1), cdiv(c, tile.cols)",
        "channel.py::TestAgainstFloat64::test_sums_and_dots",
    ),
    "taps of dx not turned": (
        "depthwise.py",
        "K * K - 1 - t if FLIP else t",
        "t",
        "depthwise.py::test_against_float64 -k 7-plain",
    ),
    "taps of the fused dx turned": (
        "depthwise.py",
        "d * taps[ky * K + kx]",
        "d * taps[(K - 1 - ky) * K + kx]",
        "depthwise.py::test_against_float64 -k 3-plain",
    ),
    "halo above a block dropped": (
        "depthwise.py",
        "for r in range(first - P, last + P):",
        "for r in range(first, last + P):",
        "depthwise.py::test_seams_between_tiles",
    ),
    "halo counted in dbias": (
        "depthwise.py",
        "tl.where((s >= first) & (s < last), d, 0.0)",
        "d",
        "depthwise.py::test_seams_between_tiles",
    ),
    "rows below a block counted in its dweight": (
        "depthwise.py",
        "mask & (q < last), ACC)",
        "mask & (q < H), ACC)",
        "depthwise.py::test_seams_between_tiles",
    ),
    "taps of dweight turned": (
        "depthwise.py",
        "xs[kx] * ds[K - 1 - ky]",
        "xs[kx] * ds[ky]",
        "depthwise.py::test_against_float64 -k 7-plain",
    ),
    "GELU's slope without its density": (
        "common.py",
        "return normal_cdf(x) + x * density * 0.3989422804014327",
        "return normal_cdf(x)",
        "common.py::test_gelu_and_its_derivative",
    ),
    "sub-pixels transposed": (
        "pixel_shuffle.py",
        "(y % 2) * 2 + x % 2",
        "(x % 2) * 2 + y % 2",
        "pixel_shuffle.py::test_against_float64",
    ),
    "gradient's sub-pixels transposed": (
        "pixel_shuffle.py",
        "tl.interleave(tl.interleave(s00, s10), tl.interleave(s01, s11))",
        "tl.interleave(tl.interleave(s00, s01), tl.interleave(s10, s11))",
        "pixel_shuffle.py::test_against_float64",
    ),
}
BUGS |= {
    f"Triton: {name}": (f"kernels/{file}", source, bug, f"tests/kernels/test_{tests}")
    for name, (file, source, bug, tests) in TRITON_BUGS.items()
}
BUGS["Triton: a step does not wait for the one before"] = (
    "kernels/gemm.py",
    "if DRAIN:",
    "if DRAIN and BM < 0:",
    "tests/test_aot.py::test_a_step_waits_for_what_the_one_before_reads",
)
BRANCHES = "tests/ops/test_numerics.py::test_against_float64 -k "
BUGS |= {
    f"branches: {name}": (f"ops/{file}", source, bug, tests)
    for name, (file, source, bug, tests) in {
        "pooling's gradient not divided": (
            "cca.py",
            "(narrow @ matrix).to(pooled.dtype) / pixels",
            "(narrow @ matrix).to(pooled.dtype)",
            BRANCHES + "conv_half-reference",
        ),
        "the branch formed anew without its bias": (
            "pointwise.py",
            "plain_product(inner, weight, check.dense(bias))",
            "plain_product(inner, weight)",
            BRANCHES + "ffn_half-reference",
        ),
        "the gate's gradient by products without the bias": (
            "pointwise.py",
            "rows(x), s, gate, weight, sums, bias)",
            "rows(x), s, gate, weight, sums, None)",
            "tests/ops/test_branches.py -k per_sample_products",
        ),
        "the gate's gradient by our products without the bias": (
            "pointwise.py",
            "weight, gate, s, shift, by, sums, bias, wide)",
            "weight, gate, s, shift, by, None, None, wide)",
            "tests/ops/test_branches.py -k per_sample_products",
        ),
        "our products' gradient for one sample's shift": (
            "pointwise.py",
            "gradients(sums.dtype, (gated, weight.shape[:1]))[0]",
            "gated[0]",
            "tests/ops/test_branches.py -k per_sample_products",
        ),
        "GRN's beta not in the gate's gradient": (
            "pointwise.py",
            'select("channel_affine", x)(x, s, shift=held)',
            'select("channel_affine", x)(x, s)',
            BRANCHES + "fcdm_block-reference",
        ),
        "products of unscaled inputs": (
            "pointwise.py",
            "own_gate, own_s = gate if gate.shape[0] == 1 else gate[part], None if s is None else s[part]",
            "own_gate, own_s = gate if gate.shape[0] == 1 else gate[part], None if s is None else 1 + 0 * s[part]",
            "tests/ops/test_branches.py -k per_sample_products",
        ),
        "a dense convolution's gradient of a turned kernel": (
            "convolution.py",
            "dweight.reshape(-1).view(weight.shape)",
            "dweight.flip(2, 3)",
            "tests/ops/test_convolution.py -k gradients_and_what_runs",
        ),
        "a dense convolution with more pixels than weights": (
            "convolution.py",
            "(1 if backward else 4) <= weight.shape[0]",
            "(1 if backward else 4)",
            "tests/ops/test_convolution.py -k gradients_and_what_runs",
        ),
        "the residual past the block dropped": (
            "fcdm_block.py",
            "return dx + dy, dshift",
            "return dx, dshift",
            BRANCHES + "fcdm_block-reference",
        ),
        "a float32 stream rounded on its way": (
            "block.py",
            "return (out, y1, mean, rstd, pooled, attention) if save",
            "return (out.to(w1.dtype).to(x.dtype), y1, mean, rstd, pooled, attention) if save",
            "tests/ops/test_branches.py -k float32_stream",
        ),
        "everything saved though recomputed": (
            "block.py",
            "    keep = save and not recompute\n    done = pw.product(",
            "    keep = save\n    done = pw.product(",
            "tests/ops/test_branches.py -k bytes_saved",
        ),
    }.items()
}
BUGS["recompute asked for, and not done"] = (
    "nn/_fused.py",
    "if module.fused_recompute and library is ops",
    "if module.fused_recompute is None",
    "tests/test_fuse_runs.py -k less_is_kept",
)
BUGS["recompute left behind by unfuse"] = (
    "fuse.py",
    "            _set_recompute(module, False)\n",
    "            pass\n",
    "tests/test_fuse_runs.py -k ends_with_unfuse",
)
BUGS["a forward that checkpoints itself, fused without"] = (
    "_probe.py",
    "checkpoints=sum(t.numel() for t in kept) <= image",
    "checkpoints=False",
    "tests/test_fuse_runs.py -k checkpoints_itself",
)
BUGS["whatever keeps little taken for one that checkpoints"] = (
    "_probe.py",
    "if training and candidate.residual:",
    "if training:",
    "tests/test_fuse_runs.py -k keeps_little",
)
BETWEEN = "tests/ops/test_between_passes.py"
BUGS |= {
    "what was saved, taken in whatever layout it comes back": (
        "ops/block.py",
        "y1, gate = check.channels_last(y1), check.dense_rows(gate)",
        "gate = check.dense_rows(gate)",
        f"{BETWEEN} -k another_layout and triton and conv_half",
    ),
    "autocast around a backward pass lowers its products": (
        "ops/_library.py",
        "    for device, key in _AUTOCAST_KEYS.items():",
        "    for device, key in _AUTOCAST_KEYS.items() if autocast else ():",
        f"{BETWEEN} -k within_autocast and reference and conv_half",
    ),
    "what was measured, looked up by what is never recomputed": (
        "ops/block.py",
        "eps, save, recompute and save, None)",
        "eps, save, recompute, None)",
        f"{BETWEEN} -k measured and ffn_half",
    ),
    "settings of somebody's own layer ignored": (
        "nn/_state.py",
        "return tuple(sorted(n for n, v in held if",
        "return tuple(sorted(n for n, v in held if not held and",
        "tests/test_fuse_alone.py -k somebodys_own_layer",
    ),
}
BUGS["packed though changed"] = (
    "_packed.py",
    "now = weight.dtype, weight._version, _place",
    "now = weight.dtype, kept.version, _place",
    "tests/test_packing.py -k stale",
)
BUGS["Winograd's algorithm for other settings"] = (
    "packing.py",
    "if layer.groups != 1 or settings(layer) != plain_convolution(3):",
    "if layer.groups != 1:",
    "tests/test_packing.py -k any_layer",
)
BUGS["a packed convolution's result in its own layout"] = (
    "packing.py",
    "return y if _is_channels_last(x) or _is_channels_last(self.weight) else y.contiguous()",
    "return y",
    "tests/test_packing.py -k any_layer",
)
RECORDED = "tests/nn/test_recorded.py"
PLAIN = "tests/nn/test_plain_block.py"
BUGS |= {
    "a recording of weights that changed": (
        "nn/_state.py",
        "or epoch.stamp != stamp",
        "",
        f"{RECORDED} -k every_change",
    ),
    "a recording of weights packed before": (
        "nn/_state.py",
        "(now, packed_generation(), settings)",
        "(now, settings)",
        f"{RECORDED} -k packed_anew",
    ),
    "a recording of other settings": (
        "nn/_state.py",
        "(now, packed_generation(), settings)",
        "(now, packed_generation())",
        f"{RECORDED} -k eps",
    ),
    "what was made of the weights is not known for theirs": (
        "nn/_state.py",
        "weights + [v for v in derived if v is not None] if epoch.keeps else weights",
        "weights",
        f"{PLAIN} -k join_the_weights",
    ),
    "affine norms kept folded though nothing is packed": (
        "nn/_state.py",
        "self.keeps = any(map(holds, weights))",
        "self.keeps = True",
        f"{PLAIN} -k does_not_count",
    ),
    "steps of optimizers that count no change": (
        "_packed.py",
        'group["params"] if group.get("fused") else ()',
        "()",
        f"{PLAIN} -k seen_packed",
    ),
    "a layer more in a layer": (
        "nn/_state.py",
        " or len(layer._modules) != children:",
        ":",
        f"{RECORDED} -k every_change",
    ),
    "a sum of parts as long as the first": (
        "kernels/sums.py",
        "ps[i], outs[i], ns[i], cs[i],",
        "ps[i], outs[i], ns[0], cs[i],",
        "tests/kernels/test_sums.py -k against_float64",
    ),
    "hooks not looked for": (
        "nn/_state.py",
        "if any(_hooks(held)):",
        "if False:",
        f"{RECORDED} -k every_change",
    ),
    "memory between kernels given twice": (
        "_recording.py",
        "        if other.first <= m.last and m.first <= other.last:",
        "        if False:",
        "tests/native/test_recording.py -k other_inputs",
    ),
    "an input's address kept": (
        "_recording.py",
        "return base, pointer - origin, dtype",
        "return -1, pointer, dtype",
        "tests/native/test_recording.py -k other_inputs",
    ),
    "an operator's result written where it was": (
        "_recording.py",
        "kwargs[out] = self._view(call.out)",
        "kwargs[out] = call.out",
        "tests/native/test_recording.py -k operators_between",
    ),
    "what an operator reads given to another before": (
        "_recording.py",
        "used = call.args if isinstance(call, _Kernel) else (*call.args, *call.kwargs.values(), call.out)",
        "used = call.args if isinstance(call, _Kernel) else (call.out,)",
        "tests/native/test_recording.py -k operators_between",
    ),
    "an op's recording for any instruction set": (
        "ops/_recorded.py",
        "generation(), native.extension().selected_isa()",
        "generation()",
        "tests/ops/test_recorded.py -k depends_on",
    ),
    "an op's recording for any strides": (
        "ops/_recorded.py",
        "kinds.append((a.shape, a.stride(), a.dtype))",
        "kinds.append((a.shape, a.dtype))",
        "tests/ops/test_recorded.py -k another_memory_layout",
    ),
    "operations that kernels did not do": (
        "_recording.py",
        "        self.refusal = why",
        "        return",
        "tests/native/test_recording.py -k refused",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_noticed(name, tmp_path):
    file, line, bug, tests = BUGS[name]
    package = copy_package(tmp_path)
    plant(package / file, line, bug)
    assert_noticed(name, tests, package)


def test_the_copy_is_what_runs(tmp_path):
    """Else the bugs above would be noticed, or not, in the installed package."""
    package = copy_package(tmp_path)
    done = run_python(
        "-c", "import dico_kernels.reference as r; print(r.__file__)", cwd=Path("/"), PYTHONPATH=str(tmp_path)
    )
    assert done.stdout.strip() == str(package / "reference" / "__init__.py")
