"""Inputs of `hit_order` for tests and benchmarks."""

from __future__ import annotations

import torch

from trace_kernels.ops.hit_moments.cases import random_hits
from trace_kernels.ops.hit_moments.op import hit_order
from trace_kernels.testing.cases import Call, Case, OpCases, Traffic


def _build(case: Case, generator: torch.Generator) -> Call:
    hits = random_hits(case, generator)
    n = hits.shape[0]
    return Call((hits[torch.randint(0, max(n // 3, 1), (n,), generator=generator)],))  # with equal rows


def _eager(hits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(range(hits.shape[0]), key=lambda n: bytes(hits[n].tolist())), dtype=torch.int64)


def _traffic(case: Case) -> Traffic:
    n, M = case.sizes["n"], case.sizes["M"]
    return Traffic(bytes=n * (-(-M // 8) + 8), flops=0)


OP = OpCases(
    function=hit_order,
    cases=(
        Case("full", {"n": 9001, "M": 192}, _build),
        Case("tail", {"n": 333, "M": 77}, _build),
        Case("few_bits", {"n": 50, "M": 3}, _build),
        Case("no_rows", {"n": 0, "M": 9}, _build),
        Case("no_bits", {"n": 5, "M": 0}, _build),
        Case("bench", {"n": 500_000, "M": 192}, _build, benchmark=True),
    ),
    traffic=_traffic,
    eager=_eager,
)
