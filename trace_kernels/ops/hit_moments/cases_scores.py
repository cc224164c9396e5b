"""Inputs of `hit_scores` for tests and benchmarks."""

from __future__ import annotations

import torch

from trace_kernels.ops.hit_moments.cases import random_hits, spare_bits_set, unpack
from trace_kernels.ops.hit_moments.op import hit_scores
from trace_kernels.testing.cases import Call, Case, OpCases, Traffic


def _build(case: Case, generator: torch.Generator) -> Call:
    values = torch.randn(case.sizes["M"], generator=generator, dtype=torch.float64)
    return Call((random_hits(case, generator), values))


def _spare(case: Case, generator: torch.Generator) -> Call:
    return Call((spare_bits_set(case, generator), *_build(case, generator).args[1:]))


def _eager(hits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return unpack(hits, values.shape[0]) @ values


def _traffic(case: Case) -> Traffic:
    n, M = case.sizes["n"], case.sizes["M"]
    return Traffic(bytes=n * (-(-M // 8) + 8), flops=n * M / 16)


OP = OpCases(
    function=hit_scores,
    cases=(
        Case("full", {"n": 9001, "M": 192}, _build),
        Case("tail", {"n": 333, "M": 77}, _build),
        Case("spare_bits", {"n": 333, "M": 77}, _spare),
        Case("no_rows", {"n": 0, "M": 9}, _build),
        Case("no_bits", {"n": 5, "M": 0}, _build),
        Case("bench", {"n": 500_000, "M": 192}, _build, benchmark=True),
    ),
    traffic=_traffic,
    eager=_eager,
)
