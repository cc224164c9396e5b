"""The definition of `route_hits`, in plain torch."""

from __future__ import annotations

import torch

_CHUNK = 1 << 16  # tokens whose comparisons exist at a time


def route_hits(routes: torch.Tensor, selected: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    N, L, _ = routes.shape
    M = selected.shape[0]
    counts = torch.zeros(L, num_experts, dtype=torch.int64, device=routes.device)
    hits = torch.zeros(N, (M + 7) // 8, dtype=torch.uint8, device=routes.device)
    pairs = selected.tolist()
    for begin in range(0, N, _CHUNK):
        part = routes[begin : begin + _CHUNK].long()
        for layer in range(L):
            experts = part[:, layer].flatten()
            inside = experts[(experts >= 0) & (experts < num_experts)]
            counts[layer] += torch.bincount(inside, minlength=num_experts)
        for bit, (layer, expert) in enumerate(pairs):
            hit = (part[:, layer] == expert).any(dim=1).to(torch.uint8)
            hits[begin : begin + _CHUNK, bit // 8] |= hit << (7 - bit % 8)
    return counts, hits
