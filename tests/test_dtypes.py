"""The precision of float32 products, as torch's older and newer settings have it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support import ROOT, run_python

from dico_kernels import dtypes

# What is set, then whether TF32 multiplies and whether it convolves. After most of the newer settings, the rows with
# fp32_precision, one of the older getters raises.
SETTINGS = [
    ("pass", False, True),
    ("torch.set_float32_matmul_precision('high')", True, True),
    ("torch.set_float32_matmul_precision('medium')", True, True),
    ("b.cuda.matmul.allow_tf32 = True", True, True),
    ("b.cudnn.allow_tf32 = False", False, False),
    ("b.fp32_precision = 'tf32'", True, True),
    ("b.cuda.matmul.fp32_precision = 'tf32'", True, True),
    ("b.cuda.matmul.fp32_precision = 'ieee'", False, True),
    ("b.fp32_precision = 'tf32'; b.cuda.matmul.fp32_precision = 'ieee'", False, True),
    ("b.cudnn.fp32_precision = 'tf32'; b.cudnn.conv.fp32_precision = 'ieee'", True, False),
    ("b.cudnn.conv.fp32_precision = 'ieee'", False, False),
]


def test_tf32_is_read_from_every_setting():
    """Each in a process of its own: torch cannot take back all of them."""
    code = (
        "import os, sys, torch, torch.backends as b\n"
        "from dico_kernels.dtypes import tf32_convolutions, tf32_products\n"
        "for setting in sys.argv[1:]:\n"
        "    if os.fork() == 0:\n"
        "        exec(setting)\n"
        "        print(int(tf32_products()), int(tf32_convolutions()), flush=True)\n"
        "        os._exit(0)\n"
        "    os.wait()"
    )
    done = run_python("-c", code, *[setting for setting, *_ in SETTINGS], cwd=ROOT.parent)
    assert done.stdout.splitlines() == [f"{products:d} {convolutions:d}" for _, products, convolutions in SETTINGS]


@pytest.mark.parametrize(("precision", "products"), [("highest", False), ("high", True)])
@pytest.mark.parametrize("convolutions", [False, True])
def test_tf32_is_read_from_a_torch_that_has_the_older_settings_alone(monkeypatch, precision, products, convolutions):
    backends = SimpleNamespace(
        cuda=SimpleNamespace(matmul=SimpleNamespace()), cudnn=SimpleNamespace(allow_tf32=convolutions)
    )
    old = SimpleNamespace(backends=backends, get_float32_matmul_precision=lambda: precision)
    monkeypatch.setattr(dtypes, "torch", old)
    assert dtypes.tf32_products() is products
    assert dtypes.tf32_convolutions() is convolutions
