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


def document_key(ids: torch.Tensor, labels: torch.Tensor) -> bytes:
    """The same for a document and for its padded row: what it is up to its last label."""
    labelled = (labels != IGNORE_INDEX).nonzero()
    end = int(labelled[-1]) + 1 if len(labelled) else 0
    return ids[:end].to(torch.int64).numpy().tobytes() + labels[:end].to(torch.int64).numpy().tobytes()


def as_dataset(documents: Any) -> datasets.Dataset:
    """All documents as rows of input_ids and labels."""
    rows = [documents[i] for i in range(len(documents))]
    return datasets.Dataset.from_dict({name: [row[name].tolist() for row in rows] for name in ("input_ids", "labels")})
