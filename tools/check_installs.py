"""Builds the sdist and the wheel, checks what they hold, installs both away from the source tree and runs them.

    python tools/check_installs.py

The interpreter that runs this has the requirements of [train]: the short demo runs from the sdist and from the wheel,
neither of which brings a requirement along. The other interpreters that are there, of Python 3.10 to 3.13, build from
the sdist, too, without CUDA: they load the compiled module, print the command's help, and run the short demo where
torch and the rest are there for them; where they are not, the command must name the install line. Where nvcc is on
PATH, the wheel must hold the CUDA kernels. No build may bring torch.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
CONFIG = "trace_unlearn/integrations/open_unlearning/configs/trainer/TraceNPO.yaml"
LOAD = """
import glob, importlib.util, sys
path, = glob.glob(sys.argv[1] + "/trace_kernels/_native*")
spec = importlib.util.spec_from_file_location("trace_kernels._native", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(sys.version.split()[0], module.build_info())
"""


def main() -> None:
    ran = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with timed("sdist"):
            sdist = source_distribution(folder)
        with timed("wheel"):
            wheel = build_wheel(sys.executable, sdist, folder / "wheel")
            check_contents(wheel)
        for name, package in {"wheel": wheel, "sdist": sdist}.items():
            with timed(f"installed from the {name}: demo --quick"):
                installed = install(sys.executable, package, folder / f"from_{name}")
                check_module(installed)
                demo(sys.executable, installed, folder / f"demo_{name}")
            ran.append(f"{name} on {sys.version.split()[0]}")
        for version in VERSIONS:
            if version == f"{sys.version_info.major}.{sys.version_info.minor}":
                continue
            python = interpreter(version)
            if python is None:
                print(f"Python {version}: not here")
                continue
            with timed(f"Python {version}"):
                # CUDA is the same code whatever the interpreter, and the longest part of a build.
                built = build_wheel(python, sdist, folder / version, TRACE_KERNELS_CUDA="off")
                does = smoke(python, install(python, built, folder / f"lib{version}"), folder / f"demo{version}")
            ran.append(f"sdist on {version} ({does})")
    print("right:", "; ".join(ran))


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.time()
    yield
    print(f"{what}: {time.time() - began:.0f} s", flush=True)


def interpreter(version: str) -> str | None:
    """One that runs, with pip and the headers that a build needs."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    check = "import os, pip, sysconfig; assert os.path.exists(sysconfig.get_path('include') + '/Python.h')"
    for path in [*map(str, pyenv), shutil.which(f"python{version}")]:
        if path and subprocess.run([path, "-c", check], capture_output=True, check=False).returncode == 0:
            return path
    return None


def source_distribution(folder: Path) -> Path:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder]
    run(command, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for expected in ("CMakeLists.txt", "csrc/module.cpp", f"python/{CONFIG}", "LICENSE", "README.md"):
        assert expected in names, f"{sdist.name} lacks {expected}"
    return sdist


def build_wheel(python: str, sdist: Path, folder: Path, **variables: str) -> Path:
    log = run([python, "-m", "pip", "wheel", "-v", "--no-deps", "-w", folder, sdist], **variables)
    assert "Collecting torch" not in log, "the isolated build pulls torch"
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for expected in ("trace_kernels/__init__.py", "trace_unlearn/__init__.py", "trace_kernels/py.typed", CONFIG):
        assert expected in names, f"{wheel.name} lacks {expected}"
    assert any(name.startswith("trace_kernels/_native") for name in names), "the compiled module is missing"
    for name in names:
        allowed = name.startswith(("trace_kernels/", "trace_unlearn/")) or ".dist-info/" in name
        assert allowed, f"{wheel.name} holds {name}"
        assert not name.endswith((".cpp", ".cu", ".h", ".cuh")), f"{wheel.name} holds a source: {name}"
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files")


def install(python: str, package: Path, folder: Path) -> Path:
    run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-warn-conflicts", "--target", folder, package])
    return folder


def check_module(installed: Path) -> None:
    listing = run([sys.executable, "-m", "trace_kernels"], cwd=installed.parent, path=installed)
    assert "compiled module: C++" in listing, f"the compiled module does not load:\n{listing}"
    if shutil.which("nvcc") and os.environ.get("TRACE_KERNELS_CUDA") != "off":
        assert "; CUDA " in listing, f"nvcc is here, and the CUDA kernels were not built:\n{listing}"


def demo(python: str, installed: Path, output: Path) -> None:
    where = "import sys, trace_unlearn, trace_kernels; print(trace_unlearn.__file__, trace_kernels.__file__)"
    files = run([python, "-c", where], cwd=installed.parent, path=installed).split()
    assert all(Path(file).is_relative_to(installed) for file in files), f"not what was installed runs: {files}"
    said = run([python, "-m", "trace_unlearn", "demo", "--quick", "--output", output], installed.parent, installed)
    assert (output / "report.html").is_file(), said[-2000:]


def smoke(python: str, installed: Path, output: Path) -> str:
    """What could be done without the requirements that are not there."""
    print(run([python, "-c", LOAD, installed], cwd=installed.parent).strip())
    said = run([python, "-m", "trace_unlearn", "--help"], cwd=installed.parent, path=installed)
    assert re.search(r"\bdemo\b", said), said
    needed = "import torch, transformers, datasets, accelerate, peft, matplotlib, jsonargparse, rouge_score"
    if subprocess.run([python, "-c", needed], capture_output=True, check=False).returncode == 0:
        demo(python, installed, output)
        return "demo --quick"
    done = subprocess.run(
        [python, "-m", "trace_unlearn", "demo", "--quick", "--output", output],
        cwd=installed.parent, env=environment(installed), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert "pip install '.[train]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return "module, help and the install line: torch or the rest is not there"


def environment(path: Path | None, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, **variables} | ({} if path is None else {"PYTHONPATH": str(path)})


def run(command: list[object], cwd: Path | None = None, path: Path | None = None, **variables: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env=environment(path, **variables), stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


if __name__ == "__main__":
    main()
