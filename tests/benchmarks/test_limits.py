"""The roofline's arithmetic."""

from __future__ import annotations

import pytest
import torch

import dico_kernels as dk
from dico_kernels.benchmarks.limits import Ceiling, activation_elements, block_bytes, bytes_moved, measure_ceiling
from dico_kernels.reference import DiCoBlock
from dico_kernels.reference.macs import count_macs

# 790 TFLOP/s and 4.3 TB/s, bf16: images per second that no plan exceeds, at 256 and 512 pixels; worked out by hand
# from the layer list of each model, without this code.
H200 = Ceiling(790e12, 4.3e12)
LIMITS = {
    "DiCo-S": (61_877, 15_469),
    "DiCo-B": (23_434, 5_873),
    "DiCo-L": (6_565, 1_646),
    "DiCo-XL": (4_529, 1_136),
    "DiCo-H": (2_036, 510),
    "FCDM-S": (128_522, 32_199),
    "FCDM-B": (32_547, 8_154),
    "FCDM-L": (8_190, 2_052),
    "FCDM-XL": (6_121, 1_534),
    "DiT-S/2": (65_228, 12_565),
    "DiT-B/2": (17_170, 3_713),
    "DiT-L/2": (4_895, 1_094),
    "DiT-XL/2": (3_330, 753),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_by_hand(name):
    for side, expected in zip((32, 64), LIMITS[name], strict=True):
        with torch.device("meta"):
            model = dk.create_model(name, fused=False, **({"input_size": side} if name.startswith("DiT") else {}))
        seconds = H200.seconds(count_macs(model, side, side), 2 * activation_elements(model, side, side))
        assert 1 / seconds == pytest.approx(expected, rel=2e-3)


def test_weights_are_read_once_a_batch():
    with torch.device("meta"):
        model = dk.create_model("DiCo-S", fused=False)
    one, two = (bytes_moved(model, 32, 32, batch, 2) for batch in (1, 2))
    assert two - one == 2 * activation_elements(model, 32, 32)
    tables = 1001 * (128 + 256 + 512)
    assert 2 * one - two == 2 * (33_137_672 - tables)


@pytest.mark.parametrize(
    ("op", "passes", "weights"),
    [("dico_block", (14, 14 + 29), 13), ("fcdm_block", (11, 11 + 35), 9)],
)
def test_bytes_of_a_block_by_hand(op, passes, weights):
    image = 2 * 8 * 6 * 6
    assert block_bytes(op, 2, 8, 6, False, 2) == 2 * (passes[0] * image + weights * 64)
    assert block_bytes(op, 2, 8, 6, True, 2) == 2 * (passes[1] * image + 3 * weights * 64)


def test_the_better_of_two_measurements_counts():
    assert Ceiling(3.0, 2.0).best(Ceiling(1.0, 5.0)) == Ceiling(3.0, 5.0)


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="model is a DiCoBlock: expected a DiCo, FCDM or DiT"):
        activation_elements(DiCoBlock(8), 8, 8)


def test_measured_ceilings_are_of_this_world():
    found = measure_ceiling(torch.device("cpu"), torch.float32)
    assert 1e9 < found.flops < 1e14
    assert 1e8 < found.bytes < 1e13
