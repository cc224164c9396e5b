"""The definition of `record_routing_`, in plain torch."""

from __future__ import annotations

import torch


def record_routing_(
    indices: torch.Tensor,
    counts: torch.Tensor,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> None:
    num_experts = counts.shape[0]
    experts = indices.long()
    valid = (experts >= 0) & (experts < num_experts)  # [T, k]
    # Skipped entries go to one extra bin: a fixed shape needs no look at the values.
    slot = torch.where(valid, experts, num_experts)
    counted = valid if token_mask is None else valid & token_mask[:, None]
    on = 1 if gate is None else (gate != 0).long()
    added = torch.zeros(num_experts + 1, dtype=torch.int64, device=indices.device)
    added.index_add_(0, slot.flatten(), counted.flatten().long())
    counts += on * added[:num_experts]
    if table is not None and token_score is not None:
        values = torch.cat([table, table.new_zeros(1)])[slot]  # [T, k]
        total = values.sum(dim=1)
        token_score += torch.where(torch.as_tensor(on, device=total.device) != 0, total, torch.zeros_like(total))
