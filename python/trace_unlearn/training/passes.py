"""A pass over all documents with the model as it is, by all processes together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from transformers import TrainingArguments

from trace_unlearn.sources.data import collate


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
