"""Races of the CUDA kernels, without a GPU: emulation.h's threads as fibres of ThreadSanitizer; faults are found.

A fault is planted in a copy of a kernel, and has to be found by the check whose business it is.
"""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest
from emulated import HERE, RACES, ROOT, THREADS, build, preload

FOLDER = ROOT / "build" / "cuda-emulation"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TRACE_KERNELS_RACES" not in os.environ, reason="takes minutes: tools/sanitize.sh runs it"),
    pytest.mark.skipif(shutil.which("g++") is None or shutil.which("setarch") is None, reason="no g++ or no setarch"),
]
threads = pytest.mark.skipif(
    shutil.which("g++") is None or preload("libtsan.so") is None, reason="no g++ with ThreadSanitizer"
)

#: op, file, and code with a barrier between a write and the read of another thread.
BARRIERS = (
    ("cross_entropy", "cuda.cu", "  __syncthreads();\n  if (thread != 0) return;"),
    ("record_routing", "cuda.cu", "bins.counts[e] = 0;\n    __syncthreads();"),
    ("router_topk", "cuda.cu", "bins.counts[e] = 0;\n    __syncthreads();"),
    ("router_topk", "backward.cu", "tile[e] += d_logit;\n      }\n      __syncwarp();"),
    ("linear_cross_entropy", "cuda.cu", "shared.tops[turn][warp] = best;\n    __syncthreads();"),
    ("linear_kl", "cuda.cu", "  __syncthreads();\n  if (thread != 0) return;"),
)
NAMES = {"record_routing": "record_routing_"}


def run_with_threads(module, *ops, folder):
    suppressions = folder / "suppressions"
    suppressions.write_text("race:libtorch_cpu.so\nrace:libtorch_python.so\nrace:libgomp\nrace:python\n")
    environment = {
        **os.environ,
        "LD_PRELOAD": preload("libtsan.so"),
        "TSAN_OPTIONS": f"suppressions={suppressions} exitcode=66",
        "OMP_NUM_THREADS": "1",
    }
    # -R: its shadow memory does not fit every randomised layout.
    command = ["setarch", platform.machine(), "-R", sys.executable, HERE / "emulated.py", module, "races", *ops]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@threads
def test_no_kernel_has_a_race(tmp_path):
    result = run_with_threads(build(FOLDER, sanitize=THREADS), folder=tmp_path)
    assert result.returncode == 0, result.stderr[:6000]
    ran = [line.split()[0] for line in result.stdout.splitlines()]
    assert len(ran) == sum(map(len, RACES.values()))


@threads
@pytest.mark.parametrize("op, file, code", BARRIERS)
def test_a_missing_barrier_is_found(op, file, code, tmp_path):
    without = code.replace("__syncthreads();", "").replace("__syncwarp();", "")
    # linear_kl scales rows by a kernel of linear_cross_entropy.
    sources = "linear_*" if op == "linear_kl" else op
    module = build(FOLDER, sources, sanitize=THREADS, edit=(f"{op}/{file}", code, without))
    result = run_with_threads(module, NAMES.get(op, op), folder=tmp_path)
    assert result.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in result.stderr


@pytest.mark.skipif(shutil.which("g++") is None or preload() is None, reason="no g++ with AddressSanitizer")
@pytest.mark.parametrize(
    "op, case, file, old, new",
    [
        ("record_routing_", "strided", "cuda.cu", "indices + t * p.indices_stride_t", "indices + t * p.top_k"),
        ("router_topk", "strided", "cuda.cu", "logits + t * p.stride_t", "logits + t * p.num_experts"),
        ("router_topk", "strided_recording", "cuda.cu", "p.mask[t * p.mask_stride]", "p.mask[t]"),
    ],
)
def test_a_dropped_stride_is_found(op, case, file, old, new):
    folder = op.rstrip("_")
    module = build(FOLDER, folder, edit=(f"{folder}/{file}", old, new))
    environment = {**os.environ, "LD_PRELOAD": preload(), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, HERE / "emulated.py", module, op, case]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [json.loads(line)["problems"] for line in result.stdout.splitlines()]
    assert result.returncode != 0 or all(found)  # a wrong value, or a read beyond the row
