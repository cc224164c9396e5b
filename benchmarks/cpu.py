"""The goals of the CPU kernels as one table: ratios of times that were taken in turns in one run.

    python -m benchmarks.cpu [--quick] [--only WORD] [--rows PATTERN] [--json FILE]

Every op must pass its conformance cases on the cpu backend first. "bare GEMMs" are torch.mm into memory that exists
already. Run it on a quiet machine; a ratio is a median over rounds, so a drift of the machine cancels.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

import trace_kernels as tk
from benchmarks.cpu_peers import installed
from benchmarks.machine import describe
from benchmarks.run import gate
from benchmarks.timing import interleave, median_ratio, peak_memory
from trace_kernels.ops.linear_cross_entropy.cases import eager, torch_chunked, torch_compile
from trace_kernels.ops.router_topk.cases import torch_chain as chain
from trace_kernels.runtime.native import native
from trace_kernels.testing.conformance import discover

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16
SHAPES = {FP32: [(1024, 1024, 32000), (1024, 512, 151936)]}
SHAPES[BF16] = [(1024, 1024, 32000), (1024, 2048, 50304), (1024, 1024, 151936)]
PEERS = [(FP32, 1024, 1024, 32000), (BF16, 1024, 1024, 32000)]
FEW = (BF16, 64, 2048, 151936)

# What, inputs, what measures the figure (before the next row is asked for), goal.
Row = tuple[str, str, Callable[[], float], str]
LIMIT = "(a limit, no goal)"


class LeastBackward(torch.autograd.Function):
    """The least that a Python op can do in its backward: zeros, or for a dense gradient a copy of the logits."""

    @staticmethod
    def forward(ctx, leaf: torch.Tensor, like: torch.Tensor, dense: bool) -> torch.Tensor:
        ctx.leaf, ctx.dense = leaf.detach(), dense
        return like.clone()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.leaf.clone() if ctx.dense else torch.zeros_like(ctx.leaf), None, None


class Head:
    """The inputs of one shape, and every way to spend time on them."""

    def __init__(self, dtype: torch.dtype, T: int, H: int, V: int, ignored: float = 0.0, spread: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(T + H + V)
        self.hidden = (torch.randn(T, H, generator=generator) * spread).to(dtype)
        self.ref_hidden = self.hidden + 0.1
        self.weight = (torch.randn(V, H, generator=generator) / H**0.5).to(dtype)
        self.target = torch.randint(V, (T,), generator=generator)
        self.target[: int(ignored * T)] = -100
        self.token_weight = torch.rand(T, generator=generator) + 0.5
        self.name = f"{'fp32' if dtype == FP32 else 'bf16'} ({T}, {H}, {V})"

    def step(self, function: Callable[..., torch.Tensor], trainable: bool) -> Callable[[], object]:
        def call() -> object:
            hidden = self.hidden.detach().requires_grad_()
            weight = self.weight.detach().requires_grad_(trainable)
            loss = function(hidden, weight, self.target, self.token_weight)
            return torch.autograd.grad(loss, (hidden, weight) if trainable else (hidden,))

        return call

    def ours(self, trainable: bool = False) -> Callable[[], object]:
        return self.step(functools.partial(tk.linear_cross_entropy, backend="cpu"), trainable)

    def log_prob(self) -> object:
        with torch.no_grad():
            return tk.linear_log_prob(self.hidden, self.weight, self.target, backend="cpu")

    def kl(self, trainable: bool = False, ref_weight: torch.Tensor | None = None, beta: float = 0.0) -> object:
        hidden = self.hidden.detach().requires_grad_()
        weight = self.weight.detach().requires_grad_(trainable)
        ref_weight = self.weight if ref_weight is None else ref_weight
        reference = (self.ref_hidden, ref_weight, self.token_weight)
        loss = tk.linear_kl(hidden, weight, *reference, beta=beta, backend="cpu")
        return torch.autograd.grad(loss, (hidden, weight) if trainable else (hidden,))

    def bare(self, passes: int) -> Callable[[], object]:
        logits = self.hidden.new_empty(self.hidden.shape[0], self.weight.shape[0])
        dhidden, dweight = torch.empty_like(self.hidden), torch.empty_like(self.weight if passes == 3 else self.hidden)

        def call() -> None:
            torch.mm(self.hidden, self.weight.T, out=logits)
            if passes > 1:
                torch.mm(logits, self.weight, out=dhidden)
            if passes > 2:
                torch.mm(logits.T, self.hidden, out=dweight)

        return call


def share(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> Callable[[], float]:
    """Measures ours / other: a median over rounds."""
    return lambda: 1.0 / gain(ours, other, rounds)()


def gain(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> Callable[[], float]:
    """Measures other / ours: a median over rounds."""

    def measure() -> float:
        timings = interleave({"ours": ours, "other": other}, CPU, seconds=0.0, least_rounds=rounds)
        return median_ratio(timings["ours"], timings["other"])

    return measure


def heads(rounds: int, quick: bool) -> Iterator[Row]:
    for dtype, shapes in SHAPES.items():
        fp32 = dtype == FP32
        for shape in shapes[:1] if quick else shapes:
            head = Head(dtype, *shape)
            yield (
                "frozen / 2 bare GEMMs",
                head.name,
                share(head.ours(), head.bare(2), rounds),
                ("<= 1.03" if fp32 else "<= 1.06"),
            )
            yield (
                "trainable / 3 bare GEMMs",
                head.name,
                share(head.ours(True), head.bare(3), rounds),
                ("<= 1.05" if fp32 else "<= 1.08"),
            )
            yield "log_prob / 1 bare GEMM", head.name, share(head.log_prob, head.bare(1), rounds), "<= 1.05"
    head = Head(*FEW)
    yield "few tokens, frozen / 2 bare GEMMs", head.name, share(head.ours(), head.bare(2), rounds), "<= 1.15"
    for dtype, *shape in PEERS[1:] if quick else PEERS:
        head, half = Head(dtype, *shape), Head(dtype, *shape, ignored=0.5)
        yield "half ignored / full", head.name, share(half.ours(), head.ours(), rounds), "<= 0.55"


def peers(rounds: int, quick: bool) -> Iterator[Row]:
    for dtype, *shape in PEERS[1:] if quick else PEERS:
        head, fp32 = Head(dtype, *shape), dtype == FP32
        yield (
            "eager / ours, frozen",
            head.name,
            gain(head.ours(), head.step(eager, False), rounds),
            (">= 1.15" if fp32 else ">= 1.45"),
        )
        for trainable in (False, True):
            compiled = head.step(torch_compile, trainable)
            what = f"torch.compile / ours, {'trainable' if trainable else 'frozen'}"
            yield what, head.name, gain(head.ours(trainable), compiled, rounds), ">= 1.0" if fp32 else ">= 1.05"
        if hasattr(F, "linear_cross_entropy"):
            chunked = head.step(torch_chunked, False)
            yield "torch chunked / ours, frozen", head.name, gain(head.ours(), chunked, min(rounds, 3)), ">= 3.5"


def peers_of_today(rounds: int, quick: bool) -> Iterator[Row]:
    for dtype, *shape in PEERS[1:] if quick else PEERS:
        head = Head(dtype, *shape)
        for name, loss in installed().items():
            measure = gain(head.ours(), head.step(loss, False), min(rounds, 3))
            yield f"{name} / ours, frozen", head.name, measure, ">= 1.0"


def rows_from_logits(rounds: int, quick: bool) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1024, 32000, generator=generator)
    target, weights = torch.randint(32000, (1024,), generator=generator), torch.rand(1024, generator=generator)
    copy, work = torch.empty_like(logits), logits.clone()

    def ours() -> object:
        leaf = work.detach().requires_grad_()
        return torch.autograd.grad(tk.cross_entropy(leaf, target, weights, inplace=True, backend="cpu"), leaf)

    yield (
        "cross_entropy in place / one copy",
        "fp32 (1024, 32000)",
        share(ours, lambda: copy.copy_(logits), rounds),
        "<= 1.8",
    )


def divergence(rounds: int, quick: bool) -> Iterator[Row]:
    for dtype in (BF16,) if quick else (FP32, BF16):
        head = Head(dtype, 1024, 1024, 32000)
        bare = functools.partial(in_turn, head.bare(1), head.bare(2))
        yield "linear_kl frozen / 3 bare GEMMs", head.name, share(head.kl, bare, rounds), "<= 1.15"
        jsd = functools.partial(head.kl, beta=0.5)
        yield "linear_kl frozen, beta 0.5 / 3 bare GEMMs", head.name, share(jsd, bare, rounds), LIMIT
        two = functools.partial(head.kl, ref_weight=head.weight.clone())
        yield "linear_kl frozen, two heads / 3 bare GEMMs", head.name, share(two, bare, rounds), "<= 1.15"


def in_turn(*calls: Callable[[], object]) -> None:
    for call in calls:
        call()


def routing(rounds: int, quick: bool) -> Iterator[Row]:
    ops = discover()
    for case in ops["record_routing_"].cases:
        if case.benchmark and case.sizes["T"] == 16384:
            op, call = ops["record_routing_"], case.call()
            ours = functools.partial(op.function, *call.args, **call.kwargs, backend="cpu")
            other = functools.partial(op.eager, *call.args, **call.kwargs)
            yield "record_routing_: torch / ours", case.name, gain(ours, other, 5 * rounds), ">= 5"


def router(rounds: int, quick: bool) -> Iterator[Row]:
    """Against what Mixtral's and Qwen's routers do in torch: the forward with counts and scores, the backward alone."""
    generator = torch.Generator().manual_seed(0)
    for dtype, E in ((FP32, 128),) if quick else [(dtype, E) for dtype in (FP32, BF16) for E in (64, 128, 256)]:
        T, k = 16384, 8
        logits = torch.randn(T, E, generator=generator).to(dtype)
        recording = {
            "token_mask": torch.rand(T, generator=generator) < 0.7,
            "counts": torch.zeros(E, dtype=torch.int64),
            "table": torch.randn(E, generator=generator),
            "token_score": torch.zeros(T),
        }
        name = f"{'fp32' if dtype == FP32 else 'bf16'} ({T}, {E}), k = {k}"
        ours = functools.partial(tk.router_topk, logits, k, **recording, backend="cpu")
        yield (
            "router_topk: torch / ours",
            name,
            gain(ours, functools.partial(chain, logits, k, **recording), rounds),
            ">= 6",
        )
        leaf, upstream = logits.requires_grad_(), torch.randn(T, k, generator=generator).to(dtype)
        for renormalize in (True, False):
            weights = (
                tk.router_topk(leaf, k, renormalize=renormalize, backend="cpu")[0],
                chain(leaf, k)[0] if renormalize else leaf.softmax(-1, dtype=torch.float).topk(k).values.to(dtype),
            )
            backward = [functools.partial(torch.autograd.grad, w, leaf, upstream, retain_graph=True) for w in weights]
            what = "router_topk backward" + ("" if renormalize else ", dense gradient")
            yield f"{what}: torch / ours", name, gain(*backward, rounds), ">= 4"
            least = LeastBackward.apply(leaf, weights[0].detach(), not renormalize)
            call = functools.partial(torch.autograd.grad, least, leaf, upstream, retain_graph=True)
            what = f"{what}: torch / only {'zeros' if renormalize else 'a copy'}"
            yield what, name, gain(call, backward[1], rounds), LIMIT


def memory(rounds: int, quick: bool) -> Iterator[Row]:
    large = [(BF16, 1024, 2048, 50304), (BF16, 1024, 1024, 151936), (BF16, 8192, 1024, 32000)]
    for dtype, *shape in [(FP32, 1024, 1024, 32000), *large[: 0 if quick else None]]:
        head = Head(dtype, *shape)
        for trainable in (False, True):
            kinds = {"linear_cross_entropy": head.ours(trainable), "linear_kl": functools.partial(head.kl, trainable)}
            for op, call in kinds.items():
                outputs = head.hidden.nbytes * 2 + (head.weight.nbytes if trainable else 0)
                what = f"{op} scratch MiB, {'trainable' if trainable else 'frozen'} (stash: output)"
                yield what, head.name, functools.partial(scratch, call, outputs), "<= 48"


def scratch(call: Callable[[], object], outputs: int) -> float:
    native().release_workspace()  # what the last call left for the next one
    peak = peak_memory(call, CPU)
    return float("nan") if peak is None else (peak - outputs) / 2**20


def accuracy(rounds: int, quick: bool) -> Iterator[Row]:
    for label, spread in (("peaked", 8.0), ("flat", 1e-2)):
        head = Head(BF16, 256, 1024, 32000, spread=spread)
        truth = tk.linear_log_prob(head.hidden.double(), head.weight.double(), head.target, backend="reference")
        error = (head.log_prob().double() - truth).abs().max()
        yield f"log-prob error in nats, {label}", head.name, error.item, "<= 1e-4"
    for dtype in (FP32, BF16):
        head = Head(dtype, 256, 512, 8000)
        wide = Head(torch.float64, 256, 512, 8000)
        wide.hidden, wide.weight = head.hidden.double(), head.weight.double()
        truth = wide.step(functools.partial(tk.linear_cross_entropy, backend="reference"), True)()
        results = (head.ours(True)(), head.step(eager, True)())
        for index, what in enumerate(("dX", "dW")):
            mine, theirs = ((got[index].double() - truth[index]).norm() for got in results)
            yield f"{what} error / eager's", head.name, (mine / theirs).item, "<= 1.2"


SECTIONS = {
    "heads": heads,
    "peers": peers,
    "peers_of_today": peers_of_today,
    "logits": rows_from_logits,
    "kl": divergence,
    "routing": routing,
    "router": router,
    "memory": memory,
    "accuracy": accuracy,
}


def met(figure: float, goal: str) -> bool:
    if goal == LIMIT:
        return True
    bound = float(goal.split()[1])
    return figure <= bound if goal.startswith("<=") else figure >= bound


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--only", action="append", choices=sorted(SECTIONS), help="a section; may be repeated")
    parser.add_argument("--rows", default="", help="a regular expression: only rows whose name and inputs it matches")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args(arguments)
    for name in (
        "linear_cross_entropy",
        "linear_log_prob",
        "linear_kl",
        "cross_entropy",
        "record_routing_",
        "router_topk",
    ):
        if (reason := gate(discover()[name], "cpu", "cpu")) is not None:
            print(f"{name}: not timed, it is wrong: {reason}", file=sys.stderr)
            return 1
    print(", ".join(describe(CPU).values()), f"instruction set {native().isa()}", sep=", ", flush=True)
    table = []
    for section in options.only or SECTIONS:
        for what, inputs, measure, goal in SECTIONS[section](3 if options.quick else 9, options.quick):
            if not re.search(options.rows, f"{what} {inputs}"):
                continue
            if math.isnan(figure := measure()):
                continue  # this system cannot tell
            table.append({"what": what, "inputs": inputs, "figure": figure, "goal": goal, "met": met(figure, goal)})
            mark = "  " if table[-1]["met"] else " !"
            print(f"{what:<52}{inputs:<26}{figure:>10.3g}  {goal}{mark}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": describe(CPU), "isa": native().isa(), "rows": table}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
