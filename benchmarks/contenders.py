"""How each contender does the work: the same weights and inputs, made ready to be called."""

from __future__ import annotations

import copy
import functools
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dico_kernels import GraphRunner, backend, create_model, fuse, pack, tune
from dico_kernels.ops._tuning import ignored
from dico_kernels.reference import functional as reference
from dico_kernels.reference.base import Denoiser
from dico_kernels.reference.dico import DiCoBlock
from dico_kernels.reference.dit import Attention, adaln_tokens
from dico_kernels.reference.macs import count_macs, count_macs_by_op
from dico_kernels.reference.weights import fill_, named_normal

from .harness import Contender, relative_error
from .limits import bytes_moved
from .presets import HalfArena, ModelArena

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CHECKED_IMAGES = 2  # errors are measured on the first images of a batch
_L2_BYTES = 100 * 2**20  # above any current L2 or L3: input sets together should exceed it, up to _MAX_SETS
_MAX_SETS = 4
# Reads and writes of an activation with all elementwise work fused (limits.py's convention): pw1, dw, pw2 with the
# residual; qkv, attention, projection with the residual.
_HALF_PASSES = {"conv_half": 7, "attention_half": 11}
_SDPA = {"compile_flash": "FLASH_ATTENTION", "compile_cudnn": "CUDNN_ATTENTION"}


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """torch's float32 flags for a dtype name: default for "fp32" and "bf16", TF32 everywhere for "tf32"."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def _filled(name: str, latent: int, device: torch.device) -> Denoiser:
    """A model with hard weights, float32, on a device. Only DiT's depends on the latent's size."""
    return _filled_once(name, latent if name.startswith("DiT") else 0, device)


@functools.lru_cache(maxsize=3)
def _filled_once(name: str, latent: int, device: torch.device) -> Denoiser:
    """A scale's three models are kept."""
    overrides: dict[str, Any] = {"input_size": latent} if latent else {}
    with device:
        model = create_model(name, fused=False, **overrides).to(device)
    # Large models take a CPU half a minute: on a GPU they are filled there, with that device's numbers.
    fill_(model, normal=functools.partial(_device_normal, device) if device.type == "cuda" else named_normal)
    return model.eval()


def _device_normal(device: torch.device, name: str, shape: tuple[int, ...]) -> Tensor:
    """As reference.weights.named_normal, by a device's own generator."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device)


class PointwiseLinear(nn.Module):
    """A 1x1 convolution as a Linear over the channels of channels_last memory."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(conv.weight.detach().flatten(1)), conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H, W)."""
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


def with_linear_pointwise(model: nn.Module) -> nn.Module:
    """The model with each 1x1 convolution replaced by a PointwiseLinear, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1):
                setattr(parent, name, PointwiseLinear(child))
    return model


class PinnedAttention(nn.Module):
    """DiT's attention on one backend of scaled_dot_product_attention.

    The choice is made inside forward, so that it is part of what torch.compile traces and caches by: around the
    compiled call it would be ignored, and every choice would run what the first one compiled.
    """

    def __init__(self, attention: Attention, backend: str) -> None:
        super().__init__()
        self.attention, self.backend = attention, getattr(SDPBackend, backend)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, D) -> (N, T, D)."""
        with sdpa_kernel(self.backend):
            return self.attention(x)


def with_pinned_attention(model: nn.Module, backend: str) -> nn.Module:
    """The model with each Attention on one backend of SDPBackend, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention) and not isinstance(parent, PinnedAttention):
                setattr(parent, name, PinnedAttention(child, backend))
    return model


def _inputs(arena: ModelArena, index: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """One input set: latents, and a timestep and a label for each image."""
    side, generator = arena.resolution // 8, torch.Generator().manual_seed(index)
    x = torch.randn(arena.batch, channels, side, side, generator=generator)
    images = torch.arange(arena.batch)
    return x, (images * 389 + 500) % 1000, (images * 207 + 7) % 1000


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compiled(fn: Any, device: torch.device, default: bool = False) -> Any:
    """torch.compile at its best on a device, or, where asked for, in its default mode; see ``frozen``."""
    # max-autotune tries many GEMM tilings and uses CUDA graphs; Inductor's CPU code has nothing like it to try.
    # Caches on disk are left out, or a second run would report the time of reading them as compile time.
    torch.compiler.config.force_disable_caches = True
    return torch.compile(fn) if default or device.type == "cpu" else torch.compile(fn, mode="max-autotune")


@contextmanager
def frozen(freeze: bool) -> Iterator[None]:
    """Inductor may fold and repack weights: what a user who only samples would ask for."""
    from torch._inductor import config

    before, config.freezing = config.freezing, freeze
    try:
        yield
    finally:
        config.freezing = before


# Who multiplies in a fused contender's branches: the rule, whatever was measured; what is named; or what tune finds.
_PRODUCTS = dict.fromkeys(("fused", "packed", "fused_recompute"), "rule") | {
    "fused_mixed": "mixed",
    "fused_tuned": "tuned",
}


def model_contender(arena: ModelArena, name: str, how: str, device: torch.device) -> Contender:
    """A model of an arena, ready to run one inference call or training step.

    ``how``: eager, channels_last, fused (dico_kernels.fuse), each of them with ``_graph`` (a GraphRunner's CUDA graph);
    fused_mixed (with products="mixed"), fused_tuned (after dico_kernels.tune, whose seconds stand for compiling's),
    fused_recompute (fuse's recompute, in training);
    packed (fused, and dico_kernels.pack); compile (max-autotune on a GPU, weights frozen on a CPU), compile_default,
    compile_linear, compile_flash, compile_cudnn.
    """
    graphed, how = how.endswith("_graph"), how.removesuffix("_graph")
    products = _PRODUCTS.get(how)
    recompute = how.endswith("_recompute")
    how = how.removesuffix("_mixed").removesuffix("_tuned").removesuffix("_recompute")
    source = _filled(name, arena.resolution // 8, device)
    training, dtype = arena.mode == "training", DTYPES[arena.dtype]
    model: nn.Module = copy.deepcopy(source)
    weights = torch.float32 if training else dtype
    layout = torch.contiguous_format if how == "eager" or name.startswith("DiT") else torch.channels_last
    if how == "compile_linear":
        model = with_linear_pointwise(model)
    elif how in _SDPA:
        model = with_pinned_attention(model, _SDPA[how])
    elif how in ("fused", "packed"):
        model = fuse(model, recompute=recompute)
    model = model.to(dtype=weights).to(memory_format=layout).train(training)  # type: ignore[call-overload]
    if how == "packed":
        pack(model)
    one = arena.batch * source.in_channels * (arena.resolution // 8) ** 2 * 4
    sets = [
        tuple(
            v.to(device, weights, memory_format=layout) if v.is_floating_point() else v.to(device)
            for v in _inputs(arena, index, source.in_channels)
        )
        for index in range(max(1, min(_MAX_SETS, _L2_BYTES // one)))
    ]
    forward: Any = compiled(model, device, how == "compile_default") if how.startswith("compile") else model
    runner = forward = GraphRunner(model) if graphed else forward
    freeze = how == "compile" and device.type == "cpu" and not training
    guards = functools.partial(_guards, arena.dtype, training, device, freeze, products)
    step = _training_step(forward, model, source.out_channels, guards) if training else None

    def run(i: int) -> Tensor:
        inputs = sets[i % len(sets)]
        if step is not None:
            return step(*inputs)
        with torch.inference_mode(), guards():
            out: Tensor = forward(*inputs)
        return out

    first = timed(lambda: tune(run, 0, keep=False) if products == "tuned" else run(0), device)
    if graphed and (refused := [row.reason for row in runner.explain() if row.how != "graph"]):
        raise RuntimeError(f"no CUDA graph: {refused[0]}")
    side = arena.resolution // 8
    error = None
    if not training:
        count = min(arena.batch, _CHECKED_IMAGES)
        error = relative_error(run(0)[:count], _truth(name, side, arena.batch, count, device))
    return Contender(
        run,
        compile_s=first if how.startswith("compile") or products == "tuned" else None,
        error=error,
        macs=None if training else count_macs(source, side, side, arena.batch),
        moved=None if training else bytes_moved(source, side, side, arena.batch, weights.itemsize),
        graphed=graphed or (how.startswith("compile") and how != "compile_default" and device.type == "cuda"),
    )


@contextmanager
def _guards(dtype: str, training: bool, device: torch.device, freeze: bool, products: str | None) -> Iterator[None]:
    """The flags and contexts that a contender's calls run under. ``products``: of a fused model, see _PRODUCTS."""
    with ExitStack() as stack:
        stack.enter_context(precision(dtype))
        stack.enter_context(frozen(freeze))
        if products:  # on a GPU strictly: what fell back to plain PyTorch is no measurement of this package
            named = "auto" if products in ("rule", "tuned") else products
            stack.enter_context(backend("auto", strict=device.type == "cuda", products=named))
            if products != "tuned":
                stack.enter_context(ignored())
        if training and dtype == "bf16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        yield


def _training_step(
    forward: Any, model: nn.Module, channels: int, guards: Callable[[], Any]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0)

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with guards():
            out = forward(x, t, y)
            loss = F.mse_loss(out.float(), x.float().repeat(1, channels // x.shape[1], 1, 1))
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        # At the end: between its turns a contender holds no gradients.
        optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    return step


@functools.lru_cache(maxsize=6)
def _truth(name: str, side: int, batch: int, count: int, device: torch.device) -> Tensor:
    """The first images' outputs in float64, from the same float32 weights and inputs."""
    model = _filled(name, side, device)
    arena = ModelArena("S", side * 8, batch, "fp32")
    x, t, y = (v[:count].to(device) for v in _inputs(arena, 0, model.in_channels))
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        return exact(x.double(), t, y)


class ConvHalf(nn.Module):
    """The convolution half of a DiCo block on its own: (x, shift, scale, gate) -> x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = DiCoBlock(width, 1)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """X is (N, C, H, W)."""
        b = self.block
        h = reference.gelu(b.conv2(b.conv1(reference.adaln_modulate(x, shift, scale))))
        return reference.gated_residual(x, b.conv3(h * b.ca(h)), gate)


class AttentionHalf(nn.Module):
    """The attention half of a DiT block on its own, heads of 64: (x, shift, scale, gate) -> x, tokens (N, T, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width, width // 64)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """X is (N, T, D)."""
        return x + gate[:, None] * self.attn(adaln_tokens(x, shift, scale))


def half_contender(arena: HalfArena, op: str, how: str, device: torch.device) -> Contender:
    """One half of a block, ready to run."""
    n, c, side, dtype = arena.batch, arena.width, arena.side, DTYPES[arena.dtype]
    half: nn.Module = ConvHalf(c) if op == "conv_half" else AttentionHalf(c)
    fill_(half).eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, c, side, side, generator=generator)
    x = image if op == "conv_half" else image.flatten(2).transpose(1, 2).contiguous()
    vectors = [torch.randn(n, c, generator=generator) for _ in range(3)]
    with torch.inference_mode():
        truth = copy.deepcopy(half).double()(x[:1].double(), *(v[:1].double() for v in vectors))
    layout = torch.contiguous_format if how == "eager" or op != "conv_half" else torch.channels_last
    half = half.to(device, dtype).to(memory_format=layout)  # type: ignore[call-overload]
    args = [x.to(device, dtype, memory_format=layout), *(v.to(device, dtype) for v in vectors)]
    forward = compiled(half, device) if how == "compile" else half

    def run(i: int) -> Tensor:
        del i
        with torch.inference_mode(), precision(arena.dtype):
            out: Tensor = forward(*args)
        return out

    first = timed(lambda: run(0), device)
    weights = sum(p.numel() for name, p in half.named_parameters() if _is_used(name))
    return Contender(
        run,
        compile_s=first if how == "compile" else None,
        error=relative_error(run(0)[:1].cpu(), truth),
        macs=sum(count_macs_by_op(half, *args).values()),
        moved=dtype.itemsize * (_HALF_PASSES[op] * image.numel() + weights),
        graphed=how == "compile" and device.type == "cuda",
    )


def _is_used(name: str) -> bool:
    return not any(part in name for part in ("adaLN", "conv4", "conv5"))
