"""Inputs of `record_routing_` for tests and benchmarks."""

from __future__ import annotations

import torch

from trace_kernels.ops.record_routing.op import record_routing_
from trace_kernels.testing.cases import Call, Case, OpCases, Traffic


def _indices(case: Case, generator: torch.Generator) -> torch.Tensor:
    T, E, k = case.sizes["T"], case.sizes["E"], case.sizes["k"]
    return torch.rand(T, E, generator=generator).topk(k, dim=1).indices


def _full(case: Case, generator: torch.Generator) -> Call:
    T, E = case.sizes["T"], case.sizes["E"]
    return Call(
        (_indices(case, generator), torch.arange(E)),
        {
            "token_mask": torch.rand(T, generator=generator) < 0.7,
            "table": torch.randn(E, generator=generator),
            "token_score": torch.randn(T, generator=generator),
        },
        mutated=(1, "token_score"),
    )


def _counts_only(case: Case, generator: torch.Generator) -> Call:
    return Call((_indices(case, generator), torch.zeros(case.sizes["E"], dtype=torch.int64)), mutated=(1,))


def _index_type(dtype: torch.dtype):  # type: ignore[no-untyped-def]
    def build(case: Case, generator: torch.Generator) -> Call:
        call = _full(case, generator)
        return Call((call.args[0].to(dtype), call.args[1]), call.kwargs, mutated=call.mutated)

    return build


def _outside(case: Case, generator: torch.Generator) -> Call:
    call = _full(case, generator)
    indices = call.args[0].clone()
    indices[::3, 0] = -1
    indices[1::3, -1] = case.sizes["E"] + 5
    return Call((indices, call.args[1]), call.kwargs, mutated=call.mutated)


def _strided(case: Case, generator: torch.Generator) -> Call:
    T, E, k = case.sizes["T"], case.sizes["E"], case.sizes["k"]
    indices = torch.zeros(2 * T, 3 * k, dtype=torch.int64)[::2, ::3]
    indices.copy_(_indices(case, generator))
    return Call(
        (indices, torch.zeros(E, 2, dtype=torch.int64)[:, 1]),
        {
            "token_mask": (torch.rand(T, 3, generator=generator) < 0.5)[:, 1],
            "table": torch.randn(2 * E, generator=generator)[::2],
            "token_score": torch.randn(T, 2, generator=generator)[:, 0],
        },
        mutated=(1, "token_score"),
    )


def _gated(value: int):  # type: ignore[no-untyped-def]
    def build(case: Case, generator: torch.Generator) -> Call:
        call = _full(case, generator)
        gate = torch.tensor(value, dtype=torch.int32)
        return Call(call.args, {**call.kwargs, "gate": gate}, mutated=call.mutated)

    return build


def _eager(
    indices: torch.Tensor,
    counts: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    token_score: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> None:
    """What one writes without this op: a masked bincount and a gather-sum."""
    if gate is not None and gate.item() == 0:
        return
    E = counts.shape[0]
    experts = indices.long()
    valid = (experts >= 0) & (experts < E)
    counted = valid if token_mask is None else valid & token_mask[:, None]
    counts += torch.bincount(experts[counted], minlength=E)
    if table is not None and token_score is not None:
        token_score += torch.where(valid, table[experts.clamp(0, E - 1)], 0).sum(1)


def _traffic(case: Case) -> Traffic:
    T, E, k = case.sizes["T"], case.sizes["E"], case.sizes["k"]
    return Traffic(bytes=T * (8 * k + 1 + 8) + 16 * E + 4 * E, flops=2 * T * k)


_SMALL = {"T": 37, "E": 60, "k": 6}

OP = OpCases(
    function=record_routing_,
    cases=(
        Case("full", _SMALL, _full),
        Case("counts_only", _SMALL, _counts_only),
        Case("one_token", {"T": 1, "E": 8, "k": 8}, _full),
        Case("empty", {"T": 0, "E": 8, "k": 2}, _full),
        Case("many_tokens", {"T": 20011, "E": 128, "k": 8}, _full),
        Case("outside", _SMALL, _outside),
        Case("strided", _SMALL, _strided),
        Case("gate_open", _SMALL, _gated(1)),
        Case("gate_closed", _SMALL, _gated(0)),
        *(
            Case(f"index_{str(dtype).removeprefix('torch.')}", _SMALL, _index_type(dtype))
            for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32)
        ),
        *(
            Case(f"bench_{T}x{E}", {"T": T, "E": E, "k": 8}, _full, benchmark=True)
            for T, E in ((2048, 128), (16384, 64), (16384, 128), (16384, 256))
        ),
    ),
    traffic=_traffic,
    eager=_eager,
)
