"""Everything that needs a GPU, in one command: conformance on the device, compute-sanitizer, timings beside the peers.

    python -m benchmarks.gpu [--output FILE.json]

Builds nothing: `make gpu` does that first. Exits 2, saying so, where there is no CUDA device; 1 when a result is
wrong, and then times nothing. Candidates take turns in each round with a cold cache, at the sizes of `goals`; calls
without a backward are replayed from a CUDA graph, also the peers' where they can be captured. A backend or peer that
does not run is named, with the reason. Writes one JSON and prints one table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu_peers import PEERS
from benchmarks.machine import ROOT, describe
from benchmarks.run import RESULTS, rows_of
from benchmarks.timing import interleave, peak_memory
from trace_kernels.ops.linear_cross_entropy.cases import builder as linear
from trace_kernels.ops.router_topk.cases import OP as ROUTER
from trace_kernels.runtime.backends import all_ops
from trace_kernels.testing.cases import Case, OpCases
from trace_kernels.testing.conformance import discover, execute, prepare

#: T, H, V: 8192 tokens and the head of Qwen3-30B-A3B.
T, H, V = 8192, 2048, 151936


@dataclass(frozen=True)
class Goal:
    """What is timed, and the milliseconds that an H100 is meant to need; None: a share of the bandwidth is the goal."""

    op: str
    case: Case
    milliseconds: float | None
    backward: bool = True


def goals() -> list[Goal]:
    sizes, bf16 = {"T": T, "H": H, "V": V}, torch.bfloat16

    def case(name: str, build: Callable, sizes: dict[str, int] = sizes) -> Case:
        return Case(f"gpu_{name}", sizes, build, bf16, benchmark=True)

    router = next(c for c in ROUTER.cases if c.name == "bench_16384x128_bfloat16")
    ops = discover()
    recording = next(c for c in ops["record_routing_"].cases if c.name == "bench_16384x128")
    rows = next(c for c in ops["cross_entropy"].cases if c.name == "bench_bf16_1024x151936_inplace")
    return [
        Goal("linear_cross_entropy", case("weighted_frozen", linear(frozen=True, ignored=-1.0)), 16.0),
        Goal("linear_cross_entropy", case("weighted_trainable", linear(frozen=False, ignored=-1.0)), 21.5),
        Goal("linear_log_prob", case("npo_frozen", linear(frozen=True, weights=None, ignored=-1.0)), 16.0),
        Goal(
            "linear_log_prob",
            case("log_probs_only", linear(frozen=True, weights=None, ignored=-1.0)),
            7.0,
            backward=False,
        ),
        Goal("router_topk", router, 0.010),
        Goal("record_routing_", recording, 0.004),
        Goal("cross_entropy", replace(rows, name="gpu_rows_inplace", sizes={"T": T, "V": V}), None),
    ]


def tiny(goal: Goal) -> Goal:
    """The same call with at most 64 of everything."""
    sizes = {letter: min(size, 64) for letter, size in goal.case.sizes.items()}
    return replace(goal, case=replace(goal.case, sizes=sizes))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--seconds", type=float, default=1.0, help="about this long for each candidate of a case")
    # On a CPU the same steps with tiny sizes, which measure nothing: for the test of this command.
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: torch sees no CUDA device, so nothing was run and nothing was measured", file=sys.stderr)
        return 2
    report: dict = {"machine": describe(device), "conformance": "failed", "sanitizer": "not run"}
    if conformance(device) != 0:
        write(options.output, report)
        return 1
    report["conformance"] = "passed"
    report["sanitizer"] = sanitizer() if device.type == "cuda" else "absent"
    report["backends"] = {
        name: {backend.name: backend.unavailable() or "ready" for backend in backends}
        for name, backends in all_ops().items()
    }
    wanted = goals() if device.type == "cuda" else [tiny(goal) for goal in goals()]
    report["timings"] = [row for goal in wanted for row in timed(goal, device, options.seconds)]
    write(options.output, report)
    table(report["timings"])
    return 0 if report["sanitizer"] in ("passed", "absent") else 1


def conformance(device: torch.device) -> int:
    """The whole suite on the device, and every op captured in a CUDA graph and replayed."""
    tests = [
        "tests/kernels/test_conformance.py",
        "tests/kernels/cuda/test_capture.py",
        "-k",
        "(right and cuda) or capture_and_replay",
    ]
    if device.type == "cpu":
        tests = ["tests/kernels/test_conformance.py", "-n", "0", "-k", "right and reference and record_routing"]
    return subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT).returncode


def sanitizer() -> str:
    """compute-sanitizer's memcheck and racecheck on a small case of every op."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "absent"
    names = "full_fp32_mean or full_bf16_sum or deepseek_v3 or record_routing_-full or cross_entropy-tail_bf16"
    tests = ["-m", "pytest", "tests/kernels/test_conformance.py", "-k", f"cuda-cuda and ({names})"]
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "1", sys.executable, *tests]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            return f"failed: {check}"
    return "passed"


def timed(goal: Goal, device: torch.device, seconds: float) -> list[dict]:
    """Rows of benchmarks.run for one goal, with the goal in them; what could not run is a row without times."""
    op: OpCases = discover()[goal.op]
    call = goal.case.call(device)
    if not goal.backward:
        call.differentiable = ()
    call = prepare(call)
    candidates: dict[str, Callable[[], object]] = {}
    for backend in all_ops()[goal.op]:
        candidates[f"ours:{backend.name}"] = lambda name=backend.name: execute(op.function, call, backend=name)
    for peer, function in {"eager": op.eager, **op.peers, **PEERS.get(goal.op, {})}.items():
        candidates[f"peer:{peer}"] = lambda function=function: execute(function, call)
    found, failed = {}, {}
    for name, candidate in candidates.items():
        try:
            candidate()
            found[name] = candidate if call.differentiable or device.type == "cpu" else graphed(name, candidate)
        except Exception as error:  # another project's code may fail in any way, also for want of memory
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{goal.op} {goal.case.name}: {name} does not run: {failed[name]}")
    memory = {name: peak_memory(candidate, device) for name, candidate in found.items()}
    timings = interleave(found, device, seconds=seconds)
    rows = rows_of(op, goal.case, timings, memory)
    return [{**row, "goal_ms": goal.milliseconds, "failed": failed} for row in rows]


def graphed(name: str, function: Callable[[], object]) -> Callable[[], object]:
    """The replay of what `function` launches, a call without the launches' own cost; itself if a peer's has none."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        if name.startswith("ours"):
            raise
        print(f"{name} cannot be captured and is timed without a graph: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return function
    return graph.replay


def write(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"wrote {path}")


def table(rows: list[dict]) -> None:
    columns = ("op", "case", "candidate", "p50_ms", "goal_ms", "ratio_to_ours", "GB_per_s", "peak_bytes")
    widths = {column: max(len(column), *(len(str(row[column])) for row in rows)) for column in columns}
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(str(row[column]).ljust(widths[column]) for column in columns))


if __name__ == "__main__":
    sys.exit(main())
