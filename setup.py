"""Build of the native extension; everything else is declared in pyproject.toml.

csrc/ is plain C++ and CUDA bound with pybind11: it includes no torch header, so it builds inside pip's isolated
environment and the result survives a change of torch. CMake decides what is built (see CMakeLists.txt).

    DICO_KERNELS_CUDA=0|1      leave CUDA out | fail unless CUDA can be built (default: build it where nvcc works)
    DICO_KERNELS_CUDA_ARCHS    device code to build, e.g. "90a" (default: of 80, 90a, 100 those nvcc knows)
    MAX_JOBS                   compile jobs (default: one a core)
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION_FILE = ROOT / "dico_kernels" / "version.py"


def version() -> str:
    match = re.search(r'__version__ = "([^"]+)"', VERSION_FILE.read_text())
    assert match, f"no __version__ in {VERSION_FILE}"
    return match.group(1)


def device_code(library: Path) -> list[str]:
    """dico_kernels/fatbin.py, loaded by path: importing the package would need torch, which a build does not."""
    spec = importlib.util.spec_from_file_location("fatbin", ROOT / "dico_kernels" / "fatbin.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fatbin"] = module
    spec.loader.exec_module(module)
    return module.device_code(library)


def program(name: str) -> str | None:
    """Where cmake or ninja is: in the package that this build imports, else beside this Python; None if in neither.

    So a virtual environment need not be activated. Its folder does not go onto PATH: for a system's Python that is
    /usr/bin, whose compilers would come before those that were chosen.
    """
    try:
        folder = getattr(importlib.import_module(name), {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}[name])
    except (ImportError, AttributeError):
        folder = Path(sys.executable).parent
    return shutil.which(name, path=str(folder))


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        cuda = os.environ.get("DICO_KERNELS_CUDA", "auto")
        if cuda not in ("auto", "0", "1"):
            raise SystemExit(f"DICO_KERNELS_CUDA={cuda!r}: expected 0, 1 or unset")
        cmake = program("cmake") or "cmake"
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDICO_VERSION={version()}",
            f"-DDICO_CUDA={cuda.upper()}",
        ]  # fmt: skip
        if ninja := program("ninja"):
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        if archs := os.environ.get("DICO_KERNELS_CUDA_ARCHS"):
            configure.append(f"-DDICO_CUDA_ARCHS={archs}")
        build = [cmake, "--build", str(build_dir), "--target", "_C"]
        if jobs := os.environ.get("MAX_JOBS"):
            build += ["--parallel", jobs]
        # A cache left by an isolated build names a cmake, ninja and pybind11 that no longer exist.
        (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run(build, check=True)

        cache = (build_dir / "CMakeCache.txt").read_text()
        built_with_cuda = "DICO_BUILDS_CUDA:INTERNAL=ON" in cache
        archs_found = device_code(library)
        if built_with_cuda and not archs_found:
            raise SystemExit(f"{library.name} was built with CUDA but holds no device code; refusing to ship it")
        print(f"dico_kernels._C: device code for {', '.join(archs_found) or 'no GPU'}")


setup(
    version=version(),
    license="Apache-2.0",
    packages=[
        "dico_kernels",
        "dico_kernels.kernels",
        "dico_kernels.nn",
        "dico_kernels.ops",
        "dico_kernels.reference",
        "dico_kernels.benchmarks",
    ],
    package_dir={"dico_kernels.reference": "reference", "dico_kernels.benchmarks": "benchmarks"},
    package_data={"dico_kernels": ["py.typed", "aot_budgets.json"]},
    ext_modules=[Extension("dico_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
