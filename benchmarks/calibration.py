"""Calibration at scale, and beside torch, a general solver and published packages: one table.

    python -m benchmarks.calibration [--tokens 10000000] [--folder DIR] [--min-ess 0.5] [--rule balance] [--json FILE]

Synthetic routes of 48 layers, top-8 of 128 experts, 4 selected a layer: experts of very unequal use, documents of one
topic each, layers that depend on each other through the topic and through the token. They are written to a file in
DIR (384 bytes per token) and mapped from there, as `calibrate` maps what `profile` wrote. Memory is what the process
holds beyond the file's own pages (RssAnon), sampled every 20 ms. Ratios are medians over rounds in which both took
turns on the same tokens. The packages ebal and empirical_calibration are peers where they are installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

import trace_kernels as tk
from benchmarks.machine import describe
from benchmarks.timing import interleave, median_ratio
from trace_unlearn.calibration import patterns as patterns_module
from trace_unlearn.calibration.balance import balance
from trace_unlearn.calibration.calibrate import calibrate
from trace_unlearn.calibration.patterns import Patterns
from trace_unlearn.calibration.selection import select_experts
from trace_unlearn.routing.statistics import Contexts, RoutingStatistics

L, E, K = 48, 128, 8
TOPICS, BANK, DOCUMENT, LINKED = 32, 512, 256, 3
FORGOTTEN = 2  # topics that the forget data is about
BLOCK = 200_000
RIDGE, EXACT = 1e-4, 1e-12  # of the comparison with scipy; of that with packages that know none

Row = tuple[str, str, str]  # what, figure, goal


class Routes:
    """Draws routes: a bank of top-8 sets for every topic and layer; runs of layers share a token's place in it."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        base = rng.normal(size=(L, E)).astype(np.float32)
        # What a token of this place in the bank likes, whatever the layer's run: correlation across layers.
        self.bank = np.empty((L, TOPICS, BANK), dtype=np.uint64)
        for layer in range(L):
            topic = rng.normal(size=(TOPICS, 1, E)).astype(np.float32)
            logits = base[layer] + 0.5 * topic + rng.gumbel(size=(TOPICS, BANK, E)).astype(np.float32)
            best = np.argpartition(-logits, K, axis=2)[:, :, :K].astype(np.uint8)
            self.bank[layer] = np.ascontiguousarray(best).view(np.uint64)[:, :, 0]
        self.rng = rng

    def draw(self, tokens: int, forget: bool) -> np.ndarray:
        """[tokens, L, K] uint8."""
        documents = -(-tokens // DOCUMENT)
        share = 0.5 if forget else 0.2
        topic = np.where(
            self.rng.random(documents) < share,
            self.rng.integers(0, FORGOTTEN, documents),
            self.rng.integers(FORGOTTEN, TOPICS, documents),
        )
        topic = np.repeat(topic, DOCUMENT)[:tokens]
        out = np.empty((tokens, L), dtype=np.uint64)
        for first in range(0, L, LINKED):
            place = self.rng.integers(0, BANK, tokens)
            for layer in range(first, first + LINKED):
                out[:, layer] = self.bank[layer, topic, place]
        return out.view(np.uint8).reshape(tokens, L, K)


def statistics(folder: Path, tokens: int) -> RoutingStatistics:
    """Statistics whose retain routes lie in a file of `folder`, made there unless it is there."""
    source = Routes()
    forget = torch.from_numpy(source.draw(BLOCK, forget=True))
    path = folder / f"routes-{tokens}.npy"
    if not path.exists():
        partial = path.with_suffix(".partial")
        routes = np.lib.format.open_memmap(partial, "w+", np.uint8, (tokens, L, K))
        for begin in tqdm(range(0, tokens, BLOCK), desc="drawing routes", unit_scale=BLOCK, unit=" tokens"):
            routes[begin : begin + BLOCK] = source.draw(min(BLOCK, tokens - begin), forget=False)
        routes.flush()
        del routes
        partial.rename(path)
    retain = torch.from_numpy(np.load(path, mmap_mode="c"))
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    forget_counts, retain_counts = (tk.route_hits(routes, nothing, E)[0] for routes in (forget, retain))
    offsets = torch.arange(0, tokens + DOCUMENT, DOCUMENT).clamp(max=tokens)
    return RoutingStatistics(forget_counts, retain_counts, BLOCK, tokens, K, retain, offsets)


class Memory:
    """The most that the process held within the block beyond what it held before, file pages apart, in bytes."""

    def __enter__(self) -> Memory:
        self.before = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.most = self.peak - self.before

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) * 1024


def by_torch(routes: torch.Tensor, selected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and hits (unpacked) as one writes them in torch: bincount and comparison per layer."""
    counts = torch.empty(L, E, dtype=torch.int64)
    hits = torch.empty(len(selected), len(routes), dtype=torch.bool)
    pairs = selected.tolist()
    bit = 0
    for layer in range(L):
        experts = routes[:, layer].contiguous()
        counts[layer] = torch.bincount(experts.flatten(), minlength=E)
        while bit < len(pairs) and pairs[bit][0] == layer:
            hits[bit] = (experts == pairs[bit][1]).any(dim=1)
            bit += 1
    return counts, hits


def one_pass(stats: RoutingStatistics, selected: torch.Tensor) -> list[Row]:
    """Statistics and bits of all tokens, and the ratio to torch on a part of them."""
    with Memory() as memory:
        begin = time.perf_counter()
        counts, _ = tk.route_hits(stats.retain_routes, selected, E)
        seconds = time.perf_counter() - begin
    assert torch.equal(counts, stats.retain_counts)
    part = stats.retain_routes[: min(BLOCK, len(stats.retain_routes))]
    theirs, unpacked = by_torch(part, selected)
    ours, packed = tk.route_hits(part, selected, E)
    assert torch.equal(ours, theirs)
    bits = np.unpackbits(packed.numpy(), axis=1, count=len(selected))
    assert np.array_equal(bits, unpacked.numpy().T)
    candidates = {"ours": lambda: tk.route_hits(part, selected, E), "torch": lambda: by_torch(part, selected)}
    timings = interleave(candidates, torch.device("cpu"), seconds=4.0, least_rounds=3)
    ratio = median_ratio(timings["ours"], timings["torch"])
    share = len(part) / len(stats.retain_routes)
    return [
        ("statistics and bits, all tokens", f"{seconds:.1f} s", "<= 60 s for 10 M"),
        ("  beside torch (bincount, comparison)", f"{ratio:.1f} x faster", ">= 5 x"),
        ("  torch, scaled to all tokens", f"{timings['torch'].median / 1e3 / share:.0f} s", ""),
        ("  memory", f"{memory.most / 2**20:.0f} MiB", ""),
    ]


def solve(stats: RoutingStatistics, selected: torch.Tensor, rule: str, min_ess: float) -> list[Row]:
    """Sorting and solving: the parts of `calibrate` that take time."""
    _, hits = tk.route_hits(stats.retain_routes, selected, E)
    begin = time.perf_counter()
    patterns = Patterns.of(hits, len(selected))
    sorting = time.perf_counter() - begin
    target = stats.forget_frequency[selected[:, 0], selected[:, 1]]
    begin = time.perf_counter()
    found = balance(patterns, target, ridge=1e-6, min_ess=min_ess, cap=20.0, rule=rule)
    solving = time.perf_counter() - begin
    set_bits = float(patterns.scores(torch.ones(len(selected)).double()).mean())
    return [
        ("constraints", f"{len(selected)}", ""),
        ("distinct rows of hits", f"{len(patterns.rows)} ({set_bits:.1f} bits set a row)", ""),
        ("sorting the hits", f"{sorting:.1f} s", ""),
        (f"solve, rule {rule}, ESS >= {min_ess}", f"{solving:.1f} s", "<= 90 s for 10 M"),
        ("  ridge that the bound leads to", f"{found.ridge:.3g}", ""),
    ]


def whole(stats: RoutingStatistics, selected: torch.Tensor, rule: str, min_ess: float) -> list[Row]:
    """All of `calibrate`."""
    with Memory() as memory:
        begin = time.perf_counter()
        calibration = calibrate(stats, selected, rule=rule, min_ess=min_ess)
        seconds = time.perf_counter() - begin
    again = (calibration.r - calibration.f).abs()
    return [
        ("calibrate, all of it", f"{seconds:.1f} s", ""),
        ("  memory", f"{memory.most / 2**20:.0f} MiB", "<= 2048 MiB for 10 M"),
        ("  mean error, uniform -> weighted", f"{again.mean():.4f} -> {calibration.mean_error:.5f}", ""),
        ("  largest error", f"{again.max():.4f} -> {calibration.max_error:.5f}", "<= 1e-3 if ESS allows"),
        ("  ESS, largest weight", f"{calibration.ess:.4f}, {calibration.largest_weight:.2f}", ""),
    ]


def units(stats: RoutingStatistics, selected: torch.Tensor, rule: str, min_ess: float) -> list[Row]:
    """All of `calibrate` by what a weight looks at, beside that of tokens."""
    # The sums over contexts are stood in for by counts, which they are close to: documents have one topic each.
    sums = (stats.forget_counts.double(), stats.retain_counts.double())
    counted = torch.ones(stats.retain_tokens, dtype=torch.bool)
    stats = dataclasses.replace(stats, contexts=Contexts(counted, stats.retain_routes[:0], *sums))
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for unit, most in (("token", 1), ("document", 1), ("context", 3)):
        with Memory() as memory:
            begin = time.perf_counter()
            first = calibrate(stats, selected, rule=rule, unit=unit, min_ess=min_ess)
            seconds[unit] = time.perf_counter() - begin
        again = calibrate(stats, selected, rule=rule, unit=unit, min_ess=min_ess)
        same = "equal bits" if torch.equal(first.token_weight, again.token_weight) else "other bits"
        ratio = f"{seconds[unit]:.1f} s, {seconds[unit] / seconds['token']:.2f} of token"
        rows += [
            (f"calibrate, unit {unit}", ratio, "" if unit == "token" else f"<= {most} of token"),
            ("  memory", f"{memory.most / 2**20:.0f} MiB", "<= 2048 MiB for 10 M"),
            ("  ESS, largest weight", f"{first.ess:.4f}, {first.largest_weight:.2f}", ""),
            ("  weights again", same, "equal bits"),
        ]
    return rows


def repeated(stats: RoutingStatistics, selected: torch.Tensor, rule: str, min_ess: float) -> list[Row]:
    """All of `calibrate` again: the same bits? With rows compared in other chunks, and on one thread?"""

    def run() -> torch.Tensor:
        counts, _ = tk.route_hits(stats.retain_routes, selected, E)
        assert torch.equal(counts, stats.retain_counts)
        return calibrate(stats, selected, rule=rule, min_ess=min_ess).token_weight

    threads = torch.get_num_threads()
    first, second = run(), run()
    with mock.patch.object(patterns_module, "_CHUNK", 99_991):
        chunks = run()
    torch.set_num_threads(1)
    alone = run()
    torch.set_num_threads(threads)
    difference = float(((alone - first).abs() / first).max())
    return [
        (
            f"weights again, {threads} threads",
            "equal bits" if torch.equal(first, second) else "other bits",
            "equal bits",
        ),
        ("  in chunks of another size", "equal bits" if torch.equal(first, chunks) else "other bits", "equal bits"),
        ("  on 1 thread, largest difference", f"{difference:.1e} of a weight", ""),
    ]


Solver = Callable[[np.ndarray, np.ndarray], np.ndarray]  # dense hits [N, M] and targets [M] to weights [N] of mean 1


def by_scipy(hits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """A general solver on the same dual: L-BFGS-B over a dense matrix, as one would write it."""
    from scipy.optimize import minimize
    from scipy.special import logsumexp, softmax

    def dual(free: np.ndarray) -> tuple[float, np.ndarray]:
        x = hits @ free
        value = logsumexp(x) - np.log(len(x)) - free @ target + RIDGE / 2 * free @ free
        return value, softmax(x) @ hits - target + RIDGE * free

    start = np.zeros(hits.shape[1])
    found = minimize(dual, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-10})
    return softmax(hits @ found.x) * len(hits)


def by_empirical_calibration(hits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Google's package: entropy balancing (Hainmueller 2012; arXiv 1906.11920), the estimating equations by fsolve."""
    from empirical_calibration import Objective, calibrate

    weights, success = calibrate(hits, target[None], objective=Objective.ENTROPY)
    assert success, "empirical_calibration found no solution"
    return weights * len(hits)


def by_ebal(hits: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The package of R's ebal: Newton over a dense matrix. It also checks the rank and fits an outcome (a constant)."""
    from ebal import ebal_bin

    treated = np.repeat([0, 1], [len(hits), 2])  # those that are matched: two rows whose mean is the target
    solver = ebal_bin(PCA=False, print_level=-1, constraint_tolerance=1e-10)
    found = solver.ebalance(treated, np.vstack([hits, target, target]), np.zeros(len(treated)))
    assert found["converged"], "ebal did not converge"
    return found["w"][: len(hits)] * len(hits)


def beside(stats: RoutingStatistics, selected: torch.Tensor, name: str, solver: Solver, ridge: float) -> list[Row]:
    """The same problem without bounds on 100,000 tokens: the weights' difference and the ratio of times."""
    routes = stats.retain_routes[: min(100_000, len(stats.retain_routes))]
    target = stats.forget_frequency[selected[:, 0], selected[:, 1]]
    _, hits = tk.route_hits(routes, selected, E)
    dense = np.unpackbits(hits.numpy(), axis=1, count=len(selected)).astype(np.float64)
    weights: dict[str, np.ndarray] = {}

    def ours() -> None:
        patterns = Patterns.of(hits, len(selected))
        found = balance(patterns, target, ridge=ridge, min_ess=0.0, cap=1e9)
        x = patterns.scores(found.coefficients)[patterns.token_row].numpy()
        weights["ours"] = np.exp(x - x.max()) / np.exp(x - x.max()).mean()

    def theirs() -> None:
        weights["theirs"] = solver(dense, target.numpy())

    timings = interleave({"ours": ours, "theirs": theirs}, torch.device("cpu"), seconds=1.0, least_rounds=3)
    difference = np.abs(weights["ours"] - weights["theirs"]).max()
    return [
        (f"solve on {len(routes)} tokens, ridge {ridge:g}", f"{timings['ours'].median / 1e3:.2f} s", ""),
        (f"  beside {name}", f"{median_ratio(timings['ours'], timings['theirs']):.1f} x faster", ""),
        ("  largest difference of a weight", f"{difference:.1e}", "<= 1e-5"),
    ]


def beside_packages(stats: RoutingStatistics, selected: torch.Tensor) -> list[Row]:
    """Published packages, where they are installed: they match exactly, so our ridge is as good as 0."""
    rows: list[Row] = []
    packages: dict[str, Solver] = {"ebal": by_ebal, "empirical_calibration": by_empirical_calibration}
    for module, solver in packages.items():
        if find_spec(module) is None:
            rows.append((f"{module}", "not installed: skipped", ""))
        else:
            name = f"{module} {version(module)}"
            rows += beside(stats, selected, name, solver, ridge=EXACT)
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the routes are kept; a temporary folder by default")
    parser.add_argument("--experts-per-layer", type=int, default=4)
    parser.add_argument("--rule", default="balance", choices=["balance", "additive"])
    parser.add_argument("--min-ess", type=float, default=0.5)
    parser.add_argument(
        "--only",
        default="pass,solve,whole,scipy,packages",
        help="of these, units and repeat, separated by commas",
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    parts = options.only.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        stats = statistics(folder, options.tokens)
        selected = select_experts(stats, experts_per_layer=options.experts_per_layer)
        rows: list[Row] = []
        if "pass" in parts:
            rows += one_pass(stats, selected)
        if "solve" in parts:
            rows += solve(stats, selected, options.rule, options.min_ess)
        if "whole" in parts:
            rows += whole(stats, selected, options.rule, options.min_ess)
        if "units" in parts:
            rows += units(stats, selected, options.rule, options.min_ess)
        if "repeat" in parts:
            rows += repeated(stats, selected, options.rule, options.min_ess)
        if "scipy" in parts:
            rows += beside(stats, selected, "scipy (L-BFGS-B, dense)", by_scipy, ridge=RIDGE)
        if "packages" in parts:
            rows += beside_packages(stats, selected)
    machine: dict[str, Any] = describe(torch.device("cpu"))
    print(f"{options.tokens} tokens, {L} layers, top-{K} of {E} experts; " + ", ".join(map(str, machine.values())))
    for what, figure, goal in rows:
        print(f"{what:40s} {figure:28s} {goal}")
    if options.json:
        options.json.write_text(json.dumps({**machine, "tokens": options.tokens, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
