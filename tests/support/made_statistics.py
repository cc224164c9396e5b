"""Routing statistics that are drawn or written down, without a model."""

from __future__ import annotations

import torch

from trace_unlearn.routing.profile import RoutingStatistics


def statistics(seed=0, N=400, L=2, E=8, k=2, D=10, skew=1.5, forget_tokens=1000):
    """Random routing; the forget side prefers the low experts."""
    generator = torch.Generator().manual_seed(seed)

    def routes(tokens, bias):
        logits = torch.randn(tokens, L, E, generator=generator) + bias
        return logits.topk(k, dim=-1).indices

    def counts(chosen):
        return torch.stack([torch.bincount(layer.flatten(), minlength=E) for layer in chosen.unbind(1)])

    retain, forget = routes(N, 0.0), routes(forget_tokens, torch.linspace(skew, 0.0, E))
    offsets = torch.cat([torch.tensor([0]), torch.randint(0, N + 1, (D - 1,), generator=generator).sort().values])
    offsets = torch.cat([offsets, torch.tensor([N])])
    return RoutingStatistics(
        counts(forget),
        counts(retain),
        forget_tokens,
        N,
        k,
        retain.to(torch.uint8),
        offsets,
        {"retain_fingerprint": "x"},
    )


def hit_matrix(stats, selected):
    return torch.stack([(stats.retain_routes[:, i] == e).any(1) for i, e in selected.tolist()], dim=1).double()


def frequencies(stats, weights, selected):
    w = weights.double()
    return (w[:, None] * hit_matrix(stats, selected)).sum(0) / w.sum()


def lonely(stats, layer, expert):
    """The statistics with an expert that no retain token reaches."""
    routes = stats.retain_routes.clone()
    routes[:, layer][routes[:, layer] == expert] = 255
    counts = stats.retain_counts.clone()
    counts[layer, expert] = 0
    return RoutingStatistics(
        stats.forget_counts, counts, stats.forget_tokens, stats.retain_tokens, 2, routes, stats.retain_offsets
    )


def handmade(routes, forget):
    """Statistics of [N][L][k] retain routes and of [L][E] counts over 100 forget tokens."""
    routes = torch.tensor(routes, dtype=torch.uint8)
    N, _, k = routes.shape
    forget = torch.tensor(forget)
    counts = torch.stack(
        [torch.bincount(layer.flatten().int(), minlength=forget.shape[1]) for layer in routes.unbind(1)]
    )
    return RoutingStatistics(forget, counts, 100, N, k, routes, torch.tensor([0, N]))
