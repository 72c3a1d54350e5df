"""The helpers that every kernel uses: rounding, GELU, 64-bit offsets, launches and tiles."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from dico_kernels.kernels import common, tiles

# Elements a program: with 1024 a thread ptxas takes minutes.
BLOCK = 1 << 12


@triton.jit
def _round_kernel(x, stored, values, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = common.load(x + i, i < N, tl.float32)
    common.store(stored + i, v, i < N)
    common.store(values + i, common.rounded(v, stored.dtype.element_ty), i < N)


@triton.jit
def _load_kernel(x, y, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    common.store(y + i, common.load(x + i, i < N, ACC), i < N)


@triton.jit
def _gelu_kernel(x, y, dy, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = common.load(x + i, i < N, ACC)
    common.store(y + i, common.gelu(v), i < N)
    common.store(dy + i, common.gelu_grad(v), i < N)


@triton.jit
def _offset_kernel(row, out, C, K):
    r = tl.load(row + tl.arange(0, 4))
    tl.store(out + tl.arange(0, 4), common.row_offset(r, C))
    tl.store(out + 4 + tl.arange(0, 1), common.wide(C) * K + tl.zeros([1], tl.int64))


def boundaries() -> torch.Tensor:
    """float32 around every bfloat16: the value itself, its halfway point, and one bit on either side of both."""
    upper = torch.arange(65536, dtype=torch.int64)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64)
    bits = (upper | lower).flatten()
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(dtype, device):
    x = boundaries().to(device)
    stored, values = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    _round_kernel[(common.cdiv(x.numel(), BLOCK),)](x, stored, values, x.numel(), BLOCK=BLOCK)
    expected = x.to(dtype)
    assert torch.equal(stored.isnan(), x.isnan())
    kept = ~x.isnan()
    assert torch.equal(stored[kept], expected[kept])
    assert torch.equal(stored[kept].signbit(), expected[kept].signbit())
    assert torch.equal(values[kept], expected[kept].float())


def test_every_bfloat16_loads_exactly(device):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(device)
    y = torch.empty_like(x, dtype=torch.float32)
    _load_kernel[(common.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), ACC=tl.float32, BLOCK=BLOCK)
    assert torch.equal(y.nan_to_num(12345.0), x.float().nan_to_num(12345.0))
    assert torch.equal(y.isnan(), x.isnan())


# float32: what rsqrt may err by on a GPU, 2^-22.9, is 2.2e-7 of Phi, roundings and the formula itself 3e-7
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 6e-7), (torch.float64, 1e-15)], ids=str)
def test_gelu_and_its_derivative(dtype, bound, device):
    """Near zero, and at every bfloat16: up to 3e38, where squares on the way overflow."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = torch.cat([torch.linspace(-12, 12, 4001).to(dtype), every[every.isfinite()].to(dtype)]).to(device)
    y, dy = torch.empty_like(x), torch.empty_like(x)
    acc = common.acc_triton(dtype)
    _gelu_kernel[(common.cdiv(x.numel(), BLOCK),)](x, y, dy, x.numel(), ACC=acc, BLOCK=BLOCK)
    leaf = x.double().cpu().requires_grad_()
    expected = torch.nn.functional.gelu(leaf)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    expected = expected.detach()
    assert ((y.cpu() - expected).abs() <= bound + torch.finfo(dtype).eps * expected.abs()).all()
    assert ((dy.cpu() - gradient).abs() <= bound).all()


def test_gelu_of_what_is_not_finite(device):
    x = torch.tensor([float("inf"), float("nan")], device=device)
    y, dy = torch.empty_like(x), torch.empty_like(x)
    _gelu_kernel[(1,)](x, y, dy, 2, ACC=tl.float32, BLOCK=2)
    assert torch.equal(y.isnan().cpu(), torch.tensor([False, True]))
    assert y[0] == float("inf")


def test_offsets_exceed_32_bits(device):
    row = torch.tensor([0, 1, 2**21, 2**31 - 1], dtype=torch.int32, device=device)
    out = torch.zeros(5, dtype=torch.int64, device=device)
    _offset_kernel[(1,)](row, out, 4096, 2**20)
    assert out.tolist() == [0, 4096, 2**33, (2**31 - 1) * 4096, 2**32]


def test_a_width_of_one_is_widened_too(device):
    """Triton makes an argument of 1 a constant, which has no .to()."""
    out = torch.zeros(5, dtype=torch.int64, device=device)
    _offset_kernel[(1,)](torch.arange(4, dtype=torch.int32, device=device), out, 1, 3)
    assert out.tolist() == [0, 1, 2, 3, 3]


def test_recording_launches_nothing():
    from dico_kernels.kernels.channel import channel_sums

    with common.record() as launches:
        out = channel_sums(torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    assert [launch.kernel.__name__ for launch in launches] == ["_channel_sums_fwd_kernel"]
    assert out.isnan().all()


@pytest.mark.parametrize("c", [1, 3, 128, 416, 1664, 5000])
@pytest.mark.parametrize("hw", [1, 7, 64, 1024])
def test_tiles_cover_and_are_powers_of_two(c, hw):
    for tile in (tiles.row_tile(c, hw, tensors=2), tiles.row_tile(c, hw, tensors=6), tiles.band_tile(c, hw)):
        for size in (tile.rows, tile.cols, tile.span, tile.warps):
            assert size == tiles.pow2(size) >= 1
        assert tile.span % tile.rows == 0
        assert tile.warps <= 16
    assert tiles.row_tile(c, hw, tensors=2).cols >= c


@pytest.mark.parametrize("c", [257, 416, 1024])
def test_a_forward_row_of_moderate_width_is_one_warps(c):
    """Several would meet at barriers; and 32 elements a thread are what registers hold without spilling."""
    tile = tiles.row_tile(c, 1024, tensors=2)
    assert tile.warps == 1
    assert tile.rows * tile.cols <= 1024


@pytest.mark.parametrize("w", [8, 32])
def test_two_programs_of_7x7_share_a_multiprocessor(w):
    for rule in (partial(tiles.depthwise_tile, 64, 512, w, w), partial(tiles.depthwise_backward_tile, 512, w)):
        tile = rule(7, torch.bfloat16)
        assert 16 * 32 * tile.maxnreg <= 65536
        assert 16 % tile.warps == 0
        assert rule(7, torch.float64).maxnreg is rule(9, torch.float32).maxnreg is None


def test_small_batches_of_depthwise_get_short_programs():
    """Else one image of DiCo's first level would be 13 programs, for over a hundred multiprocessors."""
    heights = [tiles.depthwise_tile(n, 416, 32, 32, 3, torch.bfloat16).height for n in (1, 8, 16, 64)]
    assert heights == [2, 8, 16, 32]


@pytest.mark.parametrize(("current", "entered"), [(1, []), (0, [torch.device("cuda", 1)])])
def test_launches_go_to_the_tensors_device(current, entered, monkeypatch):
    class OnSecond(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 1)

    class Kernel:
        arg_names = ("x",)

        def __getitem__(self, grid):
            return lambda *args, **given: launched.append(list(seen))

    launched, seen = [], []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(device) or contextlib.nullcontext())
    common.launch(Kernel(), 1, torch.ones(1).as_subclass(OnSecond), num_warps=4)
    assert launched == [entered]


@pytest.mark.parametrize(("hip", "options"), [(None, {"maxnreg": 128}), ("6.2", {})])
def test_registers_are_limited_where_the_compiler_can(hip, options, monkeypatch):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **given: seen.append(given)

    monkeypatch.setattr(torch.version, "hip", hip)
    common.launch(Kernel(), 1, torch.ones(1), num_warps=4, maxnreg=128)
    assert seen == [{"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True, **options}]


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_products_follow_torchs_setting(setting, expected):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert common.matmul_precision(torch.float32) == expected
        assert common.matmul_precision(torch.float64) == common.matmul_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("setting", "expected"), [("ieee", "ieee"), ("tf32", "tf32")])
def test_float32_products_run_under_torchs_newer_setting(setting, expected, random):
    """Under which torch.get_float32_matmul_precision() may raise."""
    from dico_kernels.kernels import gemm

    before = torch.get_float32_matmul_precision()
    x, weight = random((2, 8, 3, 5), torch.float32), random((16, 8), torch.float32)
    try:
        torch.backends.cuda.matmul.fp32_precision = setting
        assert common.matmul_precision(torch.float32) == expected
        assert common.matmul_precision(torch.bfloat16) == "ieee"
        y = gemm.pointwise(x, weight).y
    finally:
        torch.set_float32_matmul_precision(before)
    exact = torch.nn.functional.conv2d(x.double(), weight.double()[:, :, None, None])
    assert (y - exact).norm() <= (1e-3 if expected == "tf32" else 1e-6) * exact.norm()


class Compiled:
    """A kernel as Triton compiles it, and what it was called with."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args: self.calls.append((grid, args))


class Kernel:
    """A kernel as Triton has it before it is compiled, and what it was compiled for."""

    arg_names = ("x", "n", "scale", "SIZE", "GELU")

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def call(*args, **options):
            self.compiled.append((args, options, Compiled()))
            return self.compiled[-1][-1]

        return call


def test_what_was_compiled_is_called_again(monkeypatch):
    monkeypatch.setattr(common, "_on_nvidia", lambda x: True)
    monkeypatch.setattr(common, "_COMPILED", {})
    kernel = Kernel()
    memory = torch.empty(64)
    assert memory.data_ptr() % 16 == 0

    def launch(x=memory, n=7, scale=None, programs=3, warps=4, size=8, gelu=True):
        common.launch(kernel, programs, x, n, scale, num_warps=warps, GELU=gelu, SIZE=size)

    launch()
    launch()
    launch(x=memory[4:], n=9, programs=5)
    ((args, options, compiled),) = kernel.compiled
    assert args == (memory, 7, None)
    assert options == {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True, "GELU": True, "SIZE": 8}
    assert [(grid, a[1:]) for grid, a in compiled.calls] == [
        ((3, 1, 1), (7, None, 8, True)),
        ((5, 1, 1), (9, None, 8, True)),
    ]
    assert [a[0].data_ptr() for _, a in compiled.calls] == [memory.data_ptr(), memory[4:].data_ptr()]
    others = [
        {"x": memory[1:]}, {"x": memory.double()}, {"n": 1}, {"n": 16}, {"n": 2**31}, {"scale": memory},
        {"scale": 0.5}, {"warps": 8}, {"size": 16}, {"gelu": False},
    ]  # fmt: skip
    for count, other in enumerate(others, 2):
        launch(**other)
        launch(**other)
        assert len(kernel.compiled) == count, other
    assert all(len(c.calls) == 1 for *_, c in kernel.compiled[1:])
    # a count is a count, whatever divides it
    kernel = Kernel()
    kernel.arg_names = ("x", "samples", *Kernel.arg_names[2:])
    for n in (7, 1, 16, 9):
        launch(n=n)
    assert len(kernel.compiled) == 1
    launch(n=2**31)
    assert len(kernel.compiled) == 2


def test_the_interpreter_keeps_nothing(device, monkeypatch):
    monkeypatch.setattr(common, "_COMPILED", {})
    x = torch.randn(8, device=device)
    common.launch(_load_kernel, 1, x, torch.empty_like(x), 8, num_warps=4, ACC=tl.float32, BLOCK=8)
    assert bool(common._COMPILED) == (device != "cpu" and torch.version.hip is None)
