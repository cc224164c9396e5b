"""Builds csrc with CMake and ninja. All metadata is in pyproject.toml.

Environment: TRACE_KERNELS_CUDA=auto|on|off (default auto: built when nvcc is found). TRACE_KERNELS_CUDA_ARCHS: "all",
or architectures as CMake names them; by default those of the cards that are here, and without a card 90 and what newer
or older drivers compile for any card from 80 on. TRACE_KERNELS_BUILD_DIR: a folder whose objects are kept, so that only
what changed is compiled. Without one a finished module is kept in the user's cache, and found again for the same
sources, compilers and options.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
ALL_ARCHS, WITHOUT_A_CARD = "80;90;100", "90-real;80-virtual"
KEPT = 8  # modules in the cache


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        given = os.environ.get("TRACE_KERNELS_BUILD_DIR")
        if given:
            compile_into(Path(given), output)
            return
        cached = cache() / f"{key()}{output.suffix}"
        if cached.is_file():
            print(f"trace-kernels: the module of an earlier build is taken: {cached}")
            cached.touch()
        else:
            # A fresh folder: CMake's cache remembers the ninja of a build environment that pip has deleted.
            build = Path(self.build_temp).resolve() / "cmake"
            shutil.rmtree(build, ignore_errors=True)
            compile_into(build, output)
            keep(output, cached)
        if cached.is_file():
            output.parent.mkdir(parents=True, exist_ok=True)
            output.unlink(missing_ok=True)  # a process may have the old one open
            shutil.copy2(cached, output)


def compile_into(build: Path, output: Path) -> None:
    import pybind11

    build.mkdir(parents=True, exist_ok=True)
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None:
        raise RuntimeError("building trace-kernels needs cmake and ninja on PATH: pip install cmake ninja")
    configure = [
        cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DTRACE_KERNELS_CUDA={os.environ.get('TRACE_KERNELS_CUDA', 'auto')}",
        f"-DTRACE_KERNELS_CUDA_ARCHS={archs()}",
        f"-DTRACE_KERNELS_OUTPUT={output}",
    ]  # fmt: skip
    subprocess.run(configure, check=True)
    with subprocess.Popen([cmake, "--build", str(build)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("["):
                on_terminal(f"\rtrace-kernels: compiling {line.split(']')[0]}]  ")
    on_terminal("\n")
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)


def on_terminal(text: str) -> None:
    """Past pip, which shows nothing of a build before it has failed; nowhere without a terminal."""
    try:
        with open("/dev/tty", "w") as terminal:
            terminal.write(text)
    except OSError:
        pass


def archs() -> str:
    wanted = os.environ.get("TRACE_KERNELS_CUDA_ARCHS", "")
    if wanted:
        return ALL_ARCHS if wanted == "all" else wanted.replace(",", ";")
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        found = []
    cards = sorted({card.replace(".", "") for card in found if card.replace(".", "").isdigit()}, key=int)
    return ";".join(f"{card}-real" for card in cards if int(card) >= 80) or WITHOUT_A_CARD


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trace-kernels"


def key() -> str:
    """Of all that the module is made of."""
    import pybind11

    digest = hashlib.sha256()
    for path in sorted([ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    said = [version(os.environ.get("CXX", "c++")), platform.machine(), platform.libc_ver()]
    if os.environ.get("TRACE_KERNELS_CUDA") != "off":
        said += [archs(), version(os.environ.get("CUDACXX", "nvcc"))]
    said += [sysconfig.get_config_var("SOABI"), pybind11.__version__, os.environ.get("TRACE_KERNELS_CUDA", "auto")]
    said += [os.environ.get(name) for name in ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")]
    digest.update(repr(said).encode())
    return digest.hexdigest()[:32]


def version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def keep(output: Path, cached: Path) -> None:
    """Copies a finished module to the cache, where there is room for it, and lets the oldest ones go."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=cached.parent)
        os.close(handle)
        shutil.copy2(output, temporary)
        os.replace(temporary, cached)
        for old in sorted(cached.parent.glob(f"*{cached.suffix}"), key=lambda path: -path.stat().st_mtime)[KEPT:]:
            old.unlink()
    except OSError as error:
        print(f"trace-kernels: the module is not kept for a later build: {error}")


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
