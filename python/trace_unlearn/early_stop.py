"""When enough is forgotten, or too much: training stops at thresholds that are measured every so many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from trace_unlearn.config import TraceConfig
from trace_unlearn.data import loss_bearing
from trace_unlearn.reference import batches, in_eval


class EarlyStop:
    """Measures the mean loss a token of the first `config.stop_documents` documents of a set.

    The measure depends on the model alone, so a run that was killed comes to the same decision when it goes on.
    """

    def __init__(self, config: TraceConfig, sets: Mapping[str, datasets.Dataset | None], pad_token_id: int) -> None:
        self._config, self._pad_token_id = config, pad_token_id
        limits = {"forget": config.stop_forget_nll, "retain": config.stop_retain_nll}
        self._limits = {name: limit for name, limit in limits.items() if limit is not None}
        self._sets = {
            name: documents.select(range(min(config.stop_documents, len(documents))))
            for name, documents in sets.items()
            if name in self._limits and documents is not None
        }

    def due(self, step: int) -> bool:
        return bool(self._limits) and step % self._config.stop_every == 0

    def measure(
        self,
        accelerator: Any,
        log_probs: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor],
        model: torch.nn.Module,
        args: TrainingArguments,
    ) -> dict[str, float]:
        """stop_forget_nll and stop_retain_nll, as far as they are limited; all processes take part."""
        found: dict[str, float] = {}
        for name, documents in self._sets.items():
            sums = torch.zeros(2, dtype=torch.float64, device=args.device)
            for start, batch in batches(documents, self._pad_token_id, accelerator, args):
                bearing = loss_bearing(batch["labels"], batch["attention_mask"])
                losses = -in_eval(model, log_probs, batch).where(bearing, 0.0)
                if start is not None:  # else a spare batch, which another process counts
                    sums += torch.stack([losses.double().sum(), bearing.sum().double()])
            total, tokens = accelerator.reduce(sums, "sum").tolist()
            found[f"stop_{name}_nll"] = total / max(tokens, 1.0)
        return found

    def reached(self, found: Mapping[str, float]) -> bool:
        """Whether a measure has come to its limit; NaN has."""
        return any(not found[f"stop_{name}_nll"] < limit for name, limit in self._limits.items())
