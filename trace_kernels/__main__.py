"""``python -m trace_kernels``: what was built, and which backends each op has on this machine."""

from __future__ import annotations

import sys

import torch

import trace_kernels
from trace_kernels.runtime.backends import BACKENDS, all_ops
from trace_kernels.runtime.native import cpu_unavailable, native, num_threads


def main() -> int:
    print(f"trace-kernels {trace_kernels.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    if (reason := cpu_unavailable()) is not None:
        print(f"compiled module: absent: {reason}")
    else:
        info = native().build_info()
        cuda = (
            f"CUDA {info['cuda_version']} for sm_{info['cuda_archs'].replace(',', ', sm_')}"
            if info["cuda_built"]
            else f"no CUDA ({info['cuda_absent_because']})"
        )
        print(f"compiled module: C++ by {info['compiler']}; {cuda}")
        print(f"threads: {num_threads()}, on {native().parallel_runtime()}")
    for op, backends in all_ops().items():
        print(f"\n{op}")
        present = {backend.name: backend for backend in backends}
        for name in BACKENDS:
            if name not in present:
                print(f"  {name:<10} absent: not written for this op")
            else:
                reason = present[name].unavailable()
                print(f"  {name:<10} {'ready' if reason is None else 'absent: ' + reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
