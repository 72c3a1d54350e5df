"""Started by test_fuse_runs.py: two gloo processes train one step of a fused model, sharded as told."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

import dico_kernels as dk


def step(model, inputs):
    out = model(*inputs)
    out.square().mean().backward()
    return out.detach()


def refusal(action, model):
    try:
        action(model)
    except RuntimeError as error:
        return str(error)
    return "not refused"


def leave() -> NoReturn:
    """End a process in which everything held.

    Not by way of the interpreter's end: FSDP's meshes keep the process group alive until then, and gloo's threads may
    find no interpreter. Once, with all else passing, a process aborted ("terminate called without an active
    exception", CPython 3.11, torch 2.13), and not again in 34 runs under load.
    """
    print("as one process", flush=True)
    dist.barrier()  # who leaves first takes the other's connections down with it
    os._exit(0)


def work(rank: int, name: str, mode: str, store: str) -> None:
    from test_fuse import hard, rel_rms
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    alone, inputs = hard(name)
    inputs = tuple(v[:2] for v in inputs)
    step(alone, inputs)
    expected = {n: p.grad for n, p in alone.named_parameters()}

    model, _ = hard(name)
    mine = tuple(v[rank : rank + 1] for v in inputs)
    blocks = [m for m in model.modules() if type(m).__name__ in ("DiCoBlock", "FCDMBlock")]
    assert blocks
    if mode == "dtensor-then-fuse":
        distribute_module(blocks[0], init_device_mesh("cpu", (2,)))
        said = refusal(dk.fuse, model)
        assert "is a DTensor: fuse before wrapping" in said, said
        leave()
    if mode == "ddp-then-fuse":
        model = dk.fuse(DistributedDataParallel(model))
    elif mode == "ddp":
        model = DistributedDataParallel(dk.fuse(model))
    else:
        if mode != "fsdp-then-fuse":
            dk.fuse(model)
        for block in blocks:
            if mode == "fsdp-inner":
                fully_shard(block.conv4)
            fully_shard(block)
        fully_shard(model)
        if mode in ("fsdp-then-fuse", "fsdp-then-unfuse"):
            said = refusal(dk.fuse if mode == "fsdp-then-fuse" else dk.unfuse, model)
            assert ("fuse before wrapping" if mode == "fsdp-then-fuse" else "unfuse before") in said, said
    fused = sum(v.fused for v in dk.explain(model).modules)
    ends = 2 if name == "DiCo" else 1  # the final layer, and the model if it is ours
    wanted = {"fsdp-inner": ends, "fsdp-then-fuse": 0}.get(mode, len(blocks) + ends)
    assert fused == wanted, (fused, wanted, str(dk.explain(model)))
    step(model, mine)
    for key, p in model.named_parameters():
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        error = rel_rms(gradient, expected[key.removeprefix("module.")])
        assert error < 1e-4 or expected[key.removeprefix("module.")].norm() < 1e-9, (key, error)
    leave()


if __name__ == "__main__":
    mp.spawn(work, sys.argv[1:], nprocs=2)
