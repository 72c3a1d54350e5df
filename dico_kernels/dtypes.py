"""What every floor agrees on about dtypes and the precision they are multiplied in."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics, sums and reduced gradients are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# torch's older getters of the two settings below raise once the newer ones (torch.backends.fp32_precision and those
# under it) say what the older could not; the newer can be read in every state, whichever of the two was set.


def tf32_products() -> bool:
    """Whether torch may multiply float32 matrices in TF32 on a GPU."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return torch.get_float32_matmul_precision() != "highest" if precision is None else precision == "tf32"


def tf32_convolutions() -> bool:
    """Whether cuDNN may convolve float32 in TF32."""
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    return bool(torch.backends.cudnn.allow_tf32) if precision is None else precision == "tf32"
