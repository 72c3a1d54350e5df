"""The tests themselves, tested: each planted bug must turn one of them red.

Each case copies the package, changes one line of its source and runs the tests of that part against the copy.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT, copy_package, run_python

MODELS, OPS = "tests/reference/test_models.py", "tests/reference/test_functional.py"

# name: (file, line as it is, line with the bug, tests that must notice)
BUGS = {
    "tanh GELU": ("reference/functional.py", "F.gelu(x)", 'F.gelu(x, approximate="tanh")', MODELS),
    "erf GELU in DiT": ("reference/dit.py", 'nn.GELU(approximate="tanh")', "nn.GELU()", MODELS),
    "LayerNorm eps": ("reference/functional.py", "LN_EPS = 1e-6", "LN_EPS = 1e-5", OPS),
    "GRN eps": ("reference/functional.py", "GRN_EPS = 1e-6", "GRN_EPS = 1e-4", OPS),
    "no channel attention": ("reference/dico.py", "h * self.ca(h)", "h * 0.5", MODELS),
    "no channel attention bias": (
        "reference/dico.py",
        "h * self.ca(h)",
        "h * self.ca[2](self.ca[1](self.ca[0](h)) - self.ca[1].bias[:, None, None])",
        MODELS,
    ),
    "no channel attention bias in the op": (
        "reference/functional.py",
        "pointwise(x.mean((2, 3), keepdim=True), weight, bias)",
        "pointwise(x.mean((2, 3), keepdim=True), weight, None)",
        OPS,
    ),
    "GRN gamma ignored": ("reference/fcdm.py", "self.gamma, self.beta", "self.gamma * 0, self.beta", MODELS),
    "1 + scale": ("reference/functional.py", "(1 + per_channel(scale))", "per_channel(scale)", MODELS),
    "chunk order": (
        "reference/dico.py",
        "shift1, scale1, gate1, shift2",
        "scale1, shift1, gate1, shift2",
        MODELS,
    ),
    "concat order": ("reference/functional.py", "F.pixel_shuffle(up, 2), skip", "skip, F.pixel_shuffle(up, 2)", OPS),
    "concat order in DiCo": ("reference/dico.py", "self.up3_2(x), skip2", "skip2, self.up3_2(x)", MODELS),
    "sin before cos": ("reference/embed.py", "angles.cos(), angles.sin()", "angles.sin(), angles.cos()", MODELS),
    "position axes swapped": ("reference/embed.py", "[across, down]", "[down, across]", MODELS),
    "four guided channels": ("reference/base.py", "GUIDED_CHANNELS = 3", "GUIDED_CHANNELS = 4", MODELS),
    "a mask a table": (
        "reference/embed.py",
        'self.get_submodule(f"embedding_table_{level}")(y)',
        'self.get_submodule(f"embedding_table_{level}")(drop_labels(y, self.num_classes, self.dropout_prob))',
        MODELS,
    ),
    "adaLN not zeroed": ("reference/dico.py", "zero(m.adaLN_modulation)", "pass", MODELS),
}


@pytest.mark.parametrize("name", BUGS)
def test_bug_is_noticed(name, tmp_path):
    file, line, bug, tests = BUGS[name]
    target = copy_package(tmp_path).parent / "dico_kernels" / file
    source = target.read_text()
    assert source.count(line) >= 1, f"{line!r} is no longer in {file}: move the bug"
    target.write_text(source.replace(line, bug))
    done = run_python(
        "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "not test_macs", str(ROOT / tests),
        cwd=Path("/"), PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1, f"no test noticed: {name}\n{done.stdout[-2000:]}"
    assert "Error" in done.stdout


def test_the_copy_is_what_runs(tmp_path):
    """Else the bugs above would be noticed, or not, in the installed package."""
    package = copy_package(tmp_path)
    done = run_python(
        "-c", "import dico_kernels.reference as r; print(r.__file__)", cwd=Path("/"), PYTHONPATH=str(tmp_path)
    )
    assert done.stdout.strip() == str(package / "reference" / "__init__.py")
