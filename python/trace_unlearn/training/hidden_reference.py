"""Hidden states of the original model, streamed from disk: no second model is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import TrainingArguments

from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json, write_json
from trace_unlearn.sources.data import fingerprint, loss_bearing
from trace_unlearn.sources.encoding import IGNORE_INDEX
from trace_unlearn.training.reference import batches, check_facts, in_eval


class HiddenReference:
    """The hidden states at a dataset's loss-bearing positions, [N, H] in a flat file of the run folder.

    The file has N * H numbers of the model's own dtype: 4 GB for a million tokens of width 2048 in bfloat16. Every
    process writes the documents it computed and reads those it needs, so the folder must be shared by all of them.
    """

    def __init__(self, name: str, documents: datasets.Dataset, pad_token_id: int, folder: Path) -> None:
        self._documents, self._pad_token_id = documents, pad_token_id
        self._file, self._facts = folder / f"{name}_hidden.bin", folder / f"{name}_hidden.json"
        counts = [sum(label != IGNORE_INDEX for label in labels[1:]) for labels in documents["labels"]]
        self._offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._states = torch.empty(0)

    def of(self, documents: torch.Tensor) -> torch.Tensor:
        """[n, H] on the CPU: the rows of these documents one after another, each in the order of its positions."""
        parts = [self._states[self._offsets[i] : self._offsets[i + 1]] for i in documents.tolist()]
        return torch.cat(parts) if parts else self._states[:0]

    def prepare(
        self,
        accelerator: Any,
        hidden: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor],
        model: torch.nn.Module,
        resumed: bool,
        args: TrainingArguments,
    ) -> None:
        """Computes and stores the states before the first step; a resumed run, whose model has moved on, reads them.

        `hidden(model, batch)` gives [B, S, H].
        """
        facts: dict[str, Any] = {"fingerprint": fingerprint(self._documents), "rows": int(self._offsets[-1])}
        if resumed:
            check_facts(self._facts, self._file, facts, ignore=("width", "dtype"))
        else:
            if args.should_save:
                self._facts.unlink(missing_ok=True)
                self._file.unlink(missing_ok=True)
            accelerator.wait_for_everyone()
            for start, batch in batches(self._documents, self._pad_token_id, accelerator, args):
                bearing = loss_bearing(batch["labels"], batch["attention_mask"])
                found = in_eval(model, hidden, batch)
                if self._states.dim() == 1:
                    facts |= {"width": found.shape[-1], "dtype": str(found.dtype).removeprefix("torch.")}
                    self._states = self._map(facts, write=True)
                if start is not None:
                    last = start + len(bearing)
                    self._states[self._offsets[start] : self._offsets[last]] = found[bearing].cpu()
            accelerator.wait_for_everyone()
            if args.should_save:
                write_json(self._facts, facts)
            accelerator.wait_for_everyone()
        self._states = self._map(None, write=False)

    def _map(self, facts: dict[str, Any] | None, write: bool) -> torch.Tensor:
        facts = facts or read_json(self._facts)
        rows, width = facts["rows"], facts["width"]
        dtype = getattr(torch, facts["dtype"])
        if rows == 0:
            return torch.empty(0, width, dtype=dtype)
        size = rows * width * dtype.itemsize
        try:
            if not write and self._file.stat().st_size != size:
                raise UserError(f"{self._file}: has {self._file.stat().st_size} bytes, expected {size}")
            self._file.parent.mkdir(parents=True, exist_ok=True)
            flat = torch.from_file(str(self._file), shared=write, size=rows * width, dtype=dtype)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self._file}: cannot {'write' if write else 'read'} it: {error}") from error
        return flat.view(rows, width)
