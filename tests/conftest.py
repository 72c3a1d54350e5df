from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a Triton kernel is decorated, so it has to be there before any test file imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# cuDNN's convolutions may use TF32 by default: the reference would then be further from float64 than the budgets allow.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
