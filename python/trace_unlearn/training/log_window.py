"""What TraceTrainer logs, summed on the device between two log entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class LogWindow:
    """Sums what is logged, on the device, between two log entries."""

    def __init__(self, device: torch.device) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._largest = torch.zeros((), dtype=torch.float32, device=device)

    @torch.no_grad()
    def add(self, values: Mapping[str, torch.Tensor], share: torch.Tensor) -> None:
        """Adds a micro-batch's shares of the step's values; it is itself this `share` of the step."""
        for name, value in {**values, "steps": share}.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()

    @torch.no_grad()
    def add_weights(self, weight: torch.Tensor, tokens: torch.Tensor) -> None:
        """Adds the weights of a micro-batch's retain tokens, so many."""
        for name, value in (("weight", weight.sum()), ("squared", weight.square().sum()), ("tokens", tokens)):
            self._sums[name] = self._sums.get(name, 0) + value.double()
        if weight.numel():
            self._largest = torch.maximum(self._largest, weight.max())

    def close(self, accelerator: Any) -> dict[str, float]:
        """What is to be logged, over all processes; begins anew."""
        if not self._sums:
            return {}
        sums = dict(
            zip(self._sums, accelerator.reduce(torch.stack([*self._sums.values()]), "sum").tolist(), strict=True)
        )
        largest = accelerator.gather(self._largest.reshape(1)).max().item()
        self._sums.clear()
        self._largest.zero_()
        steps = max(sums.pop("steps"), 1e-9)
        weights: dict[str, float] = {}
        if "tokens" in sums:
            tokens, weight, squared = max(sums.pop("tokens"), 1.0), sums.pop("weight"), sums.pop("squared")
            ess = weight**2 / (tokens * squared) if squared else 0.0
            weights = {"weight_mean": weight / tokens, "weight_max": largest, "weight_ess": ess}
        return {**{name: value / steps for name, value in sums.items()}, **weights}
