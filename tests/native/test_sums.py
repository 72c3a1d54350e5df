"""Sums in parts added up and rounded, on every instruction set."""

from __future__ import annotations

import pytest
import torch

from dico_kernels import native
from dico_kernels.dtypes import accumulation_dtype


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 1, 5), (1, 7, 67), (2, 3, 1030), (4, 0, 9)], ids=str)
def test_adds_up_and_rounds(isa, dtype, sizes):
    part = torch.randn(sizes).to(accumulation_dtype(dtype))
    (out,) = native.add_up([part], dtype)
    expected = torch.zeros(sizes[0], sizes[2], dtype=part.dtype)
    for p in range(sizes[1]):  # in the order of the parts
        expected += part[:, p]
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))


def test_several_at_once(isa):
    parts = [torch.randn(2, 3, 5), torch.randn(1, 4, 9)]
    for out, part in zip(native.add_up(parts, torch.float32), parts, strict=True):
        torch.testing.assert_close(out, part.sum(1))


def test_the_same_bits_on_any_number_of_threads(isa, same_bits):
    part = torch.randn(3, 50, 2100)
    same_bits(lambda: native.add_up([part], torch.bfloat16))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"part is torch\.float64"):
        native.add_up([torch.ones(1, 2, 3, dtype=torch.float64)], torch.float32)
    with pytest.raises(ValueError, match="part has shape"):
        native.add_up([torch.ones(1, 2, 6)[:, :, ::2]], torch.float32)
