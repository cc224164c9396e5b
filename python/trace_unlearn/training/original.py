"""What the losses need of the original model, computed once and kept on the disk: no second model is in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, TrainingArguments

from trace_unlearn.errors import UserError
from trace_unlearn.files import load_tensors, read_json, save_tensors, write_json
from trace_unlearn.sources.data import fingerprint, loss_bearing
from trace_unlearn.sources.encoding import IGNORE_INDEX
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.forward import Forward, ReferenceRows, Seen
from trace_unlearn.training.objectives import ForgetBatch, steering_vector
from trace_unlearn.training.passes import batches, in_eval


class Original:
    """One log-probability a document (NPO, DPO) and hidden states (KL, UNDIAL, RMU), as far as they are needed.

    The log-probabilities, and the hidden states of a model whose own weights are trained, are computed once before the
    first step and kept in the run folder. Under adapters hidden states cost no disk: the adapters are switched off for
    another forward.

    Args:
        model: as TraceTrainer takes it.
        config: decides what is needed.
        forward: of the same model.
        forget, retain, alternate: the documents.
        pad_token_id: for batches of them.
        args: of the Trainer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: TraceConfig,
        forward: Forward,
        forget: datasets.Dataset | None,
        retain: datasets.Dataset | None,
        alternate: datasets.Dataset | None,
        pad_token_id: int,
        args: TrainingArguments,
    ) -> None:
        method, folder = config.method, Path(str(args.output_dir))
        self._config, self._forward, self._args = config, forward, args
        self._adapted: Any = model if hasattr(model, "disable_adapter") else None
        self._sums: DocumentSums | None = None
        if method.needs_reference:
            sets = {"forget": forget, "alternate": alternate}
            documents = {name: given for name, given in sets.items() if given is not None}
            self._sums = DocumentSums(documents, pad_token_id, folder)
        self._needed: dict[str, datasets.Dataset] = {}
        if method.needs_divergence and forget is not None:
            self._needed["forget"] = forget
        if (config.retain_loss == "kl" or method.on_hidden_states) and retain is not None:
            self._needed["retain"] = retain
        self._hidden: dict[str, HiddenStates] = {}
        if self._adapted is None:
            self._hidden = {
                name: HiddenStates(name, documents, pad_token_id, folder) for name, documents in self._needed.items()
            }

    def prepare(self, accelerator: Any, model: torch.nn.Module, resumed: bool) -> None:
        """Before the first step: computes and stores; in a resumed run: reads."""
        if self._sums is not None:
            self._sums.prepare(accelerator, self._forward.log_probs, model, resumed, self._args)
        for hidden in self._hidden.values():
            hidden.prepare(accelerator, self._forward.hidden, model, resumed, self._args)

    def rows(
        self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], bearing: torch.Tensor
    ) -> ReferenceRows | None:
        """Hidden states at the loss-bearing positions of the documents that need them; call it before the forward."""
        if not self._needed:
            return None
        chosen = torch.stack([inputs[f"{name}_index"] >= 0 for name in self._needed]).any(0)
        if not chosen.any():
            return None
        mask = bearing & chosen[:, None]
        if self._adapted is not None:
            names = ("input_ids", "attention_mask", "labels")
            batch = {name: inputs[name][chosen] for name in names}
            with self._adapted.disable_adapter():
                states = in_eval(model, self._forward.hidden, batch)
            return ReferenceRows(mask, states[bearing[chosen]])
        # Forget documents come first in a batch, and so do their positions in the mask.
        parts = [
            self._hidden[name].of(index[index >= 0])
            for name, index in ((name, inputs[f"{name}_index"]) for name in ("forget", "retain"))
            if name in self._hidden
        ]
        return ReferenceRows(mask, torch.cat(parts).to(bearing.device))

    def forget_batch(
        self,
        seen: Seen,
        inputs: Mapping[str, torch.Tensor],
        bearing: torch.Tensor,
        num_tokens: torch.Tensor,
        num_documents: torch.Tensor,
    ) -> ForgetBatch:
        """The forget documents of a micro-batch with all that the objective needs of the original model."""
        index = inputs["forget_index"]
        is_forget, is_alternate = index >= 0, (index < 0) & (inputs["retain_index"] < 0)
        given: dict[str, Any] = {"log_probs": bearing.new_zeros(0).float(), "reference": None}
        if seen.log_probs is not None:
            given["log_probs"] = seen.log_probs[is_forget]
        if self._sums is not None:
            given["reference"] = self._sums.of("forget", index[is_forget])
            if self._config.method.needs_alternate:
                assert seen.log_probs is not None
                given["alternate"] = seen.log_probs.where(bearing, 0.0)[is_alternate].sum(-1)
                given["alternate_reference"] = self._sums.of("alternate", index[is_forget])
        if self._config.method.needs_divergence:
            assert seen.divergence is not None
            assert seen.reference_log_probs is not None
            given["divergence"] = seen.divergence[is_forget]
            given["reference_log_probs"] = seen.reference_log_probs[is_forget]
        if seen.hidden is not None:
            given["hidden"] = seen.hidden[is_forget]
            vector = steering_vector(seen.hidden.shape[-1], self._config.steering, self._args.seed)
            given["steering"] = vector.to(seen.hidden.device)
        return ForgetBatch(mask=bearing[is_forget], num_tokens=num_tokens, num_documents=num_documents, **given)


class DocumentSums:
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
            _check_facts(self._facts, self._tensors, facts)
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


def _check_facts(path: Path, what: Path, expected: Mapping[str, Any], ignore: Sequence[str] = ()) -> None:
    """UserError unless what the first run computed from the original model is there and belongs to this data."""
    if not path.exists():
        raise UserError(
            f"{what}: what the original model says is missing, and the checkpoint is not that model any more; start "
            "again in an empty folder"
        )
    if {name: value for name, value in read_json(path).items() if name not in ignore} != expected:
        raise UserError(f"{what}: belongs to other data than this")


class HiddenStates:
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
            _check_facts(self._facts, self._file, facts, ignore=("width", "dtype"))
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
