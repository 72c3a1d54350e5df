"""The C++ CUDA kernels on a GPU, against float64 of the reference."""

from __future__ import annotations

import ops_cases
import pytest
import torch
from support import rel_rms

import dico_kernels as dk
from dico_kernels import native
from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.reference import functional as R

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.available() and native.with_cuda()),
    reason="needs a GPU and a build with CUDA",
)
SHAPES = [*ops_cases.SHAPES, (2, 136, 11, 13), (1, 416, 3, 5), (2, 1664, 8, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ops_cases.DTYPES, ids=str)
@pytest.mark.parametrize("broadcast", [False, True])
def test_adaln_modulate(shape, dtype, broadcast):
    n, c = shape[:2]
    x = torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)
    shift, scale = (torch.randn(1 if broadcast else n, c, dtype=torch.float64).to(dtype) for _ in range(2))
    y, mean, rstd = (v.cpu() for v in native.adaln_modulate(x.cuda(), shift.cuda(), scale.cuda()))
    truth = R.adaln_modulate(x.double(), shift.double(), scale.double())
    eager = R.adaln_modulate(x, shift, scale)
    band = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    assert (y.dtype, mean.dtype) == (dtype, accumulation_dtype(dtype))
    assert rel_rms(y, truth) <= 2 * rel_rms(eager, truth) + band
    limit = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=limit, atol=limit)
    exact = (x.double().var(1, unbiased=False) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), exact, rtol=limit, atol=limit)


def test_the_backend_runs_the_op():
    x, v = torch.randn(2, 40, 4, 4, device="cuda"), torch.randn(2, 40, device="cuda")
    with dk.backend("cuda", strict=True), torch.no_grad():
        y = dk.ops.adaln_modulate(x, v, v)
    assert rel_rms(y.cpu(), R.adaln_modulate(x.double(), v.double(), v.double()).cpu()) < 1e-6
