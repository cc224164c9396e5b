"""Forget and retain documents in one stream of training positions.

Position p of the stream is one forget document with its retain documents, or either alone where there is one set only.
Which ones follows from (seed, p) alone: no random state is kept, so a resumed run, any number of processes and any
split into micro-batches see the same documents in the same optimisation step.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from trace_unlearn.errors import UserError
from trace_unlearn.sources.data import collate

_FORGET, _RETAIN = 0, 1  # the two streams draw different permutations from one seed
_COLUMNS = ("input_ids", "labels", "token_weight")


@functools.lru_cache(maxsize=8)
def _order(size: int, seed: int, stream: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng([seed, stream, epoch]).permutation(size)


class PairDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Forget documents, each with `retain_per_forget` retain documents, addressed by their position in the stream.

    Both sets are gone through in a new random order each time they are used up. An epoch is one pass over the forget
    set (without one, over the retain set), rounded up to whole optimisation steps of `step_size` positions: what fills
    the last step is the beginning of the next order.

    Args:
        forget, retain: datasets with columns input_ids and labels, the retain one with token_weight if it is weighted;
            one of the two may be None.
        alternate: as forget: for each of its documents the one to prefer, in the same order.
        retain_per_forget: retain documents per position, >= 1.
        step_size: positions an optimisation step, over all processes and micro-batches.
        seed: of both orders.
    """

    def __init__(
        self,
        forget: datasets.Dataset | None,
        retain: datasets.Dataset | None,
        *,
        alternate: datasets.Dataset | None = None,
        retain_per_forget: int = 1,
        step_size: int = 1,
        seed: int = 0,
    ) -> None:
        for name, dataset in (("forget", forget), ("retain", retain)):
            if dataset is not None and len(dataset) == 0:
                raise UserError(f"{name}: got no document, allowed is at least one")
        if alternate is not None and forget is not None:
            check_alternates(forget, alternate)
        self.retain_per_forget, self.seed = retain_per_forget, seed
        self._forget, self._retain, self._alternate = (
            dataset and dataset.select_columns([column for column in dataset.column_names if column in _COLUMNS])
            for dataset in (forget, retain, alternate)
        )
        if forget is not None:
            positions = len(forget)
        else:
            assert retain is not None
            positions = math.ceil(len(retain) / retain_per_forget)
        self._length = math.ceil(positions / step_size) * step_size

    def __len__(self) -> int:
        """Positions an epoch."""
        return self._length

    def forget_index(self, position: int) -> int:
        """Which forget document is at this position."""
        assert self._forget is not None
        epoch, offset = divmod(position, len(self._forget))
        return int(_order(len(self._forget), self.seed, _FORGET, epoch)[offset])

    def retain_indices(self, position: int) -> list[int]:
        """Which retain documents go with it."""
        if self._retain is None:
            return []
        first = position * self.retain_per_forget
        draws = (divmod(draw, len(self._retain)) for draw in range(first, first + self.retain_per_forget))
        return [int(_order(len(self._retain), self.seed, _RETAIN, epoch)[offset]) for epoch, offset in draws]

    def __getitem__(self, position: int) -> dict[str, Any]:
        forget = [] if self._forget is None else [self.forget_index(position)]
        retain = self.retain_indices(position)
        return {
            "forget": _rows(self._forget, forget),
            "forget_index": forget,
            "alternate": _rows(self._alternate, forget),
            "retain": _rows(self._retain, retain),
            "retain_index": retain,
        }


def _rows(documents: datasets.Dataset | None, indices: Sequence[int]) -> list[dict[str, Any]]:
    return [] if documents is None else [documents[i] for i in indices]


def check_alternates(forget: datasets.Dataset, alternate: datasets.Dataset) -> None:
    """UserError unless there is one alternate for each forget document, with the same prompt."""
    if len(alternate) != len(forget):
        raise UserError(
            f"alternate: got {len(alternate)} documents, allowed is one for each of the {len(forget)} forget "
            "documents, in their order"
        )
    if "prompt" in forget.column_names and "prompt" in alternate.column_names:
        for number, (prompt, other) in enumerate(zip(forget["prompt"], alternate["prompt"], strict=True)):
            if prompt != other:
                raise UserError(f"alternate: document {number} has the prompt {other!r}, but the forget one {prompt!r}")


class PositionSampler(torch.utils.data.Sampler[int]):
    """The positions of an epoch in order; `set_epoch` goes on to the next ones."""

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset, self.epoch = dataset, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * len(self.dataset)
        return iter(range(start, start + len(self.dataset)))


def split_batch(batch: Mapping[str, torch.Tensor], size: int) -> list[dict[str, torch.Tensor]]:
    """A batch of `PairCollator` in parts: forget documents with their alternates, then `size` retain documents each.

    No part is longer than its longest document.
    """
    is_retain = batch["retain_index"] >= 0
    total, others = len(is_retain), int((~is_retain).sum())
    bounds = [*([0] if others else []), *range(others, total, size), total]
    parts = []
    for first, last in itertools.pairwise(bounds):
        part = {name: values[first:last] for name, values in batch.items()}
        length = int(part["attention_mask"].sum(-1).max())
        parts.append({name: values[:, :length] if values.dim() > 1 else values for name, values in part.items()})
    return parts


class PairCollator:
    """Puts the documents of some positions into one right-padded batch: forget, alternate, retain documents.

    Gives what `data.collate` gives, and forget_index and retain_index [B] int64, which are -1 for other documents.
    Alternate documents have the order of the forget documents. Rows that are plain documents (from an evaluation set)
    are collated as they are.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "forget_index" not in rows[0]:
            plain = collate([{name: row[name] for name in ("input_ids", "labels")} for row in rows], self.pad_token_id)
            return dict(plain)
        forget, alternate, retain = (
            [document for row in rows for document in row[kind]] for kind in ("forget", "alternate", "retain")
        )
        others = forget + alternate
        if retain and "token_weight" in retain[0]:
            others = [{**document, "token_weight": [0.0] * len(document["input_ids"])} for document in others]
        batch = dict(collate(others + retain, self.pad_token_id))
        forget_index, retain_index = (
            [i for row in rows for i in row[f"{kind}_index"]] for kind in ("forget", "retain")
        )
        batch["forget_index"] = torch.tensor(forget_index + [-1] * len(alternate + retain))
        batch["retain_index"] = torch.tensor([-1] * len(others) + retain_index)
        return batch
