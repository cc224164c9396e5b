"""Installs the package from its sdist and from a wheel, away from the source tree, and runs the short demo from each.

    python tools/check_installs.py

The interpreter that runs this has the requirements: its demo runs from the sdist and from the wheel. Others that are
there, of Python 3.10 to 3.13, build the wheel from the sdist with pip's isolation, install it without requirements,
load the compiled module and print the command's help; where torch is there for them too, they list the kernels.
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
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
VERSIONS = ("3.10", "3.11", "3.12", "3.13")


def main() -> None:
    others = {version: found for version in VERSIONS if (found := interpreter(version)) is not None}
    print("interpreters:", ", ".join(f"{version} {path}" for version, path in others.items()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sdist = source_distribution(folder)
        with timed("from the sdist"):
            demo(install([sys.executable], sdist, folder / "from_sdist"), folder / "demo_sdist")
        with timed("from the wheel"):
            wheel = build_wheel([sys.executable], sdist, folder / "wheel")
            demo(install([sys.executable], wheel, folder / "from_wheel"), folder / "demo_wheel")
        for version, path in others.items():
            if version != f"{sys.version_info.major}.{sys.version_info.minor}":
                with timed(f"Python {version}"):
                    installed = install([path], build_wheel([path], sdist, folder / version), folder / f"lib{version}")
                    smoke(path, installed)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.time()
    yield
    print(f"{what}: {time.time() - began:.0f} s", flush=True)


def interpreter(version: str) -> str | None:
    """One that runs, with pip and the headers that a build needs."""
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for path in [*map(str, pyenv), shutil.which(f"python{version}")]:
        check = "import os, pip, sysconfig; assert os.path.exists(sysconfig.get_path('include') + '/Python.h')"
        if path and subprocess.run([path, "-c", check], capture_output=True, check=False).returncode == 0:
            return path
    return None


def source_distribution(folder: Path) -> Path:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder]
    run(command, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/CMakeLists.txt") for name in archive.getnames())
    return sdist


def build_wheel(python: list[str], sdist: Path, folder: Path) -> Path:
    run([*python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, sdist])
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(python: list[str], package: Path, folder: Path) -> Path:
    run([*python, "-m", "pip", "install", "-q", "--no-deps", "--no-warn-conflicts", "--target", folder, package])
    return folder


def demo(installed: Path, output: Path) -> None:
    command = [sys.executable, "-m", "trace_unlearn", "demo", "--quick", "--output", output]
    said = run(command, cwd=installed.parent, path=installed)
    assert (output / "report.html").is_file(), said[-2000:]


def smoke(python: str, installed: Path) -> None:
    module = (
        "import glob, importlib.util, sys; path, = glob.glob(sys.argv[1] + '/trace_kernels/_native*'); "
        "spec = importlib.util.spec_from_file_location('trace_kernels._native', path); "
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); print(module.build_info())"
    )
    print(run([python, "-c", module, installed], cwd=installed.parent).strip())
    said = run([python, "-m", "trace_unlearn", "--help"], cwd=installed.parent, path=installed)
    assert re.search(r"\bdemo\b", said), said
    if subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode == 0:
        assert "compiled module: C++" in run([python, "-m", "trace_kernels"], cwd=installed.parent, path=installed)
    done = subprocess.run(
        [python, "-m", "trace_unlearn", "demo", "--quick"],
        cwd=installed.parent, env=environment(installed), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:  # without the requirements of [train]
        assert "pip install '.[train]'" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr, done.stderr


def environment(path: Path | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept if path is None else {**kept, "PYTHONPATH": str(path)}


def run(command: list[object], cwd: Path | None = None, path: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment(path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


if __name__ == "__main__":
    main()
