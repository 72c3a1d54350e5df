from __future__ import annotations

import pytest
from gpu_cases import MACHINE

from dico_kernels.benchmarks.gpu_store import Store


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path / "gpu.json", MACHINE)


@pytest.fixture
def small_clone(tmp_path):
    root = tmp_path / "clone"
    (root / "tests").mkdir(parents=True)
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (root / "tests" / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(6))\n"
        "def test_good(i): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_native(): assert 0\n"
        "def test_skipped(): pytest.skip('no')\n"
    )
    return root
