"""The original model's log-probability of every forget document, computed once: no second model is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from trace_unlearn.data import collate, fingerprint, loss_bearing
from trace_unlearn.errors import UserError
from trace_unlearn.files import load_tensors, read_json, save_tensors, write_json


class Reference:
    """[D] float32, one sum of log-probabilities a document, kept in the run folder for resuming."""

    def __init__(self, forget: datasets.Dataset, pad_token_id: int, folder: Path) -> None:
        self._forget, self._pad_token_id = forget, pad_token_id
        self._tensors, self._facts = folder / "reference.safetensors", folder / "reference.json"
        self._sums: torch.Tensor | None = None

    def of(self, documents: torch.Tensor) -> torch.Tensor:
        assert self._sums is not None
        return self._sums[documents]

    def prepare(
        self,
        accelerator: Any,
        log_probs: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor],
        model: torch.nn.Module,
        resumed: bool,
        args: TrainingArguments,
    ) -> None:
        """Computes and stores the sums before the first step; a resumed run, whose model has moved on, reads them."""
        identity = fingerprint(self._forget)
        if resumed:
            if not self._facts.exists():
                raise UserError(
                    f"{self._tensors}: the original model's log-probabilities are missing, and the checkpoint "
                    "is not that model any more; start again in an empty folder"
                )
            if read_json(self._facts)["forget_fingerprint"] != identity:
                raise UserError(f"{self._tensors}: belongs to another forget set than this one")
            self._sums = load_tensors(self._tensors)["log_probs"].to(args.device)
            return
        self._sums = self._compute(accelerator, log_probs, model, args)
        if args.should_save:
            self._facts.unlink(missing_ok=True)
            save_tensors(self._tensors, {"log_probs": self._sums})
            write_json(self._facts, {"forget_fingerprint": identity, "documents": len(self._forget)})

    def _compute(
        self,
        accelerator: Any,
        log_probs: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor],
        model: torch.nn.Module,
        args: TrainingArguments,
    ) -> torch.Tensor:
        size, world, rank = args.per_device_train_batch_size, accelerator.num_processes, accelerator.process_index
        rows = self._forget.select_columns(["input_ids", "labels"])
        starts = range(0, len(rows), size)
        sums = torch.zeros(len(rows), device=args.device)
        model.eval()  # the Trainer turns training mode on again at every step
        with torch.no_grad():
            for turn in range(0, len(starts), world):
                # Every process runs every turn, since sharded models need all of them; a spare one repeats a batch.
                mine = turn + rank
                start = starts[mine % len(starts)]
                batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))], self._pad_token_id)
                batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
                bearing = loss_bearing(batch["labels"], batch["attention_mask"])
                found = log_probs(model, batch).where(bearing, 0.0).sum(-1)
                if mine < len(starts):
                    sums[start : start + len(found)] = found.float()
        reduced: torch.Tensor = accelerator.reduce(sums, "sum")
        return reduced
