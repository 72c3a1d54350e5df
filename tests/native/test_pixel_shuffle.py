"""The native pixel_shuffle_skip on every instruction set, against float64 autograd of the reference."""

from __future__ import annotations

import pytest
import torch
from support import rel_rms

from dico_kernels import _gemm, native
from dico_kernels.dtypes import accumulation_dtype
from dico_kernels.reference import functional as F

# up's batch, shuffled channels, height, width; skip channels; output channels
CASES = [(1, 1, 1, 1, 1, 1), (2, 5, 3, 7, 3, 4), (3, 17, 2, 2, 20, 9), (1, 33, 1, 9, 8, 16), (2, 64, 4, 6, 64, 40)]


def inputs(case, dtype, image):
    n, c, h, w, s, k = case
    weight = torch.randn(k, c + s, 1, 1, dtype=torch.float64) / (c + s) ** 0.5
    bias = torch.randn(k, dtype=torch.float64)
    args = image((n, 4 * c, h, w), dtype), image((n, s, 2 * h, 2 * w), dtype), weight.to(dtype), bias.to(dtype)
    return args, image((n, k, 2 * h, 2 * w), dtype)


def evaluate(args, dy):
    results = [native.pixel_shuffle_skip(*args), *native.pixel_shuffle_skip_backward(dy, *args[:3])]
    for t in results[:3]:
        assert t.dtype == args[0].dtype
        assert t.is_contiguous(memory_format=torch.channels_last)
    assert results[3].dtype in (args[0].dtype, accumulation_dtype(args[0].dtype))
    assert results[4].dtype == accumulation_dtype(args[0].dtype)
    return [*results[:4], results[4].sum(0)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(isa, case, dtype, image, check):
    args, dy = inputs(case, dtype, image)
    check(evaluate(args, dy), F.pixel_shuffle_skip, args, [dy], summed={3: dy[:, 0].numel()})


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_chunks(isa, dtype, own, image, check, monkeypatch):
    """Chunks that divide neither the image nor the batch; as small as a row; and whole. Ours join in backward alone."""
    args, dy = inputs((2, 12, 5, 4, 7, 6), dtype, image)
    monkeypatch.setattr(native, "multiplies", lambda weight: own)
    for size in (1, 3000, 1 << 22):
        monkeypatch.setattr(native, "_CHUNK_BYTES", size)
        check(evaluate(args, dy), F.pixel_shuffle_skip, args, [dy], summed={3: dy[:, 0].numel()})


# rows of 100 and 132 pixels, whose blocks of 25 and 33 begin and end within a pair, and of 196, in blocks of 28
@pytest.mark.parametrize("case", [*CASES, (1, 9, 2, 25, 4, 66), (2, 40, 1, 33, 24, 70), (1, 7, 1, 49, 5, 3)], ids=str)
def test_gathered_inside_the_product(isa, case, dtype, image, monkeypatch):
    """Our product, also of what is left to the library's here; with the identity as weight its operand itself."""
    (up, skip, weight, bias), _ = inputs(case, dtype, image)
    exact = F.pixel_shuffle_skip(*(v.double() for v in (up, skip, weight, bias)))
    y = native.pointwise(up, weight, bias, skip=skip).y
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert rel_rms(y, exact) <= {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 1.3 * torch.finfo(dtype).eps / 2)
    joined = torch.cat([torch.nn.functional.pixel_shuffle(up, 2), skip], 1)
    same = torch.eye(joined.shape[1], dtype=dtype)[:, :, None, None].contiguous()
    for rows in (_gemm._ROWS, (7, 7)):
        monkeypatch.setattr(_gemm, "_ROWS", rows)
        assert torch.equal(native.pointwise(up, same, skip=skip).y, joined)


def test_what_the_gathering_product_refuses(image):
    (up, skip, weight, bias), _ = inputs((2, 5, 3, 7, 3, 4), torch.float32, image)
    gate = torch.zeros(2, 4)
    for arguments, options, named in [
        ((up, weight, bias), {"skip": skip[:, :, :2].contiguous(memory_format=torch.channels_last)}, "skip has shape"),
        ((up, weight, bias), {"skip": skip.double()}, "skip is"),
        ((up, weight[:, :7], bias), {"skip": skip}, "weight has shape"),
        ((skip, weight, bias), {"skip": skip}, "x has 3 channels"),
        ((up, weight, bias), {"skip": skip, "gelu": True}, "nothing but a bias"),
        ((up, weight, bias), {"skip": skip, "gate": gate, "residual": skip}, "nothing but a bias"),
    ]:
        with pytest.raises(ValueError, match=named):
            native.pointwise(*arguments, **options)


def test_the_default_device_does_not_matter(image, monkeypatch):
    args, dy = inputs((2, 12, 5, 4, 7, 6), torch.float32, image)
    monkeypatch.setattr(native, "_CHUNK_BYTES", 3000)
    expected = evaluate(args, dy)
    with torch.device("meta"):
        results = evaluate(args, dy)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_moves_elements_exactly(isa, image):
    """With the identity as weight the output is the concatenation itself."""
    up, skip = image((2, 20, 3, 4), torch.float64), image((2, 6, 6, 8), torch.float64)
    weight = torch.eye(11, dtype=torch.float64)[:, :, None, None].contiguous()
    out = native.pixel_shuffle_skip(up, skip, weight, None)
    assert torch.equal(out, torch.cat([torch.nn.functional.pixel_shuffle(up, 2), skip], 1))
    dup, dskip, _, _ = native.pixel_shuffle_skip_backward(out, up, skip, weight)
    assert torch.equal(dup, up)
    assert torch.equal(dskip, skip)


def test_workspace_is_a_chunk(image, monkeypatch):
    """Beyond its results, nothing that grows with the image is allocated by this package."""
    args, dy = inputs((1, 16, 64, 64, 16, 16), torch.float32, image)
    monkeypatch.setattr(native, "_CHUNK_BYTES", 1 << 16)
    sizes, allocate = [], torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda t, *a: sizes.append(allocate(t, *a).nbytes) or allocate(t, *a)
    )
    evaluate(args, dy)
    assert max(sizes) == 1 << 16


def test_same_bits_on_any_number_of_threads(isa, image, same_bits):
    args, dy = inputs((2, 40, 6, 5, 24, 32), torch.float32, image)
    same_bits(lambda: evaluate(args, dy))


def test_bad_arguments_are_named(image):
    (up, skip, weight, bias), dy = inputs((2, 3, 2, 2, 4, 5), torch.float32, image)
    for named, call in {
        "up has strides": lambda: native.pixel_shuffle_skip(up.contiguous(), skip, weight, bias),
        "up has 11 channels": lambda: native.pixel_shuffle_skip(
            up[:, :11].contiguous(memory_format=torch.channels_last), skip, weight, bias
        ),
        "skip has shape": lambda: native.pixel_shuffle_skip(up, skip[:1], weight, bias),
        "weight has shape": lambda: native.pixel_shuffle_skip(up, skip, weight[:, :6], bias),
        "bias has shape": lambda: native.pixel_shuffle_skip(up, skip, weight, bias[:4]),
        "dy has shape": lambda: native.pixel_shuffle_skip_backward(dy[:1], up, skip, weight),
    }.items():
        with pytest.raises(ValueError, match=named):
            call()
    meta = [v.to("meta") for v in (up, skip, weight, bias)]
    with pytest.raises(RuntimeError, match="shuffle_gather: the native kernel runs on cpu only"):
        native.pixel_shuffle_skip(*meta)
