"""Writes the ops as a folder that Hugging Face's `kernels` package loads, without installing them.

    python tools/hub_kernel.py OUTPUT
    python -c "from kernels import get_local_kernel; print(get_local_kernel('OUTPUT'))"

It holds the noarch variants `torch-cpu` and `torch-cuda`: the Triton kernels and the definitions in plain torch. The
compiled module is not in it, so the backends `cpu` and `cuda` say that they are not there. Imports become relative, and
the operators get a namespace made of the files' hash, so that two versions and the installed package live side by side.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "trace_kernels"
#: What only tests and benchmarks read.
LEFT_OUT = re.compile(r"(testing/.*|__main__\.py|ops/\w+/cases\w*\.py)$")
VARIANTS = {"torch-cpu": "cpu", "torch-cuda": "cuda"}


def sources() -> dict[str, str]:
    paths = [*sorted(PACKAGE.rglob("*.py")), PACKAGE / "VERSION"]
    names = {str(path.relative_to(PACKAGE)): path for path in paths}
    return {name: path.read_text() for name, path in names.items() if not LEFT_OUT.match(name)}


def relative(name: str, text: str, namespace: str) -> str:
    """With relative imports, and its operators in `namespace`."""
    dots = "." * (name.count("/") + 1)
    text = re.sub(r"^(\s*)from trace_kernels\.(\S+) import ", rf"\1from {dots}\2 import ", text, flags=re.M)
    text = re.sub(r"^(\s*)from trace_kernels import ", rf"\1from {dots} import ", text, flags=re.M)
    for of_ops in ("trace_kernels::", "torch.ops.trace_kernels", 'Library("trace_kernels"'):
        text = text.replace(of_ops, of_ops.replace("trace_kernels", namespace))
    left = re.search(r"^\s*import trace_kernels.*", text, flags=re.M)
    if left:
        raise SystemExit(f"{name}: knows only its installed name: {left.group().strip()}")
    return text


def write(output: Path) -> str:
    """Returns the namespace of the operators. The folder is whole or not there."""
    if output.exists():
        raise SystemExit(f"{output}: exists already")
    files = sources()
    namespace = f"trace_kernels_{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:10]}"
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        for variant, backend in VARIANTS.items():
            root = Path(folder, "whole", "build", variant)
            for name, text in files.items():
                path = root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(relative(name, text, namespace))
            metadata = {
                "id": f"{namespace}_{backend}",
                "name": "trace-kernels",
                "version": 1,
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": {"type": backend},
            }
            (root / "metadata.json").write_text(json.dumps(metadata, indent=2))
        shutil.move(Path(folder, "whole"), output)
    return namespace


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(write(Path(sys.argv[1])))
