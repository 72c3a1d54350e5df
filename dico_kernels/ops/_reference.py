"""The kernel interface in plain PyTorch: the backend that runs everywhere.

Forward passes are the definitions of dico_kernels.reference; backward passes are the formulas written out. Reduced
results are in the accumulation dtype, per sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.ops._checks import channels_last
from dico_kernels.reference import functional as R


def _acc(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.dtype))


def _out(x: Tensor, like: Tensor) -> Tensor:
    return channels_last(x.to(like.dtype))


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _acc(x)
    variance, mean = torch.var_mean(wide, dim=1, correction=0)
    return mean, torch.rsqrt(variance + eps)


def adaln_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    if shift.dtype != x.dtype:
        y = R.adaln_modulate(x, shift.to(x.dtype), scale.to(x.dtype), eps)
        return _out(y, shift), *_statistics(x, eps)
    return _out(R.adaln_modulate(x, shift, scale, eps), x), *_statistics(x, eps)


def _layer_norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide, rstd = _acc(dy), rstd[:, None]
    normalised = (_acc(x) - mean[:, None]) * rstd
    g = wide * (1 + R.per_channel(_acc(scale)))
    dx = rstd * (g - g.mean(1, keepdim=True) - normalised * (g * normalised).mean(1, keepdim=True))
    return dx, wide.sum((2, 3)), (wide * normalised).sum((2, 3))


def adaln_modulate_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dshift, dscale)."""
    dx, dshift, dscale = _layer_norm_backward(dy, x, scale, mean, rstd)
    return _out(dx, x), dshift, dscale


def adaln_modulate_backward_residual(
    dh: Tensor, dy: Tensor | None, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, h, dshift, dscale)."""
    dx, dshift, dscale = _layer_norm_backward(dh, x, scale, mean, rstd)
    normalised = (_acc(x) - mean[:, None]) * rstd[:, None]
    if dy is not None:
        dx = dx + _acc(dy)
    return _out(dx, x), _out(R.modulate(normalised, _acc(shift), _acc(scale)), dh), dshift, dscale


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor, overwrite: bool = False) -> Tensor:
    """X + gate * branch; computed in x's dtype where the branch has another. Overwrites nothing, as all here."""
    del overwrite
    return _out(R.gated_residual(x, branch, gate), x)


def gate_gradient(dy: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(gate * dy, dy, both of gate's dtype, and the sums of dy and of gate * dy)."""
    sums = _acc(dy).sum((2, 3))
    return _out(_acc(dy) * R.per_channel(_acc(gate)), gate), _out(dy, gate), sums, sums * _acc(gate)


def gated_residual_backward(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(dbranch, dgate)."""
    return _out(_acc(dy) * R.per_channel(_acc(gate)), dy), (_acc(dy) * _acc(branch)).sum((2, 3))


def gated_residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd)."""
    y = gated_residual(x, branch, gate)
    return y, *adaln_modulate(y, shift, scale, eps)


def gated_residual_adaln_backward(
    dy: Tensor, dh: Tensor, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dbranch, dgate, dshift, dscale)."""
    through, dshift, dscale = _layer_norm_backward(dh, y, scale, mean, rstd)
    dx = _acc(dy) + through
    dbranch = dx * R.per_channel(_acc(gate))
    return _out(dx, y), _out(dbranch, y), (dx * _acc(branch)).sum((2, 3)), dshift, dscale


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """Depthwise convolution, GELU if asked."""
    y = R.depthwise(x, weight, bias)
    return _out(R.gelu(y) if gelu else y, x)


def depthwise_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias)."""
    wide, taps, gradient = _acc(x), _acc(weight), _acc(dy)
    if gelu:
        z = R.depthwise(wide, taps, None if bias is None else _acc(bias))
        gradient = torch.ops.aten.gelu_backward(gradient, z)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        gradient, wide, taps, [x.shape[1]], [1, 1], [weight.shape[-1] // 2] * 2, [1, 1], False, [0, 0], x.shape[1],
        [True, True, True],
    )  # fmt: skip
    return _out(dx, x), dweight, dbias


def channel_sums(x: Tensor) -> Tensor:
    """(N, C) sums over pixels."""
    return _acc(x).sum((2, 3))


def channel_dots(a: Tensor, b: Tensor) -> Tensor:
    """(N, C) sums over pixels of a * b."""
    return (_acc(a) * _acc(b)).sum((2, 3))


def channel_affine(
    x: Tensor,
    s: Tensor,
    shift: Tensor | None = None,
    z: Tensor | None = None,
    r: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """X * s + z * r + shift."""
    del overwrite
    out = _acc(x) * R.per_channel(s)
    if z is not None and r is not None:
        out = out + _acc(z) * R.per_channel(r)
    if shift is not None:
        out = out + R.per_channel(shift)
    return _out(out, x)


def pixel_shuffle_skip(up: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution of cat[PixelShuffle(2)(up), skip]."""
    return _out(R.pixel_shuffle_skip(up, skip, weight, bias), up)


def pixel_shuffle_skip_backward(
    dy: Tensor, up: Tensor, skip: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dup, dskip, dweight, dbias)."""
    shuffled = up.shape[1] // 4
    rows = dy.permute(0, 2, 3, 1).reshape(-1, dy.shape[1])
    inputs = torch.cat([F.pixel_shuffle(up, 2), skip], 1).permute(0, 2, 3, 1).reshape(rows.shape[0], -1)
    both = rows @ weight.flatten(1)
    n, _, h, w = dy.shape
    both = both.reshape(n, h, w, -1).permute(0, 3, 1, 2)
    dweight = (_acc(rows).t() @ _acc(inputs)).reshape(weight.shape)
    dup = F.pixel_unshuffle(both[:, :shuffled], 2)
    return _out(dup, up), _out(both[:, shuffled:], skip), dweight, _acc(rows).sum(0)


def gelu(x: Tensor, squares: bool) -> tuple[Tensor, Tensor | None]:
    """(y, sums of y squared or None)."""
    y = _out(R.gelu(x), x)
    return y, channel_dots(y, y) if squares else None


def gelu_backward(
    dy: Tensor, x: Tensor, s: Tensor | None = None, r: Tensor | None = None, keep: bool = False, overwrite: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dx, gelu(x) or None, sums of dx)."""
    del overwrite
    wide, y = _acc(dy), R.gelu(_acc(x))
    if s is not None and r is not None:
        wide = wide * R.per_channel(s) + y * R.per_channel(r)
    dx = torch.ops.aten.gelu_backward(wide, _acc(x))
    return _out(dx, x), _out(y, x) if keep else None, dx.sum((2, 3))


def gated_products(
    products: Tensor, weight: Tensor, gate: Tensor, s: Tensor | None, dweight: Tensor, sums: Tensor | None = None,
    bias: Tensor | None = None, add: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(dgate, dscale or None); writes dweight, or adds to it."""
    wide, wide_gate = _acc(products), _acc(gate).expand(products.shape[0], -1)
    weighted = wide * weight
    dscale = None if s is None else torch.bmm(wide_gate[:, None], weighted)[:, 0]
    scaled = wide if s is None else wide * s[:, None]
    gradient = (scaled * wide_gate[:, :, None]).sum(0)
    dweight.copy_(dweight + gradient if add else gradient)
    dgate = (scaled * weight).sum(2)
    return dgate if bias is None or sums is None else dgate + sums * _acc(bias), dscale
