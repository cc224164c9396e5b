"""The documents of open-unlearning's data, recognised in its batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import torch

from trace_unlearn.sources.encoding import IGNORE_INDEX


def rows_of(batch: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The (input_ids, labels) of each row."""
    return list(zip(batch["input_ids"].cpu(), batch["labels"].cpu(), strict=True))


def document_key(ids: torch.Tensor, labels: torch.Tensor, pad_token_id: int) -> bytes:
    """The same for a document and for its row, padded on either side: up to its last label, from its first token."""
    labelled = labels != IGNORE_INDEX
    end = int(labelled.nonzero()[-1]) + 1 if labelled.any() else 0
    begins = ((ids != pad_token_id) | labelled)[:end].nonzero()
    inside = slice(int(begins[0]) if len(begins) else end, end)
    return ids[inside].to(torch.int64).numpy().tobytes() + labels[inside].to(torch.int64).numpy().tobytes()


def as_dataset(documents: Any) -> datasets.Dataset:
    """All documents as rows of input_ids and labels; of one with an alternate, the original."""
    rows = [originals(documents[i]) for i in range(len(documents))]
    return datasets.Dataset.from_dict({name: [row[name].tolist() for row in rows] for name in ("input_ids", "labels")})


def originals(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a document or a batch with alternate answers, the ones to forget."""
    found: Mapping[str, Any] = row.get("original", row)
    return found
