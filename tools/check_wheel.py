"""Builds the wheel with build isolation, and checks what it holds and that it works away from the source tree.

Where nvcc is on PATH, the wheel must hold the CUDA kernels. The isolated build must not bring torch.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
CONFIG = "trace_unlearn/integrations/open_unlearning/configs/trainer/TraceNPO.yaml"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), str(ROOT)]
        log = subprocess.run(build, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        assert "Collecting torch" not in log, "the isolated build pulls torch"
        (wheel,) = folder.glob("trace_kernels-*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        for expected in ("trace_kernels/__init__.py", "trace_unlearn/__init__.py", "trace_kernels/py.typed", CONFIG):
            assert expected in names, f"{wheel.name} lacks {expected}"
        assert any(name.startswith("trace_kernels/_native") for name in names), "the compiled module is missing"
        for name in names:
            allowed = name.startswith(("trace_kernels/", "trace_unlearn/")) or ".dist-info/" in name
            assert allowed, f"{wheel.name} holds {name}"
            assert not name.endswith((".cpp", ".cu", ".h", ".cuh")), f"{wheel.name} holds a source: {name}"
        installed = folder / "installed"
        zipfile.ZipFile(wheel).extractall(installed)
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        listing = subprocess.run(
            [sys.executable, "-m", "trace_kernels"],
            check=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip
        print(listing)
        assert "compiled module: C++" in listing, "the compiled module does not load"
        if shutil.which("nvcc") and any((ROOT / "csrc").rglob("*.cu")):
            assert "; CUDA " in listing, "nvcc is here, and the CUDA kernels were not built"
        size = wheel.stat().st_size / 1e6
        print(f"{wheel.name}: {size:.1f} MB, {len(names)} files: right")


if __name__ == "__main__":
    main()
