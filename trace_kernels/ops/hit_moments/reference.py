"""The definitions of `hit_scores`, `hit_moments` and `hit_order`, in plain torch."""

from __future__ import annotations

import torch

_CHUNK = 1 << 14  # rows whose bits are float64 at a time


def _bits(hits: torch.Tensor, num_bits: int) -> torch.Tensor:
    """[n, M] float64."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=hits.device)
    return ((hits[:, :, None] >> shifts) & 1).flatten(1)[:, :num_bits].double()


def hit_scores(hits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    parts = [_bits(part, values.shape[0]) @ values for part in torch.split(hits, _CHUNK)]
    return torch.cat([values.new_zeros(0), *parts])


def hit_moments(hits: torch.Tensor, weights: torch.Tensor, num_bits: int, order: int) -> torch.Tensor:
    total = weights.new_zeros((num_bits,) * order)
    for part, weight in zip(torch.split(hits, _CHUNK), torch.split(weights, _CHUNK), strict=True):
        bits = _bits(part, num_bits)
        total += weight @ bits if order == 1 else (bits * weight[:, None]).T @ bits
    return total


def hit_order(hits: torch.Tensor) -> torch.Tensor:
    order = torch.arange(hits.shape[0], device=hits.device)
    for column in range(hits.shape[1] - 1, -1, -1):  # stable from the last byte on: the first one decides
        order = order[hits[order, column].sort(stable=True).indices]
    return order
