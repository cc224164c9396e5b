"""The original model's log-probability of every document, computed once: no second model is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from trace_unlearn.errors import UserError
from trace_unlearn.files import load_tensors, read_json, save_tensors, write_json
from trace_unlearn.sources.data import collate, fingerprint, loss_bearing


class Reference:
    """One sum of log-probabilities a document of each named dataset, kept in the run folder for resuming."""

    def __init__(self, documents: Mapping[str, datasets.Dataset], pad_token_id: int, folder: Path) -> None:
        self._documents, self._pad_token_id = documents, pad_token_id
        self._tensors, self._facts = folder / "reference.safetensors", folder / "reference.json"
        self._sums: dict[str, torch.Tensor] = {}

    def of(self, name: str, documents: torch.Tensor) -> torch.Tensor:
        """[n] float32."""
        return self._sums[name][documents]

    def prepare(
        self,
        accelerator: Any,
        log_probs: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor],
        model: torch.nn.Module,
        resumed: bool,
        args: TrainingArguments,
    ) -> None:
        """Computes and stores the sums before the first step; a resumed run, whose model has moved on, reads them."""
        facts = {f"{name}_fingerprint": fingerprint(dataset) for name, dataset in self._documents.items()}
        if resumed:
            check_facts(self._facts, self._tensors, facts)
            self._sums = {name: sums.to(args.device) for name, sums in load_tensors(self._tensors).items()}
            return
        for name, dataset in self._documents.items():
            sums = torch.zeros(len(dataset), dtype=torch.float32, device=args.device)
            for start, batch in batches(dataset, self._pad_token_id, accelerator, args):
                bearing = loss_bearing(batch["labels"], batch["attention_mask"])
                found = in_eval(model, log_probs, batch).where(bearing, 0.0).sum(-1)
                if start is not None:
                    sums[start : start + len(found)] = found.float()
            self._sums[name] = accelerator.reduce(sums, "sum")
        if args.should_save:
            self._facts.unlink(missing_ok=True)
            save_tensors(self._tensors, self._sums)
            write_json(self._facts, facts)


def check_facts(path: Path, what: Path, expected: Mapping[str, Any], ignore: Sequence[str] = ()) -> None:
    """UserError unless what the first run computed from the original model is there and belongs to this data."""
    if not path.exists():
        raise UserError(
            f"{what}: what the original model says is missing, and the checkpoint is not that model any more; start "
            "again in an empty folder"
        )
    if {name: value for name, value in read_json(path).items() if name not in ignore} != expected:
        raise UserError(f"{what}: belongs to other data than this")


def batches(
    dataset: datasets.Dataset, pad_token_id: int, accelerator: Any, args: TrainingArguments
) -> Iterator[tuple[int | None, dict[str, torch.Tensor]]]:
    """All documents in batches, this process's share of them on the device, each with its first document's number.

    Every process gets as many, since sharded models need all of them; a spare batch has no number.
    """
    size, world, rank = args.per_device_train_batch_size, accelerator.num_processes, accelerator.process_index
    rows = dataset.select_columns(["input_ids", "labels"])
    starts = range(0, len(rows), size)
    for turn in range(0, len(starts), world):
        mine = turn + rank
        start = starts[mine % len(starts)]
        batch = collate([rows[i] for i in range(start, min(start + size, len(rows)))], pad_token_id)
        yield start if mine < len(starts) else None, {name: value.to(args.device) for name, value in batch.items()}


@torch.no_grad()
def in_eval(
    model: torch.nn.Module,
    function: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor],
    batch: dict[str, torch.Tensor],
) -> torch.Tensor:
    """What the function gives without dropout and without a graph."""
    training = model.training
    model.eval()
    try:
        return function(model, batch)
    finally:
        model.train(training)
