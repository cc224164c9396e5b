"""Builds csrc with CMake and ninja. All metadata is in pyproject.toml.

Environment: TRACE_KERNELS_CUDA=auto|on|off (default auto: built when nvcc is found),
TRACE_KERNELS_CUDA_ARCHS (default "80;90;100"), TRACE_KERNELS_BUILD_DIR (default: a temporary folder).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # A fresh folder by default: CMake's cache remembers the ninja of a build environment that pip has deleted.
        build = Path(os.environ.get("TRACE_KERNELS_BUILD_DIR") or Path(self.build_temp).resolve() / "cmake")
        if "TRACE_KERNELS_BUILD_DIR" not in os.environ:
            shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True, exist_ok=True)
        cmake = shutil.which("cmake")
        ninja = shutil.which("ninja")
        if cmake is None or ninja is None:
            raise RuntimeError("building trace-kernels needs cmake and ninja on PATH: pip install cmake ninja")
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTRACE_KERNELS_CUDA={os.environ.get('TRACE_KERNELS_CUDA', 'auto')}",
            f"-DTRACE_KERNELS_OUTPUT={output}",
        ]  # fmt: skip
        if archs := os.environ.get("TRACE_KERNELS_CUDA_ARCHS"):
            configure.append(f"-DTRACE_KERNELS_CUDA_ARCHS={archs}")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)


def packages() -> "dict[str, str]":
    """Both import packages, subpackages included, and the folder of each."""
    found = {}
    for root in (ROOT / "trace_kernels", ROOT / "python" / "trace_unlearn"):
        for init in sorted(root.rglob("__init__.py")):
            folder = init.parent
            name = ".".join((root.name, *folder.relative_to(root).parts))
            found[name] = folder.relative_to(ROOT).as_posix()
    return found


setup(
    packages=list(packages()),
    package_dir={"trace_kernels": "trace_kernels", "trace_unlearn": "python/trace_unlearn"},
    package_data={
        "trace_kernels": ["py.typed", "VERSION"],
        "trace_unlearn": ["py.typed", "integrations/*/configs/*/*.yaml"],
    },
    ext_modules=[Extension("trace_kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
