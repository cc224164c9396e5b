"""What TraceTrainer logs, summed on the device between two log entries."""

from __future__ import annotations

from typing import Any

import torch

from trace_unlearn.objectives import ForgetBatch


class LogWindow:
    """Sums what is logged, on the device, between two log entries."""

    NAMES = ("forget_loss", "forget_nll", "retain_loss", "retain_nll", "steps", "weight", "weight_squared", "tokens")

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self._largest = torch.zeros((), device=device)

    @torch.no_grad()
    def add(
        self,
        forget: ForgetBatch,
        forget_loss: torch.Tensor,
        retain: torch.Tensor,
        retain_loss: torch.Tensor,
        weight: torch.Tensor,
        mask: torch.Tensor,
        retain_tokens: torch.Tensor,
    ) -> None:
        tokens = mask.sum()
        share = tokens / retain_tokens.clamp(min=1)  # the shares of a step's micro-batches add up to one step
        forget_nll = -forget.log_probs.where(forget.mask, 0.0).sum() / forget.num_tokens.clamp(min=1)
        retain_nll = -retain.where(mask, 0.0).sum() / retain_tokens.clamp(min=1)
        self._sums += torch.stack(
            [forget_loss, forget_nll, retain_loss, retain_nll, share, weight.sum(), weight.square().sum(), tokens]
        )
        if weight.numel():
            self._largest = torch.maximum(self._largest, weight.max())

    def close(self, accelerator: Any) -> dict[str, float]:
        sums = dict(zip(self.NAMES, accelerator.reduce(self._sums, "sum").tolist(), strict=True))
        largest = accelerator.gather(self._largest.reshape(1)).max().item()
        self._sums.zero_()
        self._largest.zero_()
        steps, tokens = max(sums.pop("steps"), 1e-9), max(sums.pop("tokens"), 1.0)
        weight, squared = sums.pop("weight"), sums.pop("weight_squared")
        logs = {name: value / steps for name, value in sums.items()}
        ess = weight**2 / (tokens * squared) if squared else 0.0
        return {**logs, "weight_mean": weight / tokens, "weight_max": largest, "weight_ess": ess}
