"""The installation: what it says of itself is true, and what is missing costs no more than it says."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, cmake, copy_package, run_python

import dico_kernels as dk
from dico_kernels import info, native
from dico_kernels.fatbin import device_code

# Imports run one way; a floor knows only the floors before it. (info and the first floor are read by all.)
TOWER = [
    {"version", "fatbin", "dtypes", "_linear", "_graphs", "_sass", "_timing"},
    {"_memory", "_packed"},
    {"_extension"},
    {"_channel", "_gemm", "_vectors", "_weight_gradients"},
    {"_recording", "_winograd"},
    {"_convolution"},
    {"kernels", "native", "reference"},
    {"info"},
    {"ops"},
    {"nn"},
    {"_candidates"},
    {"_probe"},
    {"fuse", "packing"},
    {"explain"},
    {"models", "checkpoints", "sampling", "training", "tuning"},
    {"__init__"},
    {"benchmarks", "_aot_calls"},
    {"aot"},
    {"cli"},
    {"__main__"},
]


def floor(module: str) -> int:
    return next(i for i, names in enumerate(TOWER) if module in names)


def first_parts(path: Path, package: str) -> set[str]:
    """First name after dico_kernels of everything a file imports from the package."""
    found, modules = set(), set().union(*TOWER)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("dico_kernels.")}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                found.add(package)
            elif node.module == "dico_kernels":
                found |= {a.name if a.name in modules else "__init__" for a in node.names}
            elif (node.module or "").startswith("dico_kernels."):
                found.add(node.module.split(".")[1])
    return found


def test_imports_run_one_way():
    sources = {p: p.relative_to(ROOT / "dico_kernels").parts[0].removesuffix(".py") for p in
               (ROOT / "dico_kernels").rglob("*.py")}  # fmt: skip
    sources |= dict.fromkeys((ROOT / "reference").glob("*.py"), "reference")
    sources |= dict.fromkeys((ROOT / "benchmarks").glob("*.py"), "benchmarks")
    assert len(sources) > 15
    for path, module in sources.items():
        for imported in first_parts(path, module):
            lower = floor(imported) < floor(module) or imported == module
            assert lower, f"{path.name} ({module}) imports {imported}"


def test_build_info_is_json_and_true():
    built = dk.build_info()
    assert json.loads(json.dumps(built)) == built
    assert built["version"] == dk.__version__
    assert built["torch"] == torch.__version__
    assert built["native"]["isa"] == built["native"]["isas"][0]
    assert built["native"]["isas_compiled"][-1] == "base"
    assert set(built["native"]["isas"]) <= set(built["native"]["isas_compiled"])


def test_one_openmp_runtime():
    """The extension shares torch's thread pool; two runtimes would fight over the cores."""
    code = "import dico_kernels\nprint(*{l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'iomp' in l})"
    out = run_python("-c", code, cwd=Path("/")).stdout.split()
    if not dk.build_info()["native"]["openmp"]:
        pytest.skip("built without OpenMP")
    assert len(out) == 1


def test_device_code_is_what_nvidias_tool_finds():
    if not dk.build_info()["native"]["device_code"]:
        pytest.skip("built without CUDA")
    library = native.extension().__file__
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listed = subprocess.run([tool, "-lelf", "-lptx", library], capture_output=True, text=True, check=True).stdout
    expected = {f"sm_{arch}" for arch in re.findall(r"sm_(\w+)\.cubin", listed)}
    expected |= {f"compute_{arch}" for arch in re.findall(r"sm_(\w+)\.ptx", listed)}
    assert set(device_code(library)) == expected


def test_a_library_without_device_code_has_none():
    assert device_code(torch._C.__file__) == []


@pytest.fixture
def package_copy(tmp_path):
    return copy_package(tmp_path)


def run_copy(package_copy, code):
    return run_python("-c", code, cwd=Path("/"), PYTHONPATH=str(package_copy.parent))


def test_works_without_the_extension(package_copy):
    for library in package_copy.glob("_C*"):
        library.unlink()
    # Before an editable installation's finder, which would still find the extension where it was built.
    (package_copy / "_C.py").write_text("raise ImportError('not built')")
    code = (
        "import torch, dico_kernels as dk\n"
        "from dico_kernels import info, native\n"
        "dk.create_model('DiCo-S')\n"
        "print(info.render(dk.build_info()))\n"
        "x, v = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1)\n"
        "print(dk.ops.adaln_modulate(x, v, v).item(), dk.explain(dk.ops.adaln_modulate, x, v, v)[0].choice.backend)\n"
        "native.adaln_modulate(x, v, v, 1e-6)"
    )
    done = run_copy(package_copy, code)
    assert "native kernels: CPU and CUDA kernels cannot run: dico_kernels._C cannot be imported" in done.stdout
    assert "0.0 reference" in done.stdout
    assert done.returncode == 1
    assert "ImportError: dico_kernels._C cannot be imported" in done.stderr
    assert "pip install -e ." in done.stderr


def test_works_without_triton(package_copy):
    (package_copy.parent / "triton.py").write_text("raise ImportError('no triton here')")
    code = (
        "import torch, dico_kernels as dk; x, v = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1)\n"
        "print(dk.explain(dk.ops.adaln_modulate, x, v, v)[0].choice.backend)\n"
        "with dk.backend('triton', strict=True): dk.ops.adaln_modulate(x, v, v)"
    )
    done = run_copy(package_copy, code)
    assert done.stdout.strip() == "native"
    assert "BackendError" in done.stderr
    assert "Triton cannot be imported (no triton here)" in done.stderr


def test_what_is_missing_is_named_with_its_cost():
    full = {"native": {"openmp": True, "device_code": ["sm_90a"]}, "triton": "3.7.1", "gpu": "a card"}
    assert info.missing(full) == []
    bare = {"native": {"openmp": False, "device_code": [], "cuda": "no nvcc"}, "triton": None, "gpu": None}
    assert [name for name, _ in info.missing(bare)] == ["OpenMP", "CUDA kernels", "Triton", "GPU"]
    for _, cost in info.missing(bare):
        assert len(cost) > 20


@pytest.mark.parametrize("isa", native.isas())
def test_the_instruction_set_can_be_forced(isa):
    code = "import dico_kernels as dk; print(dk.build_info()['native']['isa'])"
    assert run_python("-c", code, cwd=Path("/"), DICO_KERNELS_CPU_ISA=isa).stdout.strip() == isa


def test_an_unknown_instruction_set_is_named():
    done = run_python("-c", "import dico_kernels", cwd=Path("/"), DICO_KERNELS_CPU_ISA="v9")
    assert "DICO_KERNELS_CPU_ISA='v9'" in done.stderr
    assert "accepted: " in done.stderr


class TestCommandLine:
    def run(self, *args):
        return run_python("-m", "dico_kernels", *args, cwd=Path("/"))

    def test_info(self):
        done = self.run("info")
        assert done.returncode == 0
        assert dk.__version__ in done.stdout
        assert json.loads(self.run("info", "--json").stdout) == dk.build_info()

    def test_help_has_examples(self):
        for args in ((), ("bench",), ("bench", "report")):
            assert "examples:" in self.run(*args, "--help").stdout

    def test_nothing_to_do_is_status_2(self):
        assert self.run().returncode == 2
        assert self.run("bench").returncode == 2
        assert self.run("levitate").returncode == 2


@pytest.mark.parametrize("packages", [True, False])
def test_builds_with_its_own_tools_in_an_environment_that_is_not_activated(tmp_path, packages):
    """With the packages that an isolated build installs; without them, with what lies beside this Python."""
    beside = [Path(sys.executable).with_name(name) for name in ("cmake", "ninja")]
    if not packages and not all(p.exists() for p in beside):
        pytest.skip("this environment has no cmake and ninja beside its Python")
    code = (
        "import json, runpy, subprocess, sys\n"
        f"if not {packages}: sys.modules.update(cmake=None, ninja=None)\n"
        "commands = []\n"
        "def run(command, check):\n"
        "    commands.append(command)\n"
        "    if '--build' in command: raise SystemExit(json.dumps(commands))\n"
        "subprocess.run, sys.argv = run, ['setup.py', 'build_ext', '--build-temp', sys.argv[1]]\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run_python("-c", code, str(tmp_path), cwd=ROOT, PATH="/nonexistent")
    configure, build = json.loads(done.stderr.splitlines()[-1])
    assert configure[0] == build[0]
    (ninja,) = [o.removeprefix(known) for o in configure if o.startswith(known := "-DCMAKE_MAKE_PROGRAM=")]
    for tool in (configure[0], ninja):
        assert Path(tool).is_absolute()
        assert packages or Path(tool).parent == Path(sys.executable).parent
        assert subprocess.run([tool, "--version"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "env", "said"),
    [
        (["-DDICO_CUDA=0"], {}, "CUDA: left out (DICO_KERNELS_CUDA=0)"),
        (["-DCMAKE_CUDA_COMPILER=NOTFOUND"], {}, "CUDA: no working nvcc was found at build time"),
    ],
)
def test_configures_without_cuda(tmp_path, options, env, said):
    done = cmake("-S", ROOT, "-B", tmp_path, *options, **env)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout


def test_cuda_demanded_and_absent_is_an_error(tmp_path):
    done = cmake("-S", ROOT, "-B", tmp_path, "-DDICO_CUDA=1", "-DCMAKE_CUDA_COMPILER=NOTFOUND")
    assert done.returncode != 0
    assert "Put nvcc on PATH" in " ".join(done.stderr.split())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("demanded", [False, True])
def test_nvcc_without_the_rest_of_its_toolkit_is_no_cuda(tmp_path, demanded):
    """Left out where CUDA is optional, an error where it is demanded; either way with the reason."""
    options = ["-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=1", *(["-DDICO_CUDA=1"] if demanded else [])]
    done = cmake("-S", ROOT, "-B", tmp_path, *options)
    assert (done.returncode != 0) == demanded, done.stderr
    reason = r"nvcc [\d.]+, whose toolkit has no static runtime \(cudart_static\)"
    said = " ".join((done.stderr if demanded else done.stdout).split())
    assert re.search(("DICO_KERNELS_CUDA=1, but " if demanded else "CUDA: ") + reason, said)
    assert ("DICO_BUILDS_CUDA:INTERNAL=OFF" in (tmp_path / "CMakeCache.txt").read_text()) == (not demanded)
