"""Calls of the compiled kernel of `route_hits`."""

from __future__ import annotations

import functools

import torch

from trace_kernels.runtime import native as compiled
from trace_kernels.runtime.native import native, num_threads

cpu_unavailable = functools.partial(compiled.cpu_unavailable, "route_hits_cpu")


def refuse_cpu(routes: torch.Tensor, *args: object) -> str | None:
    return None if routes.device.type == "cpu" else f"routes are on {routes.device}, it serves the cpu only"


def forward_cpu(routes: torch.Tensor, selected: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    N, L, k = routes.shape
    M = selected.shape[0]
    routes, selected = routes.contiguous(), selected.contiguous()
    counts = torch.empty(L, num_experts, dtype=torch.int64)
    hits = torch.empty(N, (M + 7) // 8, dtype=torch.uint8)
    native().route_hits_cpu(
        routes.data_ptr(),
        routes.element_size(),
        routes.dtype.is_signed,
        N,
        L,
        k,
        num_experts,
        selected.data_ptr(),
        M,
        counts.data_ptr(),
        hits.data_ptr(),
        num_threads(),
    )
    return counts, hits
