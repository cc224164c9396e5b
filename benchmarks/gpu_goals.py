"""Timings of our GPU backends and of other projects' at real sizes, the most important first; tools/gpu.sh runs it.

    python -m benchmarks.gpu_goals --output FILE.jsonl

Every result of ours is compared with float64 before its time counts (gpu_check.py). Candidates take turns in each round
with a cold cache. Beside the time of a call stands what the host needs for it (`host_us`), and, where launches are
short, the time of the call replayed from a CUDA graph. Peers are not captured: most of them wait for the device, and a
capture that fails leaves torch's allocator in a state that spoils what follows. Each line is written at once; goals
that the file already has are left out.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu_card import floors
from benchmarks.gpu_check import problems
from benchmarks.gpu_peers import PEERS
from benchmarks.timing import Timing, interleave, median_ratio, peak_memory
from trace_kernels.ops.linear_cross_entropy.cases import traffic
from trace_kernels.ops.record_routing.cases import OP as RECORD
from trace_kernels.ops.router_topk.cases import OP as ROUTER
from trace_kernels.runtime.backends import BackendError, all_ops
from trace_kernels.shared import chunks
from trace_kernels.testing.cases import Call, Case, OpCases, Traffic
from trace_kernels.testing.conformance import discover, execute, prepare

#: 8192 tokens and the head of Qwen3-30B-A3B.
SIZES = {"T": 8192, "H": 2048, "V": 151936}
#: Takes 20 to 60 seconds to compile.
LEFT_OUT = ("torch_compile",)
HALF = "half_ignored_frozen"
#: What a card has to say about the sizes of blocks and chunks, which a model chose: for these goals, first backend.
SWEPT = ("weighted_frozen", "log_probs_only")
SWEEP = (
    *(("BLOCK_BYTES", size << 20) for size in (32, 128, 256, 1024)),
    *(("CHUNK_BYTES", size << 20) for size in (320, 1280)),
)


class Inputs:
    """The tensors that the linear goals share, made on the device."""

    def __init__(self, device: torch.device, sizes: dict[str, int]) -> None:
        self.device = device
        self.sizes = sizes
        self.generator = torch.Generator(device).manual_seed(1)

    def _normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    @functools.cached_property
    def hidden(self) -> torch.Tensor:
        return self._normal(self.sizes["T"], self.sizes["H"])

    @functools.cached_property
    def weight(self) -> torch.Tensor:
        return self._normal(self.sizes["V"], self.sizes["H"]) * self.sizes["H"] ** -0.5

    @functools.cached_property
    def reference(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden + 0.1 * self._normal(*self.hidden.shape), self.weight

    @functools.cached_property
    def target(self) -> torch.Tensor:
        T, V = self.sizes["T"], self.sizes["V"]
        return torch.randint(V, (T,), generator=self.generator, device=self.device)

    @functools.cached_property
    def half_ignored(self) -> torch.Tensor:
        dropped = torch.rand(len(self.target), generator=self.generator, device=self.device) < 0.5
        return torch.where(dropped, -100, self.target)

    @functools.cached_property
    def token_weight(self) -> torch.Tensor:
        return self._normal(self.sizes["T"], dtype=torch.float32)

    @property
    def logits(self) -> torch.Tensor:
        return self._normal(self.sizes["T"], self.sizes["V"])


@dataclass(frozen=True)
class Goal:
    """What is timed.

    Attributes:
        milliseconds: that an H100 or H200 is meant to need; None: a share of the floor is the goal.
        floor: what has to be moved and computed at the least.
        graph: whether it is also replayed from a CUDA graph, because its launches are short.
        case: of the routing ops, whose conformance check takes any size.
    """

    name: str
    op: str
    milliseconds: float | None
    call: Callable[[Inputs], Call]
    floor: Traffic
    graph: bool = False
    case: Case | None = None


def goals(sizes: dict[str, int]) -> list[Goal]:
    shape = Case("head", sizes, lambda *_: NotImplemented, torch.bfloat16)

    def linear(
        name: str, op: str, milliseconds: float, passes: int, call: Callable[[Inputs], Call], rows: float = 1.0
    ) -> Goal:
        least = traffic(shape, passes)
        return Goal(name, op, milliseconds, call, Traffic(least.bytes, least.flops * rows))

    def weighted(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return inputs.hidden, inputs.weight, inputs.target, inputs.token_weight

    def log_prob(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return weighted(inputs)[:3]

    def kl(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return inputs.hidden, inputs.weight, *inputs.reference, inputs.token_weight

    found = [
        linear("weighted_frozen", "linear_cross_entropy", 16.0, 2,
               lambda i: Call(weighted(i), differentiable=(0,), constant=(1,))),
        linear("weighted_trainable", "linear_cross_entropy", 21.5, 3,
               lambda i: Call(weighted(i), differentiable=(0, 1))),
        linear(HALF, "linear_cross_entropy", 0.55 * 16.0, 2,
               lambda i: Call((i.hidden, i.weight, i.half_ignored, i.token_weight), differentiable=(0,), constant=(1,)),
               rows=0.5),
        linear("log_probs_only", "linear_log_prob", 7.0, 1, lambda i: Call(log_prob(i), constant=(0, 1))),
        linear("npo_frozen", "linear_log_prob", 16.0, 2,
               lambda i: Call(log_prob(i), differentiable=(0,), constant=(1,))),
        linear("kl_frozen", "linear_kl", 26.0, 3,
               lambda i: Call(kl(i), differentiable=(0,), constant=(1, 2, 3))),
    ]  # fmt: skip
    if "linear_token_stats" in discover():
        stats = linear("token_stats", "linear_token_stats", 7.5, 1, lambda i: Call(log_prob(i), constant=(0, 1)))
        found.insert(4, stats)
    T, V = sizes["T"], sizes["V"]
    # The logits are made anew for each call of this, which overwrites them.
    found.append(
        Goal(
            "rows_inplace", "cross_entropy", None,
            lambda i: Call((i.logits, i.target, i.token_weight), {"inplace": True}, differentiable=(0,)),
            Traffic(3.0 * T * V * 2 + 16 * T, 8.0 * T * V),
        )
    )  # fmt: skip
    largest = 2 * T
    for tokens, milliseconds in ((largest, 0.010), (256, None), (16, None), (1, None)):
        found.append(routing(ROUTER, "bench_16384x128_bfloat16", tokens, milliseconds))
    found.append(routing(ROUTER, "bench_16384x128_bfloat16_backward", largest, 0.020))
    found.append(routing(RECORD, "bench_16384x128", largest, 0.004))
    return found


def routing(op: OpCases, name: str, tokens: int, milliseconds: float | None) -> Goal:
    case = next(case for case in op.cases if case.name == name)
    case = replace(case, sizes={**case.sizes, "T": tokens})
    short = "backward" if "backward" in name else "forward"
    return Goal(
        f"{op.function.__name__.rstrip('_')}_{short}_{tokens}",
        op.function.__name__,
        milliseconds,
        lambda inputs: case.call(inputs.device),
        op.traffic(case),
        graph=True,
        case=case,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_goals", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--wrong", default="", help="op:backend, ... that failed a test and are not timed")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    sizes = SIZES if device.type == "cuda" else {"T": 48, "H": 32, "V": 64}
    lines = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    begun = {line["begun"] for line in lines if "begun" in line}
    measured = next((line["floors"] for line in lines if "floors" in line), None)
    with options.output.open("a", buffering=1) as file:

        def emit(line: dict) -> None:
            file.write(json.dumps(line) + "\n")

        if measured is None:
            measured = floors(device)
            emit({"floors": measured})
        frozen = {
            line["row"]["candidate"]: float(line["row"]["p50_ms"])
            for line in lines
            if "row" in line and line["row"]["goal"] == "weighted_frozen"
        }
        inputs = Inputs(device, sizes)
        for goal in goals(sizes):
            if goal.name in begun:
                continue
            emit({"begun": goal.name})
            rows, failed = timed(goal, inputs, options.seconds, set(options.wrong.split(",")), measured)
            for row in rows:
                if goal.name == "weighted_frozen":
                    frozen[row["candidate"]] = float(row["p50_ms"])
                if goal.name == HALF and row["candidate"] in frozen:
                    row["share_of_all_rows"] = round(float(row["p50_ms"]) / frozen[row["candidate"]], 3)
                emit({"row": row})
            for entry in failed:
                emit({"not timed": entry})
    return 0


def timed(
    goal: Goal, inputs: Inputs, seconds: float, wrong: set[str], measured: dict[str, float]
) -> tuple[list[dict], list[dict]]:
    """Rows, and what was not timed: wrong results of ours, refusals, and what does not run."""
    op, device = discover()[goal.op], inputs.device
    call = goal.call(inputs)
    ready = prepare(call)
    failed: list[dict] = []
    found: dict[str, Callable[[], object]] = {}

    def leave_out(candidate: str, why: str, is_wrong: bool) -> None:
        failed.append({"goal": goal.name, "candidate": candidate, "why": why, "wrong": is_wrong})

    names = ("cuda", "triton") if device.type == "cuda" else ("cpu", "reference")
    for backend in (backend.name for backend in all_ops()[goal.op] if backend.name in names):
        candidate = f"ours:{backend}"
        if f"{goal.op}:{backend}" in wrong:
            leave_out(candidate, "a test of it failed", True)
            continue
        try:
            if bad := problems(op, goal.case, call, backend):
                leave_out(candidate, "; ".join(bad), True)
                continue
            run = functools.partial(execute, op.function, ready, backend=backend)
            run()
            found[candidate] = run
            if goal.graph and device.type == "cuda":
                found[f"{candidate} (graph)"] = graphed(run)
            if goal.name in SWEPT and len(found) == 1:
                for name, value in SWEEP:
                    found[f"{candidate} {name}={value >> 20}M"] = functools.partial(with_constant, name, value, run)
        except BackendError as error:
            leave_out(candidate, str(error), False)
        except Exception as error:
            leave_out(candidate, f"{type(error).__name__}: {error}".splitlines()[0], True)
    peers = {"eager": op.eager, **op.peers, **PEERS.get(goal.op, {})}
    for name, function in peers.items():
        if name in LEFT_OUT:
            continue
        try:
            run = functools.partial(execute, function, ready)
            run()
            found[f"peer:{name}"] = run
        except Exception as error:  # another project's code may fail in any way, also for want of memory
            leave_out(f"peer:{name}", f"{type(error).__name__}: {error}".splitlines()[0], False)
    memory = {name: peak_memory(candidate, device) for name, candidate in found.items()}
    host = {name: host_microseconds(candidate, device) for name, candidate in found.items()}
    timings = interleave(found, device, seconds=seconds)
    floor = max(
        goal.floor.bytes / measured["bytes_per_second"],
        goal.floor.flops / measured["flops_per_second"] if goal.op.startswith("linear") else 0.0,
    )
    ours = next((timing for name, timing in timings.items() if name.startswith("ours")), None)
    shape = " ".join(f"{letter}={size}" for letter, size in (goal.case.sizes if goal.case else inputs.sizes).items())
    rows = []
    for name, timing in timings.items():
        rows.append(
            {
                "goal": goal.name,
                "op": goal.op,
                "shape": shape,
                "candidate": name,
                "p20_ms": f"{timing.percentile(0.2):.4f}",
                "p50_ms": f"{timing.median:.4f}",
                "p80_ms": f"{timing.percentile(0.8):.4f}",
                "rounds": len(timing.samples),
                "goal_ms": goal.milliseconds,
                "over_floor": f"{timing.median / 1e3 / floor:.3f}",
                "ratio_to_ours": ratio(ours, timing),
                "host_us": f"{host[name]:.1f}",
                "peak_bytes": memory[name],
            }
        )
    return rows, failed


def with_constant(name: str, value: int, run: Callable[[], object]) -> object:
    """A call with another value of a constant of trace_kernels/shared/chunks.py."""
    before = getattr(chunks, name)
    setattr(chunks, name, value)
    try:
        return run()
    finally:
        setattr(chunks, name, before)


def ratio(ours: Timing | None, timing: Timing) -> str:
    return "" if ours is None else f"{median_ratio(ours, timing):.3f}"


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """The replay of what `function` launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def host_microseconds(candidate: Callable[[], object], device: torch.device, calls: int = 15) -> float:
    """How long the host is busy with a call on an idle device, the median."""
    spent = []
    for _ in range(calls):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        candidate()
        spent.append(time.perf_counter() - begin)
    return sorted(spent)[calls // 2] * 1e6


if __name__ == "__main__":
    sys.exit(main())
