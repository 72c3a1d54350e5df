"""The native adaln_modulate, on every instruction set this processor runs, against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from support import conditioning, rel_rms

from dico_kernels import native
from dico_kernels.reference import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# batch, channels, height, width: one pixel, odd everything, wider than a vector by one, a DiCo-XL row
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 7), (3, 17, 4, 4), (1, 33, 1, 9), (2, 128, 8, 6), (1, 416, 3, 5)]


@pytest.fixture(autouse=True)
def _poisoned_allocation(monkeypatch):
    """What a kernel forgets to write shows as NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: allocate(*a, **k).fill_(float("nan")))


def adaln(x, shift, scale, eps=1e-6):
    """The kernel's output, of inputs in any strides."""
    x = x.contiguous(memory_format=torch.channels_last)
    return native.adaln_modulate(x, shift.contiguous(), scale.contiguous(), eps)[0]


def inputs(shape, dtype, device="cpu", mean=0.0):
    n, c = shape[:2]
    x = (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)
    return [v.to(device) for v in (x, *conditioning(n, c, dtype))]


def truth(x, shift, scale, eps=1e-6):
    return F.adaln_modulate(x.double().cpu(), shift.double().cpu(), scale.double().cpu(), eps)


def budget(args, dtype, expected):
    """Twice the eager reference's own error in this dtype, plus one rounding of the result."""
    if dtype == torch.float64:  # the truth is no more precise: a few roundings apart
        return 1e-14
    return 2 * rel_rms(F.adaln_modulate(*args).cpu(), expected) + torch.finfo(dtype).eps / 2


def test_statistics():
    x, shift, scale = inputs((2, 33, 3, 4), torch.float32)
    wide = x.double()
    _, mean, rstd = native.adaln_modulate(x.contiguous(memory_format=torch.channels_last), shift, scale, 1e-6)
    assert rel_rms(mean, wide.mean(1)) < 1e-6
    assert rel_rms(rstd, (wide.var(1, correction=0) + 1e-6).rsqrt()) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(isa, shape, dtype, device):
    args = inputs(shape, dtype, device)
    out, expected = adaln(*args), truth(*args)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert rel_rms(out.cpu(), expected) <= budget(args, dtype, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [3.0, 30.0, 1000.0])
def test_a_mean_far_above_the_deviation(isa, dtype, mean):
    args = inputs((2, 64, 4, 4), dtype, mean=mean)
    expected = truth(*args)
    assert rel_rms(adaln(*args), expected) <= budget(args, dtype, expected)


def test_eps(isa):
    x, shift, scale = inputs((2, 32, 3, 3), torch.float32)
    for eps in (1e-6, 1e-3):
        assert rel_rms(adaln(x * 1e-3, shift, scale, eps), truth(x * 1e-3, shift, scale, eps)) < 1e-6


def test_keeps_nan_and_infinity(isa):
    """With scale -1 the output is the shift itself; a NaN in x makes its row NaN and no other."""
    x = torch.randn(1, 64, 1, 2, dtype=torch.bfloat16)
    shift = torch.randn(1, 64).bfloat16()
    shift[0, :3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
    out = adaln(x, shift, torch.full_like(shift, -1))
    assert torch.equal(out[0, :2, 0, 0], shift[0, :2])
    assert out[0, 2].isnan().all()
    assert torch.equal(out[0, 3:, 0, 1], shift[0, 3:])
    x[0, 0, 0, 0] = float("nan")
    out = adaln(x, torch.zeros_like(shift), torch.zeros_like(shift))
    assert out[0, :, 0, 0].isnan().all()
    assert not out[0, :, 0, 1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(isa, dtype):
    """Rows of +1 and -1 normalise to themselves, so the output before rounding is exactly +-(1 + scale) + shift."""
    _, shift, scale = inputs((64, 128, 1, 1), dtype)
    x = torch.tensor([1.0, -1.0]).repeat(64)[None, :, None, None].expand(64, -1, 2, 1).to(dtype)
    exact = x.float() * (1 + scale.float())[:, :, None, None] + shift.float()[:, :, None, None]
    assert torch.equal(adaln(x, shift, scale, eps=0), exact.to(dtype))


def test_conditioning_of_batch_one_broadcasts(isa):
    x, shift, scale = inputs((3, 9, 2, 2), torch.float32)
    for a, b in ((shift[:1], scale), (shift, scale[:1]), (shift[:1], scale[:1])):
        out = adaln(x, a, b)
        assert torch.equal(out, adaln(x, a.expand(3, 9), b.expand(3, 9)))


def test_same_bits_on_any_number_of_threads(isa):
    args = inputs((3, 80, 17, 9), torch.float32)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outs += [adaln(*args), adaln(*args)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], out) for out in outs)


def test_unknown_instruction_set_is_named():
    before = native.extension().selected_isa()
    with pytest.raises(ValueError, match=r"'v9' cannot run here; accepted: .*base"), native.isa("v9"):
        pass
    assert native.extension().selected_isa() == before
