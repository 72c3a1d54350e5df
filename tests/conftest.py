from __future__ import annotations

import os

import pytest
import torch

if torch.cuda.is_available():
    if os.environ.get("TRITON_INTERPRET", "").lower() not in ("", "0", "false", "off", "no"):
        raise pytest.UsageError("TRITON_INTERPRET is set, and there is a GPU to test on: unset it")
else:
    # Read when a Triton kernel is decorated, so it has to be there before any test file imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# cuDNN's convolutions may use TF32 by default: the reference would then be further from float64 than the budgets allow.
torch.backends.cudnn.allow_tf32 = False
# Some tests ask the reference, too, for the same bits twice.
torch.backends.cudnn.deterministic = True


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
