"""Each reference op against its formula, written out again in float64 numpy with explicit loops.

The reference is what everything else is tested against, so its oracle shares no code with it and calls no torch op.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import rel_rms

from dico_kernels.reference import functional as F

ERF = np.vectorize(math.erf)


def array(*shape, seed=0, scale=1.0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape) * scale


def layer_norm(x, eps=1e-6):
    out = np.empty_like(x)
    for n, i, j in np.ndindex(x.shape[0], *x.shape[2:]):
        v = x[n, :, i, j]
        mean = v.sum() / v.size
        out[n, :, i, j] = (v - mean) / np.sqrt(((v - mean) ** 2).sum() / v.size + eps)
    return out


def adaln(x, shift, scale, eps=1e-6):
    return layer_norm(x, eps) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


def gelu(x):
    return x * 0.5 * (1 + ERF(x / math.sqrt(2)))


def pointwise(x, w, b):
    return np.einsum("kc,nchw->nkhw", w[:, :, 0, 0], x) + b[:, None, None]


def depthwise(x, w, b):
    k = w.shape[-1]
    r = k // 2
    padded = np.pad(x, ((0, 0), (0, 0), (r, r), (r, r)))
    out = np.zeros_like(x)
    for i, j in np.ndindex(k, k):
        out += w[:, 0, i, j][:, None, None] * padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
    return out + b[:, None, None]


def cca(x, w, b):
    pooled = x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    attention = 1 / (1 + np.exp(-(pooled @ w[:, :, 0, 0].T + b)))
    return x * attention[:, :, None, None]


def grn(x, gamma, beta, eps=1e-6):
    norm = np.sqrt((x**2).sum((2, 3)))
    response = norm / (norm.sum(1, keepdims=True) / norm.shape[1] + eps)
    return gamma[:, None, None] * x * response[:, :, None, None] + beta[:, None, None] + x


def pixel_shuffle(x):
    n, c4, h, w = x.shape
    out = np.empty((n, c4 // 4, 2 * h, 2 * w))
    for c, i, j in np.ndindex(c4 // 4, 2, 2):
        out[:, c, i::2, j::2] = x[:, 4 * c + 2 * i + j]
    return out


def conv_half(x, shift, scale, gate, w1, b1, wd, bd, wa, ba, w2, b2):
    h = gelu(depthwise(pointwise(adaln(x, shift, scale), w1, b1), wd, bd))
    return x + gate[:, :, None, None] * pointwise(cca(h, wa, ba), w2, b2)


def ffn_half(x, shift, scale, gate, w1, b1, w2, b2):
    h = gelu(pointwise(adaln(x, shift, scale), w1, b1))
    return x + gate[:, :, None, None] * pointwise(h, w2, b2)


def fcdm_block(x, shift, scale, gate, wd, bd, w1, b1, gamma, beta, w2, b2):
    h = adaln(depthwise(x, wd, bd), shift, scale)
    h = grn(gelu(pointwise(h, w1, b1)), gamma, beta)
    return x + gate[:, :, None, None] * pointwise(h, w2, b2)


def dynamic_depthwise(x, kernels):
    return np.concatenate([depthwise(x[i : i + 1], kernels[i][:, None], np.zeros(x.shape[1])) for i in range(len(x))])


N, C, H, W, K = 2, 6, 5, 4, 9
X, X2 = array(N, C, H, W, seed=1), array(N, C, H, W, seed=2)
SHIFT, SCALE, GATE = (array(N, C, seed=s) for s in (3, 4, 5))
W_CC, B_C = array(C, C, 1, 1, seed=6, scale=0.4), array(C, seed=7)
W_CC2, B_C2 = array(C, C, 1, 1, seed=8, scale=0.4), array(C, seed=9)
W_CC3, B_C3 = array(C, C, 1, 1, seed=10, scale=0.4), array(C, seed=11)
W_KC, B_K = array(K, C, 1, 1, seed=12, scale=0.4), array(K, seed=13)
W_CK, B_C4 = array(C, K, 1, 1, seed=14, scale=0.4), array(C, seed=15)
DW3, DW7 = array(C, 1, 3, 3, seed=16, scale=0.4), array(C, 1, 7, 7, seed=17, scale=0.2)
GAMMA, BETA = array(K, seed=18), array(K, seed=19)
UP, SKIP = array(N, 8, H, W, seed=20), array(N, 3, 2 * H, 2 * W, seed=21)

CASES = {
    "layer_norm": (F.layer_norm, layer_norm, [X]),
    "gelu": (F.gelu, gelu, [X * 2]),
    "adaln_modulate": (F.adaln_modulate, adaln, [X, SHIFT, SCALE]),
    "gated_residual": (F.gated_residual, lambda x, b, g: x + g[:, :, None, None] * b, [X, X2, GATE]),
    "pointwise_depthwise_gelu": (
        F.pointwise_depthwise_gelu,
        lambda x, w1, b1, w2, b2: gelu(depthwise(pointwise(x, w1, b1), w2, b2)),
        [X, W_CC, B_C, DW3, B_C2],
    ),
    "cca_gate": (F.cca_gate, cca, [X, W_CC, B_C]),
    "grn": (F.grn, grn, [array(N, K, H, W), GAMMA, BETA]),
    "depthwise_adaln": (
        F.depthwise_adaln,
        lambda x, w, b, shift, scale: adaln(depthwise(x, w, b), shift, scale),
        [X, DW7, B_C, SHIFT, SCALE],
    ),
    "pixel_shuffle_skip": (
        F.pixel_shuffle_skip,
        lambda up, skip, w, b: pointwise(np.concatenate([pixel_shuffle(up), skip], 1), w, b),
        [UP, SKIP, array(K, 5, 1, 1, seed=22), B_K],
    ),
    "dynamic_depthwise": (F.dynamic_depthwise, dynamic_depthwise, [X, array(N, C, 9, 9, seed=23)]),
    "conv_half": (
        F.conv_half,
        conv_half,
        [X, SHIFT, SCALE, GATE, W_CC, B_C, DW3, B_C2, W_CC2, B_C3, W_CC3, B_C4],
    ),
    "ffn_half": (F.ffn_half, ffn_half, [X, SHIFT, SCALE, GATE, W_KC, B_K, W_CK, B_C]),
    "fcdm_block": (
        F.fcdm_block,
        fcdm_block,
        [X, SHIFT, SCALE, GATE, DW7, B_C, W_KC, B_K, GAMMA, BETA, W_CK, B_C4],
    ),
}


def tensors(arrays, dtype=torch.float64, grad=False):
    return [torch.from_numpy(a.copy()).to(dtype).requires_grad_(grad) for a in arrays]


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    op, oracle, args = CASES[name]
    assert rel_rms(op(*tensors(args)), torch.from_numpy(oracle(*args))) < 1e-14


# One rounding of the result is 2^-9 in bfloat16; the deepest chain here rounds about a dozen times.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", CASES)
def test_dtypes(name, dtype, bound):
    op, oracle, args = CASES[name]
    out = op(*tensors(args, dtype))
    assert out.dtype == dtype
    assert rel_rms(out, torch.from_numpy(oracle(*args))) < bound


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    op, _, args = CASES[name]
    assert torch.autograd.gradcheck(op, tensors(args, grad=True), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_memory_format_does_not_matter(name):
    op, _, args = CASES[name]
    plain = tensors(args)
    last = [a.contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a for a in plain]
    assert rel_rms(op(*last), op(*plain)) < 1e-15


def test_gated_residual_adaln_is_the_two_ops():
    x, branch, gate, shift, scale = tensors([X, X2, GATE, SHIFT, SCALE])
    y, h = F.gated_residual_adaln(x, branch, gate, shift, scale)
    assert torch.equal(y, F.gated_residual(x, branch, gate))
    assert torch.equal(h, F.adaln_modulate(y, shift, scale))


@pytest.mark.parametrize("op", [F.adaln_modulate, lambda x, s, g: F.gated_residual(x, x, s)])
def test_conditioning_of_batch_one_broadcasts(op):
    x, shift, scale = tensors([X, SHIFT, SCALE])
    assert torch.equal(op(x, shift[:1], scale[:1]), op(x, shift[:1].expand(N, C), scale[:1].expand(N, C)))


@pytest.mark.parametrize("shape", [(1, K, 1, 1), (1, 1, 1, K), (K,)], ids=str)
def test_grn_takes_every_published_parameter_shape(shape):
    x, gamma, beta = tensors([array(N, K, H, W), GAMMA, BETA])
    assert torch.equal(F.grn(x, gamma.reshape(shape), beta.reshape(shape)), F.grn(x, gamma, beta))


# A whole model moves by 6e-6 when GRN's eps is wrong, and by 2e-6 (hard weights) when LayerNorm's is; an input of
# eps's own size moves the op by a factor.
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_layer_norm_eps(size):
    assert rel_rms(F.layer_norm(torch.from_numpy(X * size)), torch.from_numpy(layer_norm(X * size, 1e-6))) < 1e-12


@pytest.mark.parametrize("size", [1e-5, 1e-7])
def test_grn_eps(size):
    x = array(N, K, H, W) * size
    out = F.grn(*tensors([x, GAMMA, BETA * size]))
    assert rel_rms(out, torch.from_numpy(grn(x, GAMMA, BETA * size, 1e-6))) < 1e-12


def test_grn_of_a_dead_channel_is_finite_in_both_directions():
    x, gamma, beta = tensors([np.zeros((N, K, H, W)), GAMMA, BETA], grad=True)
    F.grn(x, gamma, beta).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(gamma.grad).all()
