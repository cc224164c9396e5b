"""Inputs of `route_hits` for tests and benchmarks."""

from __future__ import annotations

import torch

from trace_kernels.ops.route_hits.op import route_hits
from trace_kernels.testing.cases import Call, Case, OpCases, Traffic


def _routes(case: Case, generator: torch.Generator) -> torch.Tensor:
    N, L, E, k = (case.sizes[name] for name in "NLEk")
    return torch.rand(N, L, E, generator=generator).topk(k, dim=2).indices


def _selected(case: Case, generator: torch.Generator) -> torch.Tensor:
    L, E = case.sizes["L"], case.sizes["E"]
    chosen = torch.randperm(L * E, generator=generator)[: case.sizes["M"]]
    return torch.stack([chosen // E, chosen % E], dim=1)


def _typed(dtype: torch.dtype, *, empty: bool = False):  # type: ignore[no-untyped-def]
    def build(case: Case, generator: torch.Generator) -> Call:
        routes, selected = _routes(case, generator), _selected(case, generator)
        if empty:
            routes[::3, 0, 0] = torch.iinfo(dtype).max if dtype in (torch.uint8, torch.uint16) else -1
        return Call((routes.to(dtype), selected, case.sizes["E"]))

    return build


def _strided(case: Case, generator: torch.Generator) -> Call:
    call = _typed(torch.int64)(case, generator)
    N, L, k = call.args[0].shape
    routes = torch.zeros(2 * N, L, 3 * k, dtype=torch.int64)[::2, :, ::3]
    return Call((routes.copy_(call.args[0]), *call.args[1:]))


def _eager(routes: torch.Tensor, selected: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What one writes without this op: a bincount a layer and a comparison a selected expert."""
    N, L, _ = routes.shape
    counts = []
    for layer in range(L):
        experts = routes[:, layer].flatten().long()
        experts = torch.where((experts < 0) | (experts >= num_experts), num_experts, experts)
        counts.append(torch.bincount(experts, minlength=num_experts + 1)[:num_experts])
    bits = torch.zeros(N, (len(selected) + 7) // 8 * 8, dtype=torch.uint8, device=routes.device)
    for m, (layer, expert) in enumerate(selected.tolist()):
        bits[:, m] = (routes[:, layer].to(torch.int64) == expert).any(dim=1)
    powers = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=routes.device)
    return torch.stack(counts), (bits.view(N, bits.shape[1] // 8, 8) * powers).sum(dim=2).to(torch.uint8)


def _traffic(case: Case) -> Traffic:
    N, L, E, k, M = (case.sizes[name] for name in "NLEkM")
    return Traffic(bytes=N * L * k + N * -(-M // 8) + 8 * L * E, flops=0)


_SMALL = {"N": 37, "L": 3, "E": 60, "k": 6, "M": 11}

OP = OpCases(
    function=route_hits,
    cases=(
        Case("full", {"N": 20011, "L": 3, "E": 32, "k": 8, "M": 12}, _typed(torch.uint8)),
        Case("four", {"N": 777, "L": 5, "E": 16, "k": 4, "M": 40}, _typed(torch.uint8)),
        Case("many_of_a_layer", {"N": 70, "L": 2, "E": 150, "k": 8, "M": 290}, _typed(torch.uint8)),
        Case("all_256", {"N": 100, "L": 1, "E": 256, "k": 5, "M": 256}, _typed(torch.uint8)),
        Case("nothing_selected", {**_SMALL, "M": 0}, _typed(torch.uint8)),
        Case("no_tokens", {**_SMALL, "N": 0}, _typed(torch.uint8)),
        Case("strided", _SMALL, _strided),
        *(
            Case(f"index_{str(dtype).removeprefix('torch.')}", _SMALL, _typed(dtype, empty=True))
            for dtype in (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)
        ),
        Case(
            "bench_48_layers", {"N": 100_000, "L": 48, "E": 128, "k": 8, "M": 192}, _typed(torch.uint8), benchmark=True
        ),
    ),
    traffic=_traffic,
    eager=_eager,
)
