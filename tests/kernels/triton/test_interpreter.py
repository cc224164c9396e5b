"""The Triton kernels on conformance cases, forward and backward, in Triton's interpreter on the CPU.

Without TRITON_INTERPRET=1 in the environment this runs small cases of every op in a process of its own; with it,
tests/kernels/test_conformance.py -k triton runs all of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trace_kernels.runtime import triton_backend
from trace_kernels.runtime.backends import BackendError, all_ops
from trace_kernels.testing.conformance import discover, errors

pytestmark = pytest.mark.skipif(
    triton_backend.interpreter_unavailable() is not None, reason=str(triton_backend.interpreter_unavailable())
)
OPS = (
    "record_routing_",
    "router_topk",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_token_stats",
    "linear_kl",
)
# The interpreter takes milliseconds for each program of a launch.
MOST_TOKENS = 64
MOST_CASES = {"router_topk": 30, "linear_cross_entropy": 24}


def small_cases(op):
    """Cases of few tokens, spread over the list, in all three dtypes."""
    cases = [case for case in op.cases if not case.benchmark and case.sizes["T"] <= MOST_TOKENS]
    cases = [case for case in cases if case.dtype != torch.float64]
    cases.sort(key=lambda case: str(case.dtype))  # otherwise a step can meet one dtype only
    step = -(-len(cases) // MOST_CASES.get(op.function.__name__, 12))
    return cases[::step]


def check(name):
    """Print what is wrong, one line per problem, and then what ran: a case that the backend refuses did not."""
    op = discover()[name]
    ran = []
    for case in small_cases(op):
        try:
            problems = errors(op, case, "triton")
        except BackendError:
            continue
        ran.append(str(case.dtype))
        for problem in problems:
            print(f"{case.name}: {problem}")
    print(f"{len(ran)} cases, dtypes {sorted(set(ran))}")


def interpreted(code):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("linear") else name for name in OPS]
)
def test_conformance(name):
    result = interpreted(f"import test_interpreter; test_interpreter.check({name!r})")
    assert result.returncode == 0, result.stderr[-4000:]
    *problems, summary = result.stdout.splitlines()
    assert problems == []
    assert int(summary.split()[0]) >= 6
    if name != "record_routing_":
        assert all(dtype in summary for dtype in ("bfloat16", "float16", "float32")), summary


def test_every_op_is_here():
    assert set(OPS) == {name for name, backends in all_ops().items() if "triton" in {b.name for b in backends}}


def test_importing_the_package_does_not_import_triton():
    code = "import sys, trace_kernels, trace_kernels.__main__; sys.exit('triton' in sys.modules)"
    assert interpreted(code).returncode == 0


def test_triton_is_optional():
    code = """
import sys
sys.modules["triton"] = None  # its import raises ImportError
import importlib.util, torch, trace_kernels as tk
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find(name, *args)
counts = torch.zeros(2, dtype=torch.int64)
tk.record_routing_(torch.tensor([[1]]), counts)
assert counts.tolist() == [0, 1]
try:
    tk.record_routing_(torch.tensor([[1]]), counts, backend="triton")
except tk.BackendError as error:
    assert "pip install" in str(error), error
else:
    raise AssertionError("not refused")
"""
    result = interpreted(code)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="asks for the other setting")
def test_without_the_interpreter_cpu_tensors_are_refused():
    reason = triton_backend.refuse_device(torch.zeros(1))
    assert reason is not None
    assert "TRITON_INTERPRET=1" in reason
