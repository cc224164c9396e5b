"""Builds the CUDA kernels for the CPU and runs an op's conformance cases on them.

    python tests/kernels/cuda/emulated.py MODULE OP [CASE...]

prints one JSON object a line: what is wrong with each case in each order of threads. test_emulation.py builds the
module and runs this in a process of its own, because AddressSanitizer must be loaded before Python is.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
NAME = "emulated_kernels"
OPTIMISE = ["-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-omit-frame-pointer"]
WARN = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-variable"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
FLAGS = ["-std=c++20", *OPTIMISE, *WARN, *SANITIZE]
ORDERS = ("forward", "reverse", "shuffled", "warps_ahead")


def preload():
    """LD_PRELOAD of a process that loads the module, or None where this compiler has no AddressSanitizer.

    With the C++ library, because AddressSanitizer looks for the function that throws when it starts.
    """
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        output = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        paths.append(output.strip())
    return " ".join(paths) if all(map(os.path.isabs, paths)) else None


def build(folder, op="*"):
    """Compile the kernels of `op` into a module in `folder`, or take what an earlier run compiled; its path."""
    import pybind11

    sources = [HERE / "emulated_module.cpp", *sorted((ROOT / "csrc/ops").glob(f"{op}/*.cu"))]
    headers = [*(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").rglob("*.h"), HERE / "emulation.h"]
    common = b"".join(path.read_bytes() for path in sorted(headers)) + " ".join(FLAGS).encode()
    includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source):
        digest = hashlib.sha256(common + source.read_bytes() + str(source).encode() + sys.version.encode()).hexdigest()
        path = folder / f"{source.parent.name}-{digest[:16]}.o"
        if not path.exists():
            command = ["g++", *FLAGS, *includes, "-include", str(HERE / "emulation.h"), "-x", "c++", "-c", str(source)]
            run_to(path, command)
        return path

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    digest = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()
    module = folder / digest[:16] / f"{NAME}.so"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        run_to(module, ["g++", *FLAGS, "-shared", *map(str, objects)])
    return module


def run_to(path, command):
    """Run a compiler; its output appears under its name complete, or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        result = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True)
        if result.returncode != 0 or result.stderr:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-6000:]}")
        os.replace(temporary, path)


def load(path):
    spec = importlib.util.spec_from_file_location(NAME, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path, op, *wanted):
    import torch
    from no_label import no_label_problems

    from trace_kernels.ops.linear_cross_entropy import cuda
    from trace_kernels.runtime.backends import BackendError
    from trace_kernels.runtime.cuda_backend import emulation
    from trace_kernels.testing.conformance import discover, errors, run

    # Fills what torch.empty returns with NaN: an output that no thread wrote shows.
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    module = load(path)
    cases = discover()[op]
    for number, case in enumerate(cases.cases):
        if case.benchmark or (wanted and case.name not in wanted):
            continue
        for order in ORDERS if case.sizes["T"] < 100 else ORDERS[:1]:
            module.set_order(order, number)
            record = {"case": case.name, "order": order, "problems": [], "refused": ""}
            with emulation(module):
                try:
                    call = case.call()
                    run(cases.function, call, backward=False, backend="cuda")
                    record["problems"] = errors(cases, case, "cuda")
                except BackendError as error:
                    record["refused"] = str(error)
                except RuntimeError as error:
                    record["problems"] = [str(error)]
            print(json.dumps(record), flush=True)
    if op == "linear_log_prob" and not wanted:
        for order in ORDERS:
            module.set_order(order, 0)
            with emulation(module):
                problems = [
                    f"{dtype}: {problem}"
                    for dtype in (torch.bfloat16, torch.float16)
                    for problem in no_label_problems(cuda.forward, cuda.backward_weight, dtype)
                ]
            print(json.dumps({"case": "no_label", "order": order, "problems": problems, "refused": ""}))


if __name__ == "__main__":
    main(*sys.argv[1:])
