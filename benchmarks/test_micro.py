"""Micro-benchmarks of the routing ops: python -m pytest benchmarks --benchmark-only

Small ops whose time is a call's own; the linear ops take seconds and are timed by benchmarks.run.
"""

import pytest
import torch

from trace_kernels.runtime.backends import BackendError, all_ops
from trace_kernels.testing.conformance import discover, execute, prepare

OPS = discover()


@pytest.mark.parametrize(
    "op, case",
    [
        pytest.param(OPS[name], case, id=f"{name}-{case.name}")
        for name in ("record_routing_", "router_topk")
        if name in OPS
        for case in OPS[name].cases
        if case.benchmark
    ],
)
@pytest.mark.parametrize("candidate", ["eager", "cpu", "triton", "cuda"])
def test_routing(benchmark, op, case, candidate):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = prepare(case.call(device))
    extra = {} if candidate == "eager" else {"backend": candidate}
    if extra and candidate not in {backend.name for backend in all_ops()[op.function.__name__]}:
        pytest.skip(f"{op.function.__name__} has no {candidate} backend")
    function = op.eager if candidate == "eager" else op.function

    def once():
        execute(function, call, **extra)
        if device == "cuda":
            torch.cuda.synchronize()

    try:
        once()
    except BackendError as error:
        pytest.skip(str(error))
    benchmark.extra_info.update(case.sizes, dtype=str(case.dtype), device=device)
    benchmark(once)
