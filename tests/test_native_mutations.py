"""The tests of the C++ kernels, tested: each planted bug must turn the test named beside it red.

One build holds all the bugs, at -O1, each behind a switch of its own: a test runs with one of them on, and these tests
pass with none. It is for the baseline instruction set, and for what else a bug needs and the processor has.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import ROOT, assert_noticed, cmake, copy_package, plant, run_tests

from dico_kernels import native

SWITCH = "PLANTED"  # the environment variable that has the name of the bug to run with


@dataclass(frozen=True)
class Bug:
    """A wrong expression, or a wrong statement with its semicolon, in place of a right one in a file of csrc/cpu.

    test: what in tests/native must notice. around: enough of what surrounds the right one, {}, to find it. isa: the
    instruction set whose code it is in, if not all have it.
    """

    file: str
    right: str
    wrong: str
    test: str
    around: str = "{}"
    isa: str = "base"

    def plant(self, path: Path, on: str) -> None:
        """Put both into the source, the wrong one for where a condition holds."""
        if self.right.endswith(";"):
            both = f"{{ if ({on}) {{ {self.wrong} }} else {{ {self.right} }} }}"
        else:
            both = f"({on} ? ({self.wrong}) : ({self.right}))"
        plant(path, self.around.replace("{}", self.right), self.around.replace("{}", both))


BUGS = {
    "eps outside the root": Bug(
        "adaln.h",
        "sqrt_of(variance + static_cast<A>(eps))",
        "(sqrt_of(variance) + static_cast<A>(eps))",
        "test_adaln.py::test_eps",
    ),
    "the first sample's gate": Bug(
        "adaln.h",
        "static_cast<const T*>(a.gate) + image * a.gate_stride",
        "static_cast<const T*>(a.gate)",
        "test_adaln.py::test_gated_residual",
        around="{};\n        A* sums",
    ),
    "attention's bias forgotten": Bug(
        "attention.h",
        "(bias ? load(bias + r) : A{})",
        "A{}",
        "test_attention.py::test_against_float64 -k True",
    ),
    "last row of a block not summed": Bug(
        "channel.h",
        "row < rows",
        "row + 1 < rows",
        "test_channel.py::test_sums_and_dots",
        around="for (int64_t row = 0; {}; ++row)",
    ),
    "the first sample's second factor": Bug(
        "channel.h",
        "static_cast<const A*>(a.r) + image * a.r_stride",
        "static_cast<const A*>(a.r)",
        "test_channel.py::test_affine",
    ),
    "what lies between two halves rounded up": Bug(
        "convert.h",
        "0xfffu + ((magnitude >> 13) & 1u)",
        "0x1000u + (magnitude & 0u)",
        "test_convert.py",
    ),
    "taps of dx not turned": Bug(
        "depthwise.h",
        "taps[Flip ? K * K - 1 - (i * K + j) : i * K + j]",
        "taps[i * K + j]",
        "test_depthwise.py::test_against_float64 -k plain",
    ),
    "GELU's slope without its density": Bug(
        "gelu.h",
        "tail - m * bell * kDensity",
        "tail - 0 * kDensity",
        "test_depthwise.py::test_gelu_is_exact_to_the_documented_error",
    ),
    "a product's bias forgotten behind a gate": Bug(
        "gemm.h",
        "vload(residual + at, lanes) + by * (from[i * next] + plus)",
        "vload(residual + at, lanes) + by * from[i * next]",
        "test_gemm.py::test_against_float64 -k nothing-gate",
    ),
    "a weight's stride forgotten while it is packed": Bug(
        "gemm.h",
        "copy_operand<T>(at, from + n * output_stride + k * input_stride);",
        "copy_operand<T>(at, from + n * output_stride + k);",
        "test_gemm.py::test_packed_weights_multiply_to_the_same_bits",
    ),
    "a pixel's right neighbour gathered from its left": Bug(
        "gemm.h",
        "copy_operand<T>(right + c, from + 4 * c + 1);",
        "copy_operand<T>(right + c, from + 4 * c);",
        "test_pixel_shuffle.py::test_gathered_inside_the_product",
    ),
    "the gate's part of a scale's gradient forgotten": Bug(
        "weight_gradient.h",
        "column += weighted * by;",
        "column += weighted;",
        "test_weight_gradient.py::test_of_products",
    ),
    "a group of samples put in the place of those before": Bug(
        "weight_gradient.h",
        "if (begun) sum += vload(dweight + at, lanes);",
        "",
        "test_weight_gradient.py::test_plain",
    ),
    "the pixels after a chain's put in the place of those before": Bug(
        "gemm.h",
        "Across ? sums[i * V + j] + sum[i][j] : sum[i][j]",
        "sum[i][j]",
        "test_weight_gradient.py::test_plain",
    ),
    "the first tile of a strip taken for each": Bug(
        "weight_gradient.h",
        "dy + row % kStrip * kPair<T>",
        "dy",
        "test_weight_gradient.py::test_gated",
        around="{}, kStrip",
    ),
    "the sums of a column begun anew with each tile": Bug(
        "weight_gradient.h",
        "row == first",
        "true",
        "test_weight_gradient.py::test_gated",
        around="row, count, {},",
    ),
    "a wide gradient written as a narrow one": Bug(
        "weight_gradient.h",
        "sizeof(T) < sizeof(A) && !a.wide",
        "sizeof(T) < sizeof(A)",
        "test_weight_gradient.py::test_wide",
    ),
    "a shift's part of a weight's gradient forgotten": Bug(
        "weight_gradient.h",
        "if (ends && shift) sum += vload(shift + c0 + c, lanes) * by;",
        "",
        "test_weight_gradient.py::test_with_a_shift_and_a_bias -k 33",
    ),
    "the second of a pair of inputs packed twice": Bug(
        "gemm.h",
        "__builtin_memcpy(&low, row + n, sizeof low);",
        "__builtin_memcpy(&low, row + input_stride + n, sizeof low);",
        "test_gemm.py::test_packed_weights_multiply_to_the_same_bits",
        isa="v4bf16",
    ),
    "a weight's gradient added to what was there": Bug(
        "weight_gradient.h",
        "n || a.add",
        "n || !a.add",
        "test_weight_gradient.py::test_of_products_written_with_a_bias",
        around="if ({}) gated",
    ),
    "the sigmoid's slope forgotten in channel attention": Bug(
        "attention.h",
        "dlogits[i] = dattention[i] * s * (1 - s);",
        "dlogits[i] = dattention[i] * s;",
        "test_attention.py::test_gradients_against_float64",
    ),
    "the last part left out of a sum": Bug(
        "sums.h",
        "p < a.parts",
        "p + 1 < a.parts",
        "test_sums.py::test_adds_up_and_rounds",
        around="for (int64_t p = 0; {}; ++p)",
    ),
    "GRN's mean taken for constant": Bug(
        "channel.h",
        "(load(gamma + c) * ds[c] / mean - shared) / norm[c]",
        "(load(gamma + c) * ds[c] / mean) / norm[c]",
        "test_channel.py::test_gradients_of_grn_scale",
    ),
    "the squares of what was not rounded yet": Bug(
        "pointwise.h",
        "vload(y + at, lanes)",
        "vload(x + at, lanes)",
        "test_pointwise.py::test_gelu",
        around="stored = {};",
    ),
    "the last element of a tile's second output forgotten": Bug(
        "winograd.h",
        "m[distance] - m[2 * distance] - m[3 * distance]",
        "m[distance] - m[2 * distance]",
        "test_winograd.py::test_each_tap_at_each_border",
    ),
    "a tap's sign lost in a transformed weight": Bug(
        "winograd.h",
        "(a - b + c) / 2",
        "(a + b + c) / 2",
        "test_winograd.py::test_against_float64",
    ),
    "the first of a panel's blocks of inputs packed for each": Bug(
        "winograd.h",
        "(panel + n + i) * a.output_stride + c * a.input_stride",
        "(panel + n + i) * a.output_stride",
        "test_winograd.py::test_against_float64",
    ),
    "a tile's first element multiplied for each": Bug(
        "winograd.h",
        "packed + e * a.channels * vectors * L",
        "packed",
        "test_winograd.py::test_against_float64",
    ),
    "a border's sign lost in a transformed gradient": Bug(
        "winograd_gradient.h",
        "to[3 * distance] = -b;",
        "to[3 * distance] = b;",
        "test_winograd.py::test_weight_gradient",
    ),
    "a weight's gradient without a tile's last element": Bug(
        "winograd_gradient.h",
        "sum + u[3 * distance]",
        "sum",
        "test_winograd.py::test_weight_gradient",
    ),
    "a block's products in place of the sum so far": Bug(
        "winograd_gradient.h",
        "first > 0",
        "0",
        "test_winograd.py::test_weight_gradient",
        around="product.add = {};",
    ),
    "a neighbour's gradient for what is past the edge": Bug(
        "winograd_gradient.h",
        "h < a.height && w < a.width",
        "h < a.height",
        "test_winograd.py::test_weight_gradient",
    ),
    "neighbours transposed": Bug(
        "convolution.h",
        "i * a.k + j",
        "j * a.k + i",
        "test_convolution.py::test_patches_are_those_of_unfold",
        around="body({}, down",
    ),
    "neighbours' gradient turned": Bug(
        "convolution.h",
        "Towards ? half - i : i - half",
        "i - half",
        "test_convolution.py::test_their_gradient_is_that_of_fold",
        around="down = {},",
    ),
    "gradient's sub-pixels transposed": Bug(
        "pixel_shuffle.h",
        "up[4 * c + 1] = p1[c];\n                up[4 * c + 2] = p2[c];",
        "up[4 * c + 1] = p2[c];\n                up[4 * c + 2] = p1[c];",
        "test_pixel_shuffle.py::test_moves_elements_exactly",
    ),
}

# Read once, as a build without the switch would have the bug or not.
READ_SWITCH = f"""#include <stdlib.h>
#include <string.h>
static const char* const planted = getenv("{SWITCH}") ? getenv("{SWITCH}") : "";
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package with the extension built from sources that hold every bug."""
    work = tmp_path_factory.mktemp("planted")
    source, build, package = work / "source", work / "build", copy_package(work)
    kernels = source / "csrc" / "cpu"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    switches = ""
    for i, (name, bug) in enumerate(BUGS.items()):
        bug.plant(kernels / bug.file, f"planted_{i}")
        switches += f'static const bool planted_{i} = !strcmp(planted, "{name}");\n'
    plant(kernels / "kernels.cpp", "#include <stddef.h>\n", f"#include <stddef.h>\n{READ_SWITCH}{switches}")
    for library in package.glob("_C*"):
        library.unlink()
    isas = sorted({bug.isa for bug in BUGS.values()} & set(native.isas()))
    options = ["-DDICO_CUDA=0", f"-DDICO_ISAS={';'.join(isas)}", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG="]
    for args in (
        ["-S", source, "-B", build, *options, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}"],
        ["--build", build],
    ):
        done = cmake(*args)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return package


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_noticed(name, package):
    bug = BUGS[name]
    if bug.isa not in native.isas():
        pytest.skip(f"{bug.isa} does not run on this processor, which has {', '.join(native.isas())}")
    assert_noticed(name, f"tests/native/{bug.test}", package, **{SWITCH: name})


def test_nothing_is_noticed_without_a_bug(package):
    """Else a test could be red for how bugs are planted."""
    tests = {bug.test.partition(" -k ")[0] for bug in BUGS.values()}
    done = run_tests(package, *sorted(f"tests/native/{test}" for test in tests))
    assert done.returncode == 0, done.stdout[-2000:]
