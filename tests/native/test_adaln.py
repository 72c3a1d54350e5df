"""The native adaLN family on every instruction set this processor runs, against float64 autograd of the reference."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

import pytest
import torch
from support import ROOT, rel_rms
from torch._subclasses.fake_tensor import FakeTensorMode

from dico_kernels import native
from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.reference import functional as F

VECTORS = 3
# A row of one or two channels is the same whatever its values: its gradient is zero, and no relative error is.
GRADIENT_SHAPES = [(1, 3, 1, 1), (2, 5, 3, 7), (3, 17, 4, 4), (1, 33, 1, 9), (2, 136, 11, 13), (1, 416, 3, 5)]


def conditions(n, c, dtype, vector):
    return [vector(n, c, dtype) for _ in range(VECTORS)]


def per_sample(v, n):
    """A broadcast vector as one a sample, for an autograd whose gradients are per sample too."""
    return v.expand(n, -1).contiguous()


def adaln(x, shift, scale, dy, eps=1e-6):
    y, mean, rstd = native.adaln_modulate(x, shift, scale, eps)
    dx, dshift, dscale = native.adaln_modulate_backward(dy, x, scale, mean, rstd)
    return [y, dx, dshift, dscale]


def seam(x, branch, gate, shift, scale, dy, dh, eps=1e-6):
    y, h, mean, rstd = native.gated_residual_adaln(x, branch, gate, shift, scale, eps)
    return [y, h, *native.gated_residual_adaln_backward(dy, dh, y, branch, gate, scale, mean, rstd)]


def test_against_float64(isa, shape, dtype, image, vector):
    n, c = shape[:2]
    x, (shift, scale, _) = image(shape, dtype), conditions(n, c, dtype, vector)
    y, mean, rstd = native.adaln_modulate(x, shift, scale)
    exact = x.double()
    truth = F.adaln_modulate(exact, shift.double(), scale.double())
    rough = rel_rms(F.adaln_modulate(x, shift, scale), truth) if truth.norm() > 0 else 0
    band = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert rel_rms(y, truth) <= (band if dtype == torch.float64 else 2 * rough + band)
    assert mean.shape == rstd.shape == (n, *shape[2:])
    assert mean.dtype == rstd.dtype == accumulation_dtype(dtype)
    limit = 1e-13 if dtype == torch.float64 else 1e-6
    centre, variance = exact.mean(1), exact.var(1, unbiased=False)
    torch.testing.assert_close(mean.double(), centre, rtol=limit, atol=limit)
    torch.testing.assert_close(rstd.double(), (variance + 1e-6).rsqrt(), rtol=limit, atol=limit)


@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=str)
def test_gradients(isa, shape, dtype, image, vector, check):
    x, dy = image(shape, dtype), image(shape, dtype)
    shift, scale, _ = conditions(*shape[:2], dtype, vector)
    check(adaln(x, shift, scale, dy), F.adaln_modulate, (x, shift, scale), [dy])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_channel_moves_nothing_but_the_shift(isa, dtype, image, vector):
    x, dy = image((2, 1, 3, 2), dtype), image((2, 1, 3, 2), dtype)
    shift, scale, _ = conditions(2, 1, dtype, vector)
    y, dx, dshift, dscale = adaln(x, shift, scale, dy)
    assert torch.equal(y, shift[:, :, None, None].expand(y.shape))
    # 1 / deviation is 1000 here and multiplies what rounding leaves.
    assert float(dx.abs().max()) <= 1e4 * torch.finfo(dtype).eps
    assert rel_rms(dshift, dy.sum((2, 3))) <= 10 * torch.finfo(dtype).eps
    assert float(dscale.abs().max()) == 0


def test_gated_residual(isa, shape, dtype, image, vector, check):
    x, branch, dy = (image(shape, dtype) for _ in range(3))
    gate = vector(*shape[:2], dtype)
    dbranch, dgate = native.gated_residual_backward(dy, branch, gate)
    results = [native.gated_residual(x, branch, gate), dy, dbranch, dgate]
    check(results, F.gated_residual, (x, branch, gate), [dy])


@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=str)
def test_seam(isa, shape, dtype, image, vector, check):
    x, branch, dy, dh = (image(shape, dtype) for _ in range(4))
    gate, shift, scale = conditions(*shape[:2], dtype, vector)
    args = (x, branch, gate, shift, scale)
    check(seam(*args, dy, dh), F.gated_residual_adaln, args, [dy, dh])


def test_the_seam_is_its_two_ops(isa, dtype, image, vector):
    """Bit for bit: h is the adaLN of the rounded y."""
    x, branch = image((2, 40, 5, 3), dtype), image((2, 40, 5, 3), dtype)
    gate, shift, scale = conditions(2, 40, dtype, vector)
    y, h, mean, rstd = native.gated_residual_adaln(x, branch, gate, shift, scale)
    assert torch.equal(y, native.gated_residual(x, branch, gate))
    for a, b in zip((h, mean, rstd), native.adaln_modulate(y, shift, scale), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [3.0, 30.0, 1000.0])
def test_a_mean_far_above_the_deviation(isa, dtype, mean, image, vector, check):
    shape = (2, 64, 4, 4)
    x, branch, dy, dh = image(shape, dtype, mean), *(image(shape, dtype) for _ in range(3))
    gate, shift, scale = conditions(2, 64, dtype, vector)
    check(adaln(x, shift, scale, dy), F.adaln_modulate, (x, shift, scale), [dy])
    if dtype == torch.float32:  # in bfloat16 rounding y decides, in the reference no less
        args = (x, branch, gate, shift, scale)
        check(seam(*args, dy, dh), F.gated_residual_adaln, args, [dy, dh])


@pytest.mark.parametrize("eps", [1e-6, 1e-3])
def test_eps(isa, eps, image, vector, check):
    """Rows whose variance is of eps's size."""
    x, branch, dy, dh = (image((2, 32, 3, 3), torch.float32) * s for s in (1e-3, 1e-3, 1, 1))
    gate, shift, scale = conditions(2, 32, torch.float32, vector)
    args = (x, shift, scale)
    check(adaln(*args, dy, eps), lambda *a: F.adaln_modulate(*a, eps), args, [dy])
    args = (x, branch, gate, shift, scale)
    check(seam(*args, dy, dh, eps), lambda *a: F.gated_residual_adaln(*a, eps), args, [dy, dh])


def test_keeps_nan_and_infinity(isa):
    """With scale -1 the output is the shift itself; a NaN in x makes its row NaN and no other."""
    x = torch.randn(1, 64, 1, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    shift = torch.randn(1, 64).bfloat16()
    shift[0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    out, _, _ = native.adaln_modulate(x, shift, torch.full_like(shift, -1))
    assert torch.equal(out[0, :2, 0, 0], shift[0, :2])
    assert out[0, 2].isnan().all()
    assert torch.equal(out[0, 3:, 0, 1], shift[0, 3:])
    x[0, 0, 0, 0] = float("nan")
    out, _, _ = native.adaln_modulate(x, torch.zeros_like(shift), torch.zeros_like(shift))
    assert out[0, :, 0, 0].isnan().all()
    assert not out[0, :, 0, 1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(isa, dtype, vector):
    """Rows of +1 and -1 normalise to themselves, so the output before rounding is exactly +-(1 + scale) + shift."""
    shift, scale, _ = conditions(64, 128, dtype, vector)
    x = torch.tensor([1.0, -1.0]).repeat(64)[None, :, None, None].expand(64, -1, 2, 1).to(dtype)
    exact = x.float() * (1 + scale.float())[:, :, None, None] + shift.float()[:, :, None, None]
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(native.adaln_modulate(x, shift, scale, eps=0)[0], exact.to(dtype))


def wide_stream(half, device, image, vector):
    """float32 x beside 16-bit vectors, as under autocast: y is theirs, rounded once from float32."""
    x, (shift, scale, _) = image((2, 33, 3, 5), torch.float32), conditions(2, 33, half, vector)
    y, mean, rstd = native.adaln_modulate(x.to(device), shift.to(device), scale.to(device))
    truth = F.adaln_modulate(x.double(), shift.double(), scale.double())
    assert y.dtype == half
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert rel_rms(y.cpu(), truth) <= torch.finfo(half).eps / 2
    assert mean.dtype == rstd.dtype == torch.float32


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_wide_stream(isa, half, image, vector):
    wide_stream(half, "cpu", image, vector)


@pytest.mark.skipif(not (torch.cuda.is_available() and native.with_cuda()), reason="needs a GPU and a build with CUDA")
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_a_wide_stream_on_a_gpu(half, image, vector):
    wide_stream(half, "cuda", image, vector)


def test_a_wide_stream_reaches_the_cuda_kernel_in_one_dtype(monkeypatch):
    """Which knows no other, on tensors that exist on paper only."""
    seen = []
    monkeypatch.setattr(native, "with_cuda", lambda: True)
    monkeypatch.setattr(native, "_launch_adaln", lambda tensors, *_: seen.append([t.dtype for t in tensors]))
    with FakeTensorMode(), torch.device("cuda"):
        x = torch.empty(2, 5, 3, 3).to(memory_format=torch.channels_last)
        shift, scale = torch.empty(2, 2, 5, dtype=torch.bfloat16)
        y, mean, rstd = native.adaln_modulate(x, shift, scale)
        native.adaln_modulate(x.bfloat16(), shift, scale)
    assert seen == [[torch.float32] * 6, [torch.bfloat16] * 4 + [torch.float32] * 2]
    assert (y.dtype, mean.dtype, rstd.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_conditioning_of_batch_one_broadcasts(isa, image, vector):
    """To the same bits as the vector repeated; reduced gradients stay per sample."""
    x, branch, dy, dh = (image((3, 9, 2, 2), torch.float32) for _ in range(4))
    vectors = conditions(3, 9, torch.float32, vector)
    for i in range(VECTORS):
        mixed = [v[:1] if i == j else v for j, v in enumerate(vectors)]
        full = [per_sample(v, 3) for v in mixed]
        pairs = [
            (seam(x, branch, *mixed, dy, dh), seam(x, branch, *full, dy, dh)),
            (adaln(x, *mixed[1:], dy), adaln(x, *full[1:], dy)),
            ([native.gated_residual(x, branch, mixed[0])], [native.gated_residual(x, branch, full[0])]),
            (
                native.gated_residual_backward(dy, branch, mixed[0]),
                native.gated_residual_backward(dy, branch, full[0]),
            ),
        ]
        for few, many in pairs:
            assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))


def test_empty_batch(isa):
    x = torch.empty(0, 5, 2, 2).contiguous(memory_format=torch.channels_last)
    y, mean, rstd = native.adaln_modulate(x, torch.empty(0, 5), torch.empty(0, 5))
    assert y.shape == (0, 5, 2, 2)
    assert mean.shape == rstd.shape == (0, 2, 2)


def test_same_bits_on_any_number_of_threads(isa, image, vector, same_bits):
    x, branch, dy, dh = (image((3, 40, 17, 9), torch.float32) for _ in range(4))
    gate, shift, scale = conditions(3, 40, torch.float32, vector)
    same_bits(lambda: adaln(x, shift, scale, dy))
    same_bits(lambda: seam(x, branch, gate, shift, scale, dy, dh))
    same_bits(lambda: native.gated_residual_backward(dy, branch, gate))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x, a, b: (x[0], a, b), "x has shape"),
        (lambda x, a, b: (x[:, :, :0], a, b), "H, W > 0"),
        (lambda x, a, b: (x.int(), a, b), "x has dtype torch.int32: expected float32"),
        (lambda x, a, b: (x.contiguous(), a, b), "x has strides .*: expected channels_last memory"),
        (lambda x, a, b: (x, a[:, :3], b), r"shift has shape \(2, 3\): expected \(2, 5\) or \(1, 5\)"),
        (lambda x, a, b: (x, a, b[0]), "scale has shape"),
        (lambda x, a, b: (x, a.t().contiguous().t(), b), r"shift has strides \(1, 2\): expected no gaps within a row"),
        (lambda x, a, b: (x, torch.cat([a, a]), b), r"shift has shape \(4, 5\)"),
        (lambda x, a, b: (x, a, b.double()), "scale is torch.float64 on cpu: expected torch.float32 on cpu"),
        (lambda x, a, b: (x.to("meta"), a, b), "shift is torch.float32 on cpu: expected .* on meta"),
    ],
)
def test_bad_arguments_are_named(change, named, image, vector):
    args = image((2, 5, 3, 3), torch.float32), *conditions(2, 5, torch.float32, vector)[:2]
    with pytest.raises(ValueError, match=named):
        native.adaln_modulate(*change(*args))


def test_other_devices_are_refused_by_name(image, vector):
    x, dy = image((2, 5, 3, 3), torch.float32).to("meta"), image((2, 5, 3, 3), torch.float32).to("meta")
    gate, shift, scale = (v.to("meta") for v in conditions(2, 5, torch.float32, vector))
    mean = torch.zeros(2, 3, 3, device="meta")
    for name, call in {
        "adaln_modulate": lambda: native.adaln_modulate(x, shift, scale),
        "adaln_modulate_backward": lambda: native.adaln_modulate_backward(dy, x, scale, mean, mean),
        "gated_residual": lambda: native.gated_residual(x, dy, gate),
        "gated_residual_backward": lambda: native.gated_residual_backward(dy, x, gate),
    }.items():
        with pytest.raises(RuntimeError, match=f"^{name}: the native kernel runs on cpu only, .* on meta"):
            call()


def test_statistics_of_another_image_are_refused(image, vector):
    x, scale = image((2, 5, 3, 3), torch.float32), vector(2, 5, torch.float32)
    good, small = torch.zeros(2, 3, 3), torch.zeros(2, 3, 2)
    with pytest.raises(ValueError, match="rstd has shape"):
        native.adaln_modulate_backward(x, x, scale, good, small)


# The CUDA runtime as far as a launch gets whose device fails; the error is remembered, as the runtime does. Without
# CUDA's headers, so that what a launch would call next, another thing in every release, needs a name and no type.
FAILING_RUNTIME = """
#include <cstdio>
#include "dico/cuda.h"
static int remembered = 0;
#define UNUSED(name) int name() { return 0; }
extern "C" {
int cudaSetDevice(int) { return remembered = SET_DEVICE_FAILS ? 101 : 0; }
int cudaDeviceGetAttribute(int*, int, int) { return remembered = 101; }
int cudaGetLastError() { int error = remembered; remembered = 0; return error; }
const char* cudaGetErrorString(int error) { return error == 101 ? "invalid device" : "another error"; }
UNUSED(cudaLaunchKernel) UNUSED(__cudaLaunchKernel) UNUSED(__cudaGetKernel) UNUSED(__cudaInitModule)
UNUSED(__cudaPushCallConfiguration) UNUSED(__cudaPopCallConfiguration) UNUSED(__cudaRegisterFunction)
UNUSED(__cudaRegisterFatBinary) UNUSED(__cudaRegisterFatBinaryEnd) UNUSED(__cudaUnregisterFatBinary)
}
int main() {
    dico::AdalnArgs args{};
    args.images = args.rows = args.channels = 1;
    const char* said = dico::cuda::adaln_modulate(dico::Dtype::float32, args, 0, nullptr);
    std::printf("%s, then %s", said ? said : "no error", remembered ? "again" : "nothing");
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("set_device_fails", [0, 1])
def test_a_cuda_error_is_reported_and_not_left_for_the_next_launch(tmp_path, set_device_fails):
    (tmp_path / "main.cpp").write_text(FAILING_RUNTIME)
    sources = [tmp_path / "main.cpp", ROOT / "csrc/cuda/adaln.cu"]
    flags = ["-std=c++17", "--cudart=none", f"-DSET_DEVICE_FAILS={set_device_fails}", f"-I{ROOT / 'csrc/include'}"]
    # Under the sanitizers' run of this suite, nvcc crashes with their libraries in it.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, env=environment)
    run(["nvcc", *flags, *sources, "-o", tmp_path / "main"])
    said = run([tmp_path / "main"]).stdout
    assert said == "invalid device, then nothing"


def test_unknown_instruction_set_is_named():
    before = native.extension().selected_isa()
    with pytest.raises(ValueError, match=r"'v9' cannot run here; accepted: .*base"), native.isa("v9"):
        pass
    assert native.extension().selected_isa() == before
