"""Whole residual branches as single ops: the two halves of a DiCo block.

One op a branch, so that nothing between its steps is for a compiler to fuse, and so that a training step keeps only
what it must: of the convolution half x and the first 1x1's output, of the feed-forward half x and what GELU is applied
to (or x alone), and vectors. Backward forms the rest anew; the gate's gradient needs no saved branch either, see
``pointwise.gated_gradients``.

x may be float32 though everything else is bfloat16 or float16: the residual stream under autocast, as eager keeps it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.ops import _checks as check
from dico_kernels.ops import pointwise as pw
from dico_kernels.ops._backends import fused_products, note_optional, optional, select
from dico_kernels.ops._library import kept, only_needed, register
from dico_kernels.ops._recorded import recorded
from dico_kernels.ops._sums import gradients
from dico_kernels.ops._tuning import tunable
from dico_kernels.ops.cca import attention_gradients, attention_of

# ---- what the branches share ----


def to_save(*inputs: Tensor | None) -> bool:
    """Whether autograd will want the backward of an op on these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def check_stream(x: Tensor, name: str, weight: Tensor) -> Tensor:
    """Check x against a weight's dtype; a stand-in for x in the weights' dtype, to check the others against."""
    check.image("x", x)
    if weight.dtype == x.dtype:
        return x
    if x.dtype != torch.float32 or weight.dtype not in (torch.bfloat16, torch.float16):
        narrower = ", or torch.bfloat16 or torch.float16" if x.dtype == torch.float32 else ""
        raise ValueError(f"{name} has dtype {weight.dtype}: expected x's, {x.dtype}{narrower}")
    return x.new_empty((1,), dtype=weight.dtype).expand(x.shape)


def refuse_unsaved(saved: Tensor, name: str) -> None:
    """Refuse the backward of what was called with save=False.

    Raises:
        RuntimeError: it was.
    """
    if saved.ndim == 1:
        raise RuntimeError(f"dico_kernels.{name} was called with save=False, so it has no backward: pass save=True")


def gradient_dtype(weight: Tensor, wide: bool) -> torch.dtype:
    """In which a backward pass returns the gradients of all but the stream: the weights', or wide."""
    return accumulation_dtype(weight.dtype) if wide else weight.dtype


def nothing(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """In place of what is not saved."""
    return tuple(x.new_empty(0) for _ in range(count))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (mean, rstd), (N, H, W) each."""
    shape, dtype = (x.shape[0], x.shape[2], x.shape[3]), accumulation_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def per_sample(x: Tensor, *channels: int) -> list[Tensor]:
    """Uninitialised (N, C) in the accumulation dtype, one for each C."""
    return [x.new_empty((x.shape[0], c), dtype=accumulation_dtype(x.dtype)) for c in channels]


def zeroed(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of an empty batch."""
    return tuple(g.zero_() for g in gradients)


# ---- conv_half ----

_CONV = (
    "Tensor x, Tensor shift, Tensor scale, Tensor gate, Tensor pw1_weight, Tensor? pw1_bias, Tensor dw_weight, "
    "Tensor? dw_bias, Tensor ca_weight, Tensor? ca_bias, Tensor pw2_weight, Tensor? pw2_bias"
)


def _check_conv(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, b1: Tensor | None, dw: Tensor,
    db: Tensor | None, wa: Tensor, ba: Tensor | None, w2: Tensor, b2: Tensor | None, eps: float,
) -> None:  # fmt: skip
    like = check_stream(x, "pw1_weight", w1)
    for name, v in (("shift", shift), ("scale", scale), ("gate", gate)):
        check.condition(name, v, like)
    c, inner = x.shape[1], w1.shape[0]
    check.pointwise("pw1_weight", w1, c, like)
    check.vector("pw1_bias", b1, inner, like)
    check.depthwise("dw_weight", dw, inner, like)
    check.vector("dw_bias", db, inner, like)
    check.pointwise("ca_weight", wa, inner, like, outputs=inner)
    check.vector("ca_bias", ba, inner, like)
    check.pointwise("pw2_weight", w2, inner, like, outputs=c)
    check.vector("pw2_bias", b2, c, like)
    check.positive("eps", eps)


def _conv(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, b1: Tensor | None, dw: Tensor,
    db: Tensor | None, wa: Tensor, ba: Tensor | None, w2: Tensor, b2: Tensor | None, eps: float, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_conv(x, shift, scale, gate, w1, b1, dw, db, wa, ba, w2, b2, eps)
    if x.shape[0] == 0:
        return _conv_result(x, w1, save)
    x = check.channels_last(x)
    shift, scale, gate = check.dense_rows(shift), check.dense_rows(scale), check.dense_rows(gate)
    whole = fused_products("conv_half_forward", x, w1)
    if whole is not None:
        done = whole(
            x, shift, scale, gate, check.matrix(w1), check.dense(b1),
            dw.contiguous(), check.dense(db), check.matrix(wa), check.dense(ba), check.matrix(w2), check.dense(b2), eps,
        )  # fmt: skip
        return (done.out, *((done.y1, *done.statistics, done.pooled, done.attention) if save else nothing(x, 5)))
    first = pw.product(x, w1, b1, frozen=not save, shift=shift, scale=scale, eps=eps)
    y1, (mean, rstd) = first.y, pw.statistics_of(first) if save else nothing(x, 2)
    del first
    both = optional("depthwise_sums", x)
    if both is not None:
        note_optional("depthwise_sums", x, both)
        y2, sums = both(y1, dw.contiguous(), check.dense(db), True)
    else:
        y2 = select("depthwise", x)(y1, dw.contiguous(), check.dense(db), True)
        sums = select("channel_sums", x)(y2)
    if not save:
        del y1
    pooled, attention = attention_of(sums, x.shape[2] * x.shape[3], wa, ba)
    out = pw.product(y2, w2, b2, frozen=not save, s=attention, gate=gate, residual=x).y
    return (out, y1, mean, rstd, pooled, attention) if save else (out, *nothing(x, 5))


def _conv_result(x: Tensor, w1: Tensor, save: bool) -> tuple[Tensor, ...]:
    inner = w1.shape[0]
    if not save:
        return check.empty_image(x), *nothing(x, 5)
    y1 = check.empty_image(x, inner, dtype=w1.dtype)
    return check.empty_image(x), y1, *statistics(x), *per_sample(x, inner, inner)


def _conv_fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, save = args
    _check_conv(*inputs)
    return _conv_result(inputs[0], inputs[4], save)


def _conv_backward(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, dw: Tensor, db: Tensor | None,
    wa: Tensor, w2: Tensor, b2: Tensor | None, y1: Tensor, mean: Tensor, rstd: Tensor, pooled: Tensor,
    attention: Tensor, wide: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if x.shape[0] == 0:
        return zeroed(_conv_gradients(x, shift, scale, gate, w1, dw, wa, w2, wide))
    x, dw, m1, m2 = check.channels_last(x), dw.contiguous(), check.matrix(w1), check.matrix(w2)
    # What was saved may have been away: torch.autograd.graph.save_on_cpu(pin_memory=True) brings it back in NCHW.
    y1, gate = check.channels_last(y1), check.dense_rows(gate)
    dbranch, dy_narrow, sums, db2 = select("gate_gradient", x)(check.channels_last(dy), gate)
    y2 = select("depthwise", x)(y1, dw, check.dense(db), True)
    dinner = pw.input_gradient(dbranch, m2)
    dw2, dgate, dattention = pw.gated_gradients(
        dy_narrow, dbranch, dinner, sums, db2, y2, attention, None, gate, m2, b2, wide
    )  # fmt: skip
    assert dattention is not None
    del y2, dy_narrow, dbranch
    dsums, dwa, dba = attention_gradients(dattention, attention, pooled, x.shape[2] * x.shape[3], wa)
    dy2 = select("channel_affine", x)(dinner, attention, shift=dsums, overwrite=True)
    dy1, ddw, ddb = select("depthwise_backward", x)(dy2, y1, dw, check.dense(db), True)
    del dy2
    da = pw.input_gradient(dy1, m1)
    dx, a, dshift, dscale = select("adaln_modulate_backward_residual", x)(
        da, check.channels_last(dy), x, check.dense_rows(shift), check.dense_rows(scale), mean, rstd
    )
    dw1 = pw.weight_gradient(dy1, a, wide)
    db1 = select("channel_sums", x)(dy1)
    c, inner = x.shape[1:2], w1.shape[:1]
    dtype = gradient_dtype(w1, wide)
    dshift, dscale, dgate, db1, ddw, ddb, dba, db2 = gradients(
        dtype, (dshift, shift.shape), (dscale, scale.shape), (dgate, gate.shape), (db1, inner), (ddw, dw.shape),
        (ddb, inner), (dba, inner), (db2, c),
    )  # fmt: skip
    dw1, dwa, dw2 = (w.to(dtype) for w in (dw1.reshape(w1.shape), dwa, dw2.reshape(w2.shape)))
    return dx, dshift, dscale, dgate, dw1, db1, ddw, ddb, dwa, dba, dw2, db2


def _conv_gradients(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, dw: Tensor, wa: Tensor, w2: Tensor, wide: bool
) -> tuple[Tensor, ...]:
    c, inner = x.shape[1:2], w1.shape[:1]
    vectors = (shift.shape, scale.shape, gate.shape)
    shapes = (*vectors, w1.shape, inner, dw.shape, inner, wa.shape, inner, w2.shape, c)
    return check.empty_image(x), *(w1.new_empty(tuple(s), dtype=gradient_dtype(w1, wide)) for s in shapes)


def _conv_backward_fake(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, dw: Tensor, db: Tensor | None,
    wa: Tensor, w2: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _conv_gradients(x, shift, scale, gate, w1, dw, wa, w2, rest[-1])


_CONV_BACKWARD = register(
    "conv_half_backward(Tensor dy, Tensor x, Tensor shift, Tensor scale, Tensor gate, Tensor pw1_weight, "
    "Tensor dw_weight, Tensor? dw_bias, Tensor ca_weight, Tensor pw2_weight, Tensor? pw2_bias, Tensor y1, "
    "Tensor mean, Tensor rstd, Tensor pooled, Tensor attention, bool wide) -> "
    f"({', '.join(['Tensor'] * 12)})",
    recorded("conv_half_backward", _conv_backward, weight=5),
    _conv_backward_fake,
)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, shift, scale, gate, w1, _, dw, db, wa, _, w2, b2, _, _, ctx.dtype = inputs
    saved = output[1:]
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(x, shift, scale, gate, w1, dw, db, wa, w2, b2, *saved)


def _conv_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs = kept(ctx, 10)
    refuse_unsaved(inputs[10], "conv_half")
    return only_needed(ctx, (*_CONV_BACKWARD(dy, *inputs, ctx.dtype is not None), None, None, None))


_CONV_HALF = register(
    f"conv_half({_CONV}, float eps, bool save, ScalarType? dtype) -> ({', '.join(['Tensor'] * 6)})",
    recorded("conv_half", tunable("conv_half", _conv, weight=4, flags=1), weight=4, save=-1),
    _conv_fake,
    setup_context=_conv_setup,
    backward=_conv_gradient,
    autocast="branch",
)


def conv_half(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    pw1_weight: Tensor,
    pw1_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    ca_weight: Tensor,
    ca_bias: Tensor | None,
    pw2_weight: Tensor,
    pw2_bias: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """First residual branch of a DiCo block: x + gate * pw2(CCA(GELU(dw(pw1(adaLN(x)))))).

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; also float32 beside 16-bit weights, as under autocast.
        shift: (N, C), or (1, C) and broadcast; the weights' dtype, as all that follows.
        scale: as shift.
        gate: as shift.
        pw1_weight: (K, C, 1, 1) or (K, C); K is C in the published models.
        pw1_bias: (K,) or None.
        dw_weight: (K, 1, k, k), k odd, 1 to 9; padding k // 2.
        dw_bias: (K,) or None.
        ca_weight: (K, K, 1, 1) or (K, K), channel attention's.
        ca_bias: (K,) or None.
        pw2_weight: (C, K, 1, 1) or (C, K).
        pw2_bias: (C,) or None.
        eps: added to LayerNorm's variance.

    Returns:
        (N, C, H, W) of x's dtype, channels_last. Differentiable once; keeps x, pw1's output and vectors for that.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    args = (x, shift, scale, gate, pw1_weight, pw1_bias, dw_weight, dw_bias, ca_weight, ca_bias, pw2_weight, pw2_bias)
    y: Tensor = _CONV_HALF(*args, eps, to_save(*args), None)[0]
    return y


# ---- ffn_half ----

_FFN = (
    "Tensor x, Tensor shift, Tensor scale, Tensor gate, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
    "Tensor? fc2_bias"
)


def _check_ffn(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
    b2: Tensor | None, eps: float,
) -> None:  # fmt: skip
    like = check_stream(x, "fc1_weight", w1)
    for name, v in (("shift", shift), ("scale", scale), ("gate", gate)):
        check.condition(name, v, like)
    c, inner = x.shape[1], w1.shape[0]
    check.pointwise("fc1_weight", w1, c, like)
    check.vector("fc1_bias", b1, inner, like)
    check.pointwise("fc2_weight", w2, inner, like, outputs=c)
    check.vector("fc2_bias", b2, c, like)
    check.positive("eps", eps)


def _ffn(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
    b2: Tensor | None, eps: float, save: bool, recompute: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    _check_ffn(x, shift, scale, gate, w1, b1, w2, b2, eps)
    if x.shape[0] == 0:
        return _ffn_result(x, w1, save, recompute)
    x = check.channels_last(x)
    shift, scale, gate = check.dense_rows(shift), check.dense_rows(scale), check.dense_rows(gate)
    whole = fused_products("ffn_half_forward", x, w1)
    if whole is not None:
        keep = save and not recompute
        done = whole(
            x, shift, scale, gate, check.matrix(w1), check.dense(b1),
            check.matrix(w2), check.dense(b2), eps, keep=keep,
        )  # fmt: skip
        return (done.out, *((*done.statistics, done.h if keep else nothing(x, 1)[0]) if save else nothing(x, 3)))
    keep = save and not recompute
    done = pw.product(
        x, w1, b1, frozen=not save, shift=shift, scale=scale, eps=eps, gelu=True, keep=keep,
        then=(w2, b2), gate=gate, residual=x,
    )  # fmt: skip
    h = nothing(x, 1)[0] if done.before is None else done.before
    return (done.y, *pw.statistics_of(done), h) if save else (done.y, *nothing(x, 3))


def _ffn_result(x: Tensor, w1: Tensor, save: bool, recompute: bool) -> tuple[Tensor, ...]:
    if not save:
        return check.empty_image(x), *nothing(x, 3)
    h = nothing(x, 1)[0] if recompute else check.empty_image(x, w1.shape[0], dtype=w1.dtype)
    return check.empty_image(x), *statistics(x), h


def _ffn_fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, save, recompute = args
    _check_ffn(*inputs)
    return _ffn_result(inputs[0], inputs[4], save, recompute)


def _ffn_backward(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
    b2: Tensor | None, mean: Tensor, rstd: Tensor, h: Tensor, eps: float, wide: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    if x.shape[0] == 0:
        return zeroed(_ffn_gradients(x, shift, scale, gate, w1, w2, wide))
    x, dy, m1, m2 = check.channels_last(x), check.channels_last(dy), check.matrix(w1), check.matrix(w2)
    shift, scale = check.dense_rows(shift), check.dense_rows(scale)
    if h.ndim == 1:
        h = pw.product(x, w1, b1, frozen=False, shift=shift, scale=scale, eps=eps).y
    h = check.channels_last(h)
    gate = check.dense_rows(gate)
    dbranch, dy_narrow, sums, db2 = select("gate_gradient", x)(dy, gate)
    dhidden = pw.input_gradient(dbranch, m2)
    dh, hidden, db1 = select("gelu_backward", x)(dhidden, h, keep=True, overwrite=True)
    dw2, dgate, _ = pw.gated_gradients(dy_narrow, dbranch, None, sums, db2, hidden, None, None, gate, m2, b2, wide)
    del hidden, dhidden, dy_narrow, dbranch
    da = pw.input_gradient(dh, m1)
    dx, a, dshift, dscale = select("adaln_modulate_backward_residual", x)(da, dy, x, shift, scale, mean, rstd)
    dw1 = pw.weight_gradient(dh, a, wide)
    dtype = gradient_dtype(w1, wide)
    dshift, dscale, dgate, db1, db2 = gradients(
        dtype, (dshift, shift.shape), (dscale, scale.shape), (dgate, gate.shape), (db1, w1.shape[:1]),
        (db2, x.shape[1:2]),
    )  # fmt: skip
    dw1, dw2 = (w.to(dtype) for w in (dw1.reshape(w1.shape), dw2.reshape(w2.shape)))
    return dx, dshift, dscale, dgate, dw1, db1, dw2, db2


def _ffn_gradients(
    x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, w2: Tensor, wide: bool
) -> tuple[Tensor, ...]:
    shapes = (shift.shape, scale.shape, gate.shape, w1.shape, w1.shape[:1], w2.shape, x.shape[1:2])
    return check.empty_image(x), *(w1.new_empty(tuple(s), dtype=gradient_dtype(w1, wide)) for s in shapes)


def _ffn_backward_fake(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _ffn_gradients(x, shift, scale, gate, w1, w2, rest[-1])


_FFN_BACKWARD = register(
    f"ffn_half_backward(Tensor dy, {_FFN}, Tensor mean, Tensor rstd, Tensor h, float eps, bool wide) -> "
    f"({', '.join(['Tensor'] * 8)})",
    recorded("ffn_half_backward", _ffn_backward, weight=5),
    _ffn_backward_fake,
)


def _ffn_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, _, recompute, ctx.dtype = inputs
    tensors[5] = tensors[5] if recompute else None
    saved = output[1:]
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(*tensors, *saved)


def _ffn_gradient(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    inputs = kept(ctx, 8)
    refuse_unsaved(inputs[8], "ffn_half")
    return only_needed(ctx, (*_FFN_BACKWARD(dy, *inputs, ctx.eps, ctx.dtype is not None), None, None, None, None))


_FFN_HALF = register(
    f"ffn_half({_FFN}, float eps, bool save, bool recompute, ScalarType? dtype) -> ({', '.join(['Tensor'] * 4)})",
    recorded("ffn_half", tunable("ffn_half", _ffn, weight=4, flags=2), weight=4, save=-2),
    _ffn_fake,
    setup_context=_ffn_setup,
    backward=_ffn_gradient,
    autocast="branch",
)


def ffn_half(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float = 1e-6,
    *,
    recompute: bool = False,
) -> Tensor:
    """Second residual branch of a DiCo block: x + gate * fc2(GELU(fc1(adaLN(x)))), both 1x1 convolutions.

    Args:
        x: (N, C, H, W), float32, float64, bfloat16 or float16; also float32 beside 16-bit weights, as under autocast.
        shift: (N, C), or (1, C) and broadcast; the weights' dtype, as all that follows.
        scale: as shift.
        gate: as shift.
        fc1_weight: (K, C, 1, 1) or (K, C).
        fc1_bias: (K,) or None.
        fc2_weight: (C, K, 1, 1) or (C, K).
        fc2_bias: (C,) or None.
        eps: added to LayerNorm's variance.
        recompute: keep x alone for backward, which then multiplies by fc1_weight once more.

    Returns:
        (N, C, H, W) of x's dtype, channels_last. Differentiable once; keeps x and fc1's output for that.

    Raises:
        ValueError: a wrong shape, dtype or device, naming the argument.
    """
    args = (x, shift, scale, gate, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    save = to_save(*args)
    y: Tensor = _FFN_HALF(*args, eps, save, recompute and save, None)[0]
    return y


__all__ = ["conv_half", "ffn_half"]
