"""When kernels wake other threads: for work that pays for it, and never for less."""

from __future__ import annotations

import json
from pathlib import Path

from support import run_python

from dico_kernels import native

# Prints, for a kernel of each parallel loop, how often other threads than the caller's woke or slept while it ran on
# small images, and on a large one. Idle threads sleep here, so a count of zero shows that none was woken.
WATCHED = """
import json, os, sys, time
from pathlib import Path
import torch
from dico_kernels import native
from dico_kernels._extension import call

def switches():
    me, total = os.getpid(), 0
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != me:
            lines = (task / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return total

def woken():
    # once all of them sleep
    before, found = None, switches()
    while found != before:
        time.sleep(0.05)
        before, found = found, switches()
    return found

def kernels(c, size):
    x = torch.randn(1, c, size, size).contiguous(memory_format=torch.channels_last)
    y, gate, weight = x.clone(), torch.randn(1, c), torch.randn(c, c)
    sums, bias, taps, table = torch.randn(1, c), torch.randn(c), torch.randn(c, 1, 3, 3), torch.randn(1, c, c)
    h, mean, rstd = native.adaln_modulate(x, gate, gate)
    up, skip, cat = (torch.randn(size * size * channels) for channels in (4 * c, 4 * c, 8 * c))
    added = torch.zeros(c, c)
    return {
        "adaln_modulate": lambda: native.adaln_modulate(x, gate, gate),
        "adaln_modulate_backward": lambda: native.adaln_modulate_backward(y, x, gate, mean, rstd),
        "gated_residual": lambda: native.gated_residual(x, y, gate),
        "channel_sums": lambda: native.channel_sums(x),
        "channel_affine": lambda: native.channel_affine(x, sums),
        "depthwise": lambda: native.depthwise(x, taps, bias, True),
        "depthwise_backward": lambda: native.depthwise_backward(y, x, taps, bias, True),
        "gelu": lambda: native.gelu(x, True),
        "gated_products": lambda: native.gated_products(table, weight, gate, sums, added),
        "weight_gradient": lambda: native.weight_gradient(*(v.flatten(2).mT for v in (y, x)), weight, gate, sums),
        "pointwise": lambda: native.pointwise(x, weight, bias),
        "shuffle_gather": lambda: call("shuffle_gather", up, up, skip, cat, size, size, c, c),
        "shuffle_scatter": lambda: call("shuffle_scatter", up, up, skip, cat, size, size, c, c),
        "channel_attention": lambda: native.channel_attention(sums, 9, weight, bias),
        "channel_attention_backward": lambda: native.channel_attention_backward(sums, sums, sums, 9, weight),
        "conditioning": lambda: native.conditioning(gate, [weight], [bias]),
        "add_up": lambda: native.add_up([table], torch.float32),
    }

torch.set_num_threads(3)
found = {}
for name, large in kernels(384, 16).items():
    small = kernels(32, 8)[name]
    large()  # the threads exist from here on
    before = woken()
    for _ in range(5):
        small()
    between = woken()
    large()
    found[name] = between - before, woken() - between
print(json.dumps(found))
"""


def test_small_images_wake_no_thread(tmp_path: Path):
    done = run_python("-c", WATCHED, cwd=tmp_path, OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 17
    assert {name for name, (small, _) in found.items() if small} == set()
    # without OpenMP kernels know one thread only
    assert {name for name, (_, large) in found.items() if large} == (set(found) if native.build()["openmp"] else set())


def test_the_limit_is_restored():
    before = native.extension().grain()
    with native.grain(5):
        assert native.extension().grain() == 5
    assert native.extension().grain() == before
