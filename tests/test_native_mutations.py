"""The tests of the C++ kernels, tested: each planted bug must turn the test named beside it red.

One build holds all the bugs, for one instruction set and at -O1. So each lies in code of its own, and its test runs
no code with another bug in it.
"""

from __future__ import annotations

import shutil

import pytest
from support import ROOT, assert_noticed, cmake, copy_package, plant

# name: (file in csrc/cpu, source as it is, source with the bug, the test in tests/native that must notice)
BUGS = {
    "eps outside the root": (
        "adaln.h",
        "sqrt_of(variance + static_cast<A>(eps))",
        "(sqrt_of(variance) + static_cast<A>(eps))",
        "test_adaln.py::test_eps",
    ),
    "the first sample's gate": (
        "adaln.h",
        "static_cast<const T*>(a.gate) + image * a.gate_stride;\n        A* sums",
        "static_cast<const T*>(a.gate);\n        A* sums",
        "test_adaln.py::test_gated_residual",
    ),
    "attention's bias forgotten": (
        "attention.h",
        "(bias ? load(bias + r) : A{})",
        "A{}",
        "test_attention.py::test_against_float64 -k True",
    ),
    "last row of a block not summed": (
        "channel.h",
        "for (int64_t row = 0; row < rows; ++row)",
        "for (int64_t row = 0; row + 1 < rows; ++row)",
        "test_channel.py::test_sums_and_dots",
    ),
    "the first sample's second factor": (
        "channel.h",
        "static_cast<const A*>(a.r) + image * a.r_stride",
        "static_cast<const A*>(a.r)",
        "test_channel.py::test_affine",
    ),
    "what lies between two halves rounded up": (
        "convert.h",
        "0xfffu + ((magnitude >> 13) & 1u)",
        "0x1000u",
        "test_convert.py",
    ),
    "taps of dx not turned": (
        "depthwise.h",
        "taps[Flip ? K * K - 1 - (i * K + j) : i * K + j]",
        "taps[i * K + j]",
        "test_depthwise.py::test_against_float64 -k plain",
    ),
    "GELU's slope without its density": (
        "gelu.h",
        "tail - m * bell * kDensity",
        "tail - 0 * kDensity",
        "test_depthwise.py::test_gelu_is_exact_to_the_documented_error",
    ),
    "a product's bias forgotten behind a gate": (
        "gemm.h",
        "vload(residual + at, lanes) + by * (from[i * next] + plus)",
        "vload(residual + at, lanes) + by * from[i * next]",
        "test_gemm.py::test_against_float64 -k nothing-gate",
    ),
    "a weight's stride forgotten while it is packed": (
        "gemm.h",
        "copy_operand<T>(at, from + n * output_stride + k * input_stride);",
        "copy_operand<T>(at, from + n * output_stride + k);",
        "test_gemm.py::test_packed_weights_multiply_to_the_same_bits",
    ),
    "a pixel's right neighbour gathered from its left": (
        "gemm.h",
        "copy_operand<T>(right + c, from + 4 * c + 1);",
        "copy_operand<T>(right + c, from + 4 * c);",
        "test_pixel_shuffle.py::test_gathered_inside_the_product",
    ),
    "the gate's part of a scale's gradient forgotten": (
        "weight_gradient.h",
        "column += weighted * by;",
        "column += weighted;",
        "test_weight_gradient.py::test_of_products",
    ),
    "a group of samples put in the place of those before": (
        "weight_gradient.h",
        "if (begun) sum += vload(dweight + at, lanes);",
        "",
        "test_weight_gradient.py::test_plain",
    ),
    "the pixels after a chain's put in the place of those before": (
        "gemm.h",
        "Across ? sums[i * V + j] + sum[i][j] : sum[i][j]",
        "sum[i][j]",
        "test_weight_gradient.py::test_plain",
    ),
    "the first tile of a strip taken for each": (
        "weight_gradient.h",
        "dy + row % kStrip * kPair<T>, kStrip",
        "dy, kStrip",
        "test_weight_gradient.py::test_gated",
    ),
    "the sums of a column begun anew with each tile": (
        "weight_gradient.h",
        "row, count, row == first,",
        "row, count, true,",
        "test_weight_gradient.py::test_gated",
    ),
    "a wide gradient written as a narrow one": (
        "weight_gradient.h",
        "sizeof(T) < sizeof(A) && !a.wide",
        "sizeof(T) < sizeof(A)",
        "test_weight_gradient.py::test_wide",
    ),
    "a shift's part of a weight's gradient forgotten": (
        "weight_gradient.h",
        "if (ends && shift) sum += vload(shift + c0 + c, lanes) * by;",
        "",
        "test_weight_gradient.py::test_with_a_shift_and_a_bias -k 33",
    ),
    "the second of a pair of inputs packed twice": (
        "gemm.h",
        "__builtin_memcpy(&low, row + n, sizeof low);",
        "__builtin_memcpy(&low, row + input_stride + n, sizeof low);",
        "test_gemm.py::test_packed_weights_multiply_to_the_same_bits",
    ),
    "a weight's gradient added to what was there": (
        "weight_gradient.h",
        "if (n || a.add) gated",
        "if (n || !a.add) gated",
        "test_weight_gradient.py::test_of_products_written_with_a_bias",
    ),
    "the sigmoid's slope forgotten in channel attention": (
        "attention.h",
        "dlogits[i] = dattention[i] * s * (1 - s);",
        "dlogits[i] = dattention[i] * s;",
        "test_attention.py::test_gradients_against_float64",
    ),
    "the last part left out of a sum": (
        "sums.h",
        "for (int64_t p = 0; p < a.parts; ++p)",
        "for (int64_t p = 0; p + 1 < a.parts; ++p)",
        "test_sums.py::test_adds_up_and_rounds",
    ),
    "GRN's mean taken for constant": (
        "channel.h",
        "(load(gamma + c) * ds[c] / mean - shared) / norm[c]",
        "(load(gamma + c) * ds[c] / mean) / norm[c]",
        "test_channel.py::test_gradients_of_grn_scale",
    ),
    "the squares of what was not rounded yet": (
        "pointwise.h",
        "const vec_t<T> stored = vload(y + at, lanes);",
        "const vec_t<T> stored = vload(x + at, lanes);",
        "test_pointwise.py::test_gelu",
    ),
    "neighbours transposed": (
        "convolution.h",
        "i - half, right = Towards ? half - j : j - half;",
        "j - half, right = Towards ? half - j : i - half;",
        "test_convolution.py::test_patches_are_those_of_unfold",
    ),
    "neighbours' gradient turned": (
        "convolution.h",
        "down = Towards ? half - i :",
        "down = Towards ? i - half :",
        "test_convolution.py::test_their_gradient_is_that_of_fold",
    ),
    "gradient's sub-pixels transposed": (
        "pixel_shuffle.h",
        "up[4 * c + 1] = p1[c];\n                up[4 * c + 2] = p2[c];",
        "up[4 * c + 1] = p2[c];\n                up[4 * c + 2] = p1[c];",
        "test_pixel_shuffle.py::test_moves_elements_exactly",
    ),
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package with the extension built from sources that hold every bug."""
    work = tmp_path_factory.mktemp("planted")
    source, build, package = work / "source", work / "build", copy_package(work)
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    for file, line, bug, _ in BUGS.values():
        plant(source / "csrc" / "cpu" / file, line, bug)
    for library in package.glob("_C*"):
        library.unlink()
    options = ["-DDICO_CUDA=0", "-DDICO_ISAS=base", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG="]
    for args in (
        ["-S", source, "-B", build, *options, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}"],
        ["--build", build],
    ):
        done = cmake(*args)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return package


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_noticed(name, package):
    *_, tests = BUGS[name]
    assert_noticed(name, f"tests/native/{tests}", package)
