"""Inputs of `hit_moments` for tests and benchmarks."""

from __future__ import annotations

import torch

from trace_kernels.ops.hit_moments.op import hit_moments
from trace_kernels.testing.cases import Call, Case, OpCases, Traffic


def random_hits(case: Case, generator: torch.Generator) -> torch.Tensor:
    """[n, ceil(M / 8)], a sixteenth of the bits set, the spare ones 0."""
    n, M = case.sizes["n"], case.sizes["M"]
    bits = torch.zeros(n, (M + 7) // 8 * 8, dtype=torch.uint8)
    bits[:, :M] = (torch.rand(n, M, generator=generator) < 1 / 16).to(torch.uint8)
    return pack(bits)


def spare_bits_set(case: Case, generator: torch.Generator) -> torch.Tensor:
    hits, spare = random_hits(case, generator), -case.sizes["M"] % 8
    hits[:, -1] |= 2**spare - 1
    return hits


def pack(bits: torch.Tensor) -> torch.Tensor:
    """Packs [n, 8 B] zeros and ones as numpy.packbits does."""
    powers = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8)
    return (bits.view(bits.shape[0], bits.shape[1] // 8, 8) * powers).sum(dim=2).to(torch.uint8)


def unpack(hits: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[n, M] float64, as one writes it without the op: a column of bytes at a time."""
    columns = [(hits[:, m // 8] // 2 ** (7 - m % 8)) % 2 for m in range(num_bits)]
    return torch.stack(columns, dim=1).double() if columns else torch.zeros(hits.shape[0], 0, dtype=torch.float64)


def _build(order: int):  # type: ignore[no-untyped-def]
    def build(case: Case, generator: torch.Generator) -> Call:
        weights = torch.randn(case.sizes["n"], generator=generator, dtype=torch.float64)
        weights[::5] = 0
        return Call((random_hits(case, generator), weights, case.sizes["M"], order))

    return build


def _strided(case: Case, generator: torch.Generator) -> Call:
    hits, weights, *rest = _build(2)(case, generator).args
    wide = torch.zeros(hits.shape[0], 2 * hits.shape[1], dtype=torch.uint8)[:, ::2]
    two = torch.zeros(hits.shape[0], 2, dtype=torch.float64)[:, 1]
    return Call((wide.copy_(hits), two.copy_(weights), *rest))


def _spare(case: Case, generator: torch.Generator) -> Call:
    weights = torch.randn(case.sizes["n"], generator=generator, dtype=torch.float64)
    return Call((spare_bits_set(case, generator), weights, case.sizes["M"], case.sizes["order"]))


def _eager(hits: torch.Tensor, weights: torch.Tensor, num_bits: int, order: int = 1) -> torch.Tensor:
    bits = unpack(hits, num_bits)
    return weights @ bits if order == 1 else (bits * weights[:, None]).T @ bits


def _traffic(case: Case) -> Traffic:
    n, M = case.sizes["n"], case.sizes["M"]
    return Traffic(bytes=n * (-(-M // 8) + 8) + 8 * M * M, flops=n * (M / 16) ** 2 / 2)


OP = OpCases(
    function=hit_moments,
    cases=(
        *(
            Case(f"{name}_{order}", sizes, _build(order))
            for order in (1, 2)
            for name, sizes in {
                "full": {"n": 9001, "M": 192},
                "tail": {"n": 333, "M": 77},
                "few_bits": {"n": 50, "M": 3},
                "no_rows": {"n": 0, "M": 9},
                "no_bits": {"n": 5, "M": 0},
            }.items()
        ),
        Case("strided", {"n": 100, "M": 70}, _strided),
        *(
            Case(f"spare_bits_{M}_{order}", {"n": 20_000, "M": M, "order": order}, _spare)
            for M in (3, 77)
            for order in (1, 2)
        ),
        *(Case(f"bench_{order}", {"n": 500_000, "M": 192}, _build(order), benchmark=True) for order in (1, 2)),
    ),
    traffic=_traffic,
    eager=_eager,
)
