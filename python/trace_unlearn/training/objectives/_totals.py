from __future__ import annotations

import torch


def share(values: torch.Tensor, mask: torch.Tensor, total: torch.Tensor | float) -> torch.Tensor:
    """The sum of `values` over the mask, divided by `total`, or by 1 where that is less: nothing to count is 0."""
    counted = total.clamp(min=1) if isinstance(total, torch.Tensor) else max(total, 1)
    return values.where(mask, 0.0).sum() / counted
