"""GRN's scale from sums of squares, and its gradients, against float64 autograd."""

from __future__ import annotations

import pytest
import torch
from support import rel_rms

from dico_kernels.kernels import grn

EPS = 1e-3  # of a size that shows
# images, parts, channels
CASES = [(1, 1, 1), (2, 3, 5), (3, 1, 257), (1, 19, 40)]


def scale(norm, gamma):
    return 1 + gamma * (norm / (norm.mean(1, keepdim=True) + EPS))


@pytest.mark.parametrize("acc", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scale(case, acc, random):
    squares = random(case, acc).square()
    for dtype in {acc, torch.bfloat16}:
        gamma = random(case[2:], dtype)
        norm, s = grn.grn_scale(squares, gamma, EPS)
        truth = squares.double().sum(1).sqrt()
        assert norm.dtype == s.dtype == acc
        budget = 1e-14 if acc == torch.float64 else 1e-6
        assert rel_rms(norm, truth) <= budget
        assert rel_rms(s - 1, scale(truth, gamma.double()) - 1) <= 10 * budget
        assert torch.equal(grn.grn_rescale(norm, gamma, EPS), s)


@pytest.mark.parametrize("acc", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, acc, random):
    """`through` is the gradient by the norm over the norm: what multiplies x. A channel of zeros has none."""
    n, _, c = case
    norm, gamma, parts = random((n, c), acc).abs() + 0.1, random((c,), acc), random(case, acc)
    if c > 1:
        norm[0, 1] = 0
    leaves = norm.double().clone().requires_grad_(), gamma.double().expand(n, c).clone().requires_grad_()
    dnorm, dgamma = torch.autograd.grad(scale(*leaves), leaves, parts.double().sum(1))
    found_dgamma, through = grn.grn_scale_backward(parts, norm, gamma, EPS)
    budget = 1e-12 if acc == torch.float64 else 1e-5
    assert rel_rms(found_dgamma, dgamma) <= budget
    wanted = torch.where(norm > 0, dnorm / norm, 0.0)
    # of one channel the two terms cancel all but eps's share
    assert (through - wanted).norm() <= budget * (wanted.norm() + dnorm.norm() + 1e-3)


def test_same_bits_in_any_batch(random, repeats):
    squares, gamma = random((3, 4, 70), torch.float32).square(), random((70,), torch.float32)
    repeats(lambda: grn.grn_scale(squares, gamma, EPS))
    assert torch.equal(grn.grn_scale(squares, gamma, EPS)[1][2:], grn.grn_scale(squares[2:], gamma, EPS)[1])
