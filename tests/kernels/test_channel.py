"""Channel sums, dots and affine maps against float64."""

from __future__ import annotations

import pytest
import torch
from support import added_up

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.kernels import channel

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# the last two: more channels than one tile, more rows than one program
SHAPES = [(1, 1, 1, 1), (2, 5, 3, 7), (1, 67, 1, 9), (2, 3, 13, 11)]


def pixel_sum(*factors):
    return torch.stack(factors).prod(0).sum((2, 3))


def affine(x, s, shift=None, z=None, r=None):
    s, shift, r = (v if v is None else v[:, :, None, None] for v in (s, shift, r))
    y = x * s
    if z is not None:
        y = y + z * r
    return y if shift is None else y + shift


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestAgainstFloat64:
    def test_sums_and_dots(self, shape, dtype, random, agree):
        a, b = random(shape, dtype), random(shape, dtype)
        sums, dots = map(added_up, (channel.channel_sums(a), channel.channel_dots(a, b)))
        assert sums.dtype == dots.dtype == accumulation_dtype(dtype)
        agree((sums,), pixel_sum, (a,))
        agree((dots,), pixel_sum, (a, b))
        if dtype in (torch.bfloat16, torch.float16):  # exact inputs, float32 sums: far better than 16-bit eager
            exact = pixel_sum(a.double(), b.double())
            assert (dots - exact).norm() <= 1e-6 * pixel_sum(a.double().abs(), b.double().abs()).norm()

    @pytest.mark.parametrize("form", ["s", "s shift", "s z r", "s shift z r"])
    def test_affine(self, form, shape, dtype, random, agree, is_image):
        vectors = {
            name: random(shape[:2], accumulation_dtype(dtype)) for name in ("s", "shift", "r") if name in form.split()
        }
        if "z" in form.split():
            vectors["z"] = random(shape, dtype)
        x = random(shape, dtype)
        y = channel.channel_affine(x, **vectors)
        assert is_image(y, dtype)
        names = list(vectors)
        agree((y,), lambda x, *v: affine(x, **dict(zip(names, v, strict=True))), (x, *vectors.values()))


def test_broadcast_vectors(random):
    x, z = random((3, 5, 2, 2), torch.float32), random((3, 5, 2, 2), torch.float32)
    vectors = {name: random((1, 5), torch.float32) for name in ("s", "shift", "r")}
    for one in (*vectors, "all"):
        given = {name: v if one in (name, "all") else v.repeat(3, 1) for name, v in vectors.items()}
        y = channel.channel_affine(x, given["s"], given["shift"], z, given["r"])
        full = {name: v.repeat(3, 1) for name, v in vectors.items()}
        assert torch.equal(y, channel.channel_affine(x, full["s"], full["shift"], z, full["r"]))


def test_same_bits_every_time_and_in_any_batch(random, repeats):
    a, b = random((3, 5, 13, 11), torch.float32), random((3, 5, 13, 11), torch.float32)
    repeats(lambda: (channel.channel_sums(a), channel.channel_dots(a, b)))
    assert torch.equal(channel.channel_dots(a, b)[2:], channel.channel_dots(a[2:], b[2:]))
