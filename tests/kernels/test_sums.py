"""Sums of parts against float64: many at once, of all sizes, each in the dtype asked for."""

from __future__ import annotations

import pytest
import torch

from dico_kernels.kernels import sums
from dico_kernels.kernels.common import record

# groups, parts, elements: one of each; more than a tile of each; one long sum; more slots than a launch has
SIZES = [(1, 1, 1), (3, 5, 7), (2, 131, 33), (1, 300, 65), (17, 1, 4), (1, 2, 9), (2, 2, 2), (5, 16, 32), (1, 7, 90)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 4, 9, 11])
def test_against_float64(count, dtype, random):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    parts = [random(size, acc) for size in (SIZES * 2)[:count]]
    found = sums.add_up(parts, dtype)
    assert len(found) == count
    for y, part in zip(found, parts, strict=True):
        truth = part.double().sum(1)
        assert y.dtype == dtype
        assert y.shape == truth.shape
        assert y.is_contiguous()
        rounding = torch.finfo(dtype).eps / 2 * truth.abs() + 8 * torch.finfo(acc).eps * part.double().abs().sum(1)
        assert ((y - truth).abs() <= rounding).all()


def test_one_launch(random):
    parts = [random((2, 3, 5), torch.float32)] * sums._SLOTS
    for many, launches in ((parts, 1), ([*parts, parts[0]], 2)):
        with record() as made:
            sums.add_up(many, torch.float32)
        assert len(made) == launches


def test_same_bits_in_any_batch_and_company(random, repeats):
    part, other = random((3, 40, 50), torch.float32), random((2, 9, 70), torch.float32)
    repeats(lambda: sums.add_up([part, other], torch.float32))
    alone, together = sums.add_up([part[2:]], torch.float32), sums.add_up([other, part], torch.float32)
    assert torch.equal(alone[0], together[1][2:])


def test_nan_stays_in_its_group_and_column(random):
    part = random((3, 4, 40), torch.float32)
    part[1, 2, 7] = float("nan")
    (found,) = sums.add_up([part], torch.float32)
    assert found.isnan().nonzero().tolist() == [[1, 7]]
