"""Builds the CUDA kernels for the CPU and runs an op's conformance cases on them.

    python tests/kernels/cuda/emulated.py MODULE OP [CASE...]

prints one JSON object a line: what is wrong with each case in each order of threads. test_emulation.py builds the
module and runs this in a process of its own, because AddressSanitizer must be loaded before Python is.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
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
THREADS = ["-fsanitize=thread"]
ORDERS = ("forward", "reverse", "shuffled", "warps_ahead")


def preload(sanitizer="libasan.so"):
    """LD_PRELOAD of a process that loads the module, or None where this compiler has no such sanitizer.

    With the C++ library, because AddressSanitizer looks for the function that throws when it starts.
    """
    paths = []
    for name in (sanitizer, "libstdc++.so.6"):
        output = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        paths.append(output.strip())
    return " ".join(paths) if all(map(os.path.isabs, paths)) else None


def build(folder, op="*", sanitize=SANITIZE, edit=None):
    """Compile the kernels of `op` into a module in `folder`, or take what an earlier run compiled; its path.

    edit: ("op/file", old, new), a fault to plant in a copy of that source.
    """
    import pybind11

    flags = ["-std=c++20", *OPTIMISE, *WARN, *sanitize]
    sources = [HERE / "emulated_module.cpp", *sorted((ROOT / "csrc/ops").glob(f"{op}/*.cu"))]
    headers = [*(ROOT / "csrc").rglob("*.cuh"), *(ROOT / "csrc").rglob("*.h"), HERE / "emulation.h"]
    common = b"".join(path.read_bytes() for path in sorted(headers)) + " ".join(flags).encode()
    includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    folder.mkdir(parents=True, exist_ok=True)

    def planted(source):
        if edit is None or f"{source.parent.name}/{source.name}" != edit[0]:
            return source
        text = source.read_text()
        assert text.count(edit[1]) == 1, f"{source} has {text.count(edit[1])} of {edit[1]!r}"
        digest = hashlib.sha256(repr(edit).encode()).hexdigest()[:16]
        copy = folder / f"planted-{digest}" / source.parent.name / source.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text.replace(edit[1], edit[2]))
        return copy

    def compiled(source):
        digest = hashlib.sha256(common + source.read_bytes() + str(source).encode() + sys.version.encode()).hexdigest()
        path = folder / f"{source.parent.name}-{digest[:16]}.o"
        if not path.exists():
            command = ["g++", *flags, *includes, "-include", str(HERE / "emulation.h"), "-x", "c++", "-c", str(source)]
            run_to(path, command)
        return path

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, map(planted, sources)))
    digest = hashlib.sha256(" ".join(path.name for path in objects).encode()).hexdigest()
    module = folder / digest[:16] / f"{NAME}.so"
    if not module.exists():
        module.parent.mkdir(exist_ok=True)
        run_to(module, ["g++", *flags, "-shared", *map(str, objects)])
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
                    for problem in no_label_problems(cuda.forward, cuda.backward, dtype)
                ]
            print(json.dumps({"case": "no_label", "order": order, "problems": problems, "refused": ""}))


def several_blocks(path):
    """The linear ops in several blocks of columns and chunks of rows, with other kernels' threads in every order."""
    import blocks

    from trace_kernels.ops.linear_cross_entropy import cuda as linear
    from trace_kernels.ops.linear_kl import cuda as kl
    from trace_kernels.runtime.cuda_backend import emulation

    module = load(path)
    for order in ORDERS:
        module.set_order(order, 0)
        with emulation(module):
            blocks.linear_cross_entropies(linear)
            blocks.linear_kls(kl)
            blocks.slices_of_linear_kl(kl)


#: Cases of every kernel and of each way through it; few rows, because a thread is a fibre of its own in every block.
RACES = {
    "record_routing_": ("full", "index_uint8"),
    "cross_entropy": ("full_bf16_mean",),
    "router_topk": ("qwen3_moe", "deepseek_v3", "olmoe_bfloat16", "given_gpt_oss"),
    "linear_cross_entropy": ("full_bf16_mean", "fp16_mean"),
    "linear_log_prob": ("full_fp32",),
    "linear_kl": ("full_bf16_mean", "weights_need_gradient_mean"),
}
#: More than a block's, where a block has several.
ROWS = {"record_routing_": 150, "router_topk": 20}


def races(path, *wanted):
    """Every kernel once under ThreadSanitizer, whose exit code the process gets when it has reported a race."""
    import torch

    from trace_kernels.runtime.cuda_backend import emulation
    from trace_kernels.testing.conformance import discover, run

    torch.set_num_threads(1)
    module = load(path)
    for op, names in RACES.items():
        if wanted and op not in wanted:
            continue
        cases = discover()[op]
        for case in cases.cases:
            if case.name in names:
                with emulation(module):
                    few = dataclasses.replace(case, sizes={**case.sizes, "T": ROWS.get(op, 5)})
                    run(cases.function, few.call(), backend="cuda")
                print(op, case.name, flush=True)


if __name__ == "__main__":
    {"several_blocks": several_blocks, "races": races}.get(sys.argv[2], main)(
        sys.argv[1], *(sys.argv[3:] if sys.argv[2] in ("several_blocks", "races") else sys.argv[2:])
    )
