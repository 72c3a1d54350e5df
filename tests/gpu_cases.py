"""Units that the tests of ``bench gpu`` measure on the CPU, and stand-ins for what it measures."""

from __future__ import annotations

import time

import torch

from dico_kernels.benchmarks.gpu_plan import Unit
from dico_kernels.benchmarks.gpu_worker import Worker
from dico_kernels.benchmarks.harness import Contender
from dico_kernels.benchmarks.presets import ModelArena, OpArena

CPU = torch.device("cpu")
MACHINE = {"device": "a card", "kind": "cuda", "commit": "abc", "threads": 1, "build": {"torch": "2", "version": "0"}}


def op_unit(op="grn", contenders=("channels_last", "native"), backward=False):
    return Unit("kernels", OpArena(op, "S", 2, 8, 4, "fp32", backward, 2), tuple((op, c) for c in contenders))


def model_unit(*rows, resolution=64, rounds=2):
    return Unit("models", ModelArena("S", resolution, 2, "fp32", rounds=rounds), rows)


def sleeper(seconds):
    return Contender(lambda i: time.sleep(seconds), macs=10.0, moved=10.0)


def worker(store, plan, build, until=60.0, stage="models", **options):
    store.result["ceilings"] = {"fp32": {"flops": 1e9, "bytes": 1e9}}
    return Worker(stage, store, time.time() + until, CPU, plan=plan, build=build, say=lambda line: None, **options)
