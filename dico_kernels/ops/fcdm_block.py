"""FCDM's whole block as a single op; see block.py, whose plan it follows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dico_kernels.ops import _checks as check
from dico_kernels.ops import pointwise as pw
from dico_kernels.ops._backends import fused_products, select
from dico_kernels.ops._library import kept, only_needed, register
from dico_kernels.ops._recorded import recorded
from dico_kernels.ops._sums import gradients
from dico_kernels.ops._tuning import tunable
from dico_kernels.ops.block import (
    check_stream,
    gradient_dtype,
    nothing,
    per_sample,
    refuse_unsaved,
    statistics,
    to_save,
    zeroed,
)
from dico_kernels.ops.grn import check_parameter, norm_and_scale, scale_gradients, scale_of

_ARGUMENTS = (
    "Tensor x, Tensor shift, Tensor scale, Tensor gate, Tensor dw_weight, Tensor? dw_bias, Tensor pw1_weight, "
    "Tensor? pw1_bias, Tensor gamma, Tensor beta, Tensor pw2_weight, Tensor? pw2_bias"
)


def _check(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, dw: Tensor, db: Tensor | None, w1: Tensor,
    b1: Tensor | None, gamma: Tensor, beta: Tensor, w2: Tensor, b2: Tensor | None, ln_eps: float, grn_eps: float,
) -> None:  # fmt: skip
    like = check_stream(x, "dw_weight", dw)
    for name, v in (("shift", shift), ("scale", scale), ("gate", gate)):
        check.condition(name, v, like)
    c = x.shape[1]
    check.depthwise("dw_weight", dw, c, like)
    check.vector("dw_bias", db, c, like)
    check.pointwise("pw1_weight", w1, c, like)
    inner = w1.shape[0]
    check.vector("pw1_bias", b1, inner, like)
    check_parameter("gamma", gamma, inner, like)
    check_parameter("beta", beta, inner, like)
    check.pointwise("pw2_weight", w2, inner, like, outputs=c)
    check.vector("pw2_bias", b2, c, like)
    check.positive("ln_eps", ln_eps)
    check.positive("grn_eps", grn_eps)


def _hidden(
    x: Tensor, shift: Tensor, scale: Tensor, dw: Tensor, db: Tensor | None, w1: Tensor, b1: Tensor | None, eps: float,
    frozen: bool = False, gelu: bool = False, keep: bool = False,
) -> pw.Product:  # fmt: skip
    """The first product, of adaLN of the depthwise convolution; through GELU, and with the sums of its squares."""
    z = select("depthwise", x)(x.to(w1.dtype), dw.contiguous(), check.dense(db), False)
    return pw.product(
        z, w1, b1, frozen=frozen, shift=check.dense_rows(shift), scale=check.dense_rows(scale), eps=eps, gelu=gelu,
        keep=keep, squares=gelu,
    )  # fmt: skip


def _block(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, dw: Tensor, db: Tensor | None, w1: Tensor,
    b1: Tensor | None, gamma: Tensor, beta: Tensor, w2: Tensor, b2: Tensor | None, ln_eps: float, grn_eps: float,
    save: bool, recompute: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check(x, shift, scale, gate, dw, db, w1, b1, gamma, beta, w2, b2, ln_eps, grn_eps)
    if x.shape[0] == 0:
        return _result(x, w1, save, recompute)
    x = check.channels_last(x)
    shift, scale, gate = check.dense_rows(shift), check.dense_rows(scale), check.dense_rows(gate)
    whole = fused_products("fcdm_block_forward", x, w1)
    if whole is not None:
        keep = save and not recompute
        done = whole(
            x, shift, scale, gate, dw.contiguous(), check.dense(db),
            check.matrix(w1), check.dense(b1), gamma.contiguous().reshape(-1), beta.contiguous().reshape(-1),
            check.matrix(w2), check.dense(b2), ln_eps, grn_eps, keep=keep,
        )  # fmt: skip
        saved = (*done.statistics, done.norm, done.h if keep else nothing(x, 1)[0])
        return (done.out, *(saved if save else nothing(x, 4)))
    keep = save and not recompute
    first = _hidden(x, shift, scale, dw, db, w1, b1, ln_eps, frozen=not save, gelu=True, keep=keep)
    assert first.squares is not None
    h = nothing(x, 1)[0] if first.before is None else first.before
    mean, rstd = pw.statistics_of(first) if save else nothing(x, 2)
    norm, s = norm_and_scale(first.squares, gamma, grn_eps)
    g, plus = first.y, beta.contiguous().reshape(-1)
    del first
    out = pw.product(g, w2, b2, frozen=not save, s=s, plus=plus, gate=gate, residual=x).y
    return (out, mean, rstd, norm, h) if save else (out, *nothing(x, 4))


def _result(x: Tensor, w1: Tensor, save: bool, recompute: bool) -> tuple[Tensor, ...]:
    if not save:
        return check.empty_image(x), *nothing(x, 4)
    h = nothing(x, 1)[0] if recompute else check.empty_image(x, w1.shape[0], dtype=w1.dtype)
    return check.empty_image(x), *statistics(x), *per_sample(x, w1.shape[0]), h


def _fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, save, recompute = args
    _check(*inputs)
    return _result(inputs[0], inputs[6], save, recompute)


def _backward(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, dw: Tensor, db: Tensor | None, w1: Tensor,
    b1: Tensor | None, gamma: Tensor, beta: Tensor, w2: Tensor, b2: Tensor | None, mean: Tensor, rstd: Tensor,
    norm: Tensor, h: Tensor, ln_eps: float, grn_eps: float, wide: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if x.shape[0] == 0:
        return zeroed(_gradients(x, shift, scale, gate, dw, w1, gamma, beta, w2, wide))
    x, dy, dw = check.channels_last(x), check.channels_last(dy), dw.contiguous()
    m1, m2 = check.matrix(w1), check.matrix(w2)
    if h.ndim == 1:
        h = _hidden(x, shift, scale, dw, db, w1, b1, ln_eps).y
    h = check.channels_last(h)
    narrow_x = x.to(w1.dtype)
    s = scale_of(norm, gamma, grn_eps)
    gate = check.dense_rows(gate)
    dbranch, dy_narrow, sums, gated = select("gate_gradient", x)(dy, gate)
    g, _ = select("gelu", x)(h, False)
    dg = pw.input_gradient(dbranch, m2)
    flat = beta.contiguous().reshape(-1)
    dw2, dgate, ds = pw.gated_gradients(dy_narrow, dbranch, dg, sums, gated, g, s, flat, gate, m2, b2, wide)
    assert ds is not None
    del g, dy_narrow, dbranch
    dgamma, through = scale_gradients(ds, norm, gamma, grn_eps)
    dh, _, db1 = select("gelu_backward", x)(dg, h, s, through, overwrite=True)
    del dg
    da = pw.input_gradient(dh, m1)
    z = select("depthwise", x)(narrow_x, dw, check.dense(db), False)
    dz, a, dshift, dscale = select("adaln_modulate_backward_residual", x)(
        da, None, z, check.dense_rows(shift), check.dense_rows(scale), mean, rstd
    )
    dw1 = pw.weight_gradient(dh, a, wide)
    dx, ddw, ddb = select("depthwise_backward", x)(dz, narrow_x, dw, None, False)
    c, inner = x.shape[1:2], w1.shape[:1]
    (db2,) = gradients(norm.dtype, (gated, c))
    dbeta = db2 @ m2.to(db2.dtype)
    dtype = gradient_dtype(w1, wide)
    dshift, dscale, dgate, ddw, ddb, db1, dgamma, dbeta, db2 = gradients(
        dtype, (dshift, shift.shape), (dscale, scale.shape), (dgate, gate.shape), (ddw, dw.shape), (ddb, c),
        (db1, inner), (dgamma, gamma.shape), (dbeta, beta.shape), (db2, c),
    )  # fmt: skip
    dw1, dw2 = (w.to(dtype) for w in (dw1.reshape(w1.shape), dw2.reshape(w2.shape)))
    return dx + dy, dshift, dscale, dgate, ddw, ddb, dw1, db1, dgamma, dbeta, dw2, db2


def _gradients(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, dw: Tensor, w1: Tensor, gamma: Tensor, beta: Tensor,
    w2: Tensor, wide: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    c, inner = x.shape[1:2], w1.shape[:1]
    vectors = (shift.shape, scale.shape, gate.shape)
    shapes = (*vectors, dw.shape, c, w1.shape, inner, gamma.shape, beta.shape, w2.shape, c)
    return check.empty_image(x), *(w1.new_empty(tuple(s), dtype=gradient_dtype(w1, wide)) for s in shapes)


def _backward_fake(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, dw: Tensor, db: Tensor | None, w1: Tensor,
    b1: Tensor | None, gamma: Tensor, beta: Tensor, w2: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _gradients(x, shift, scale, gate, dw, w1, gamma, beta, w2, rest[-1])


_BACKWARD = register(
    f"fcdm_block_backward(Tensor dy, {_ARGUMENTS}, Tensor mean, Tensor rstd, Tensor norm, Tensor h, float ln_eps, "
    f"float grn_eps, bool wide) -> ({', '.join(['Tensor'] * 12)})",
    recorded("fcdm_block_backward", _backward, weight=7),
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ln_eps, grn_eps, _, recompute, ctx.dtype = inputs
    tensors[7] = tensors[7] if recompute else None
    saved = output[1:]
    ctx.mark_non_differentiable(*saved)
    ctx.eps = ln_eps, grn_eps
    ctx.save_for_backward(*tensors, *saved)


def _gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs = kept(ctx, 12)
    refuse_unsaved(inputs[12], "fcdm_block")
    return only_needed(ctx, (*_BACKWARD(dy, *inputs, *ctx.eps, ctx.dtype is not None), *[None] * 5))


_FCDM_BLOCK = register(
    f"fcdm_block({_ARGUMENTS}, float ln_eps, float grn_eps, bool save, bool recompute, ScalarType? dtype) -> "
    f"({', '.join(['Tensor'] * 5)})",
    recorded("fcdm_block", tunable("fcdm_block", _block, weight=6, flags=2), weight=6, save=-2),
    _fake,
    setup_context=_setup,
    backward=_gradient,
    autocast="branch",
)


def fcdm_block(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    pw1_weight: Tensor,
    pw1_bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    pw2_weight: Tensor,
    pw2_bias: Tensor | None,
    ln_eps: float = 1e-6,
    grn_eps: float = 1e-6,
    *,
    recompute: bool = False,
) -> Tensor:
    """FCDM's block: x + gate * pw2(GRN(GELU(pw1(adaLN(dw(x)))))).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; also float32 beside 16-bit weights, as under autocast.
        shift: (N, C), or (1, C) and broadcast; the weights' dtype, as all that follows.
        scale: as shift.
        gate: as shift.
        dw_weight: (C, 1, k, k), k odd, 1 to 9 (FCDM: 7); padding k // 2.
        dw_bias: (C,) or None.
        pw1_weight: (K, C, 1, 1) or (K, C).
        pw1_bias: (K,) or None.
        gamma: GRN's, K elements as (1, K, 1, 1), (1, 1, 1, K) or (K,).
        beta: as gamma.
        pw2_weight: (C, K, 1, 1) or (C, K).
        pw2_bias: (C,) or None.
        ln_eps: added to LayerNorm's variance.
        grn_eps: added to GRN's mean norm.
        recompute: keep x alone for backward, which then forms pw1's output once more.

    Returns:
        (N, C, H, W) of x's dtype, channels_last. Differentiable once; keeps x, pw1's output and vectors for that.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    args = (
        x, shift, scale, gate, dw_weight, dw_bias, pw1_weight, pw1_bias, gamma, beta, pw2_weight, pw2_bias
    )  # fmt: skip
    save = to_save(*args)
    y: Tensor = _FCDM_BLOCK(*args, ln_eps, grn_eps, save, recompute and save, None)[0]
    return y


__all__ = ["fcdm_block"]
