"""What the losses need of the original model, which is not kept in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, TrainingArguments

from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.forward import Forward, ReferenceRows, Seen
from trace_unlearn.training.hidden_reference import HiddenReference
from trace_unlearn.training.objectives import ForgetBatch, steering_vector
from trace_unlearn.training.reference import Reference, in_eval


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
        self._sums: Reference | None = None
        if method.needs_reference:
            sets = {"forget": forget, "alternate": alternate}
            documents = {name: given for name, given in sets.items() if given is not None}
            self._sums = Reference(documents, pad_token_id, folder)
        self._needed: dict[str, datasets.Dataset] = {}
        if method.needs_divergence and forget is not None:
            self._needed["forget"] = forget
        if (config.retain_loss == "kl" or method.on_hidden_states) and retain is not None:
            self._needed["retain"] = retain
        self._hidden: dict[str, HiddenReference] = {}
        if self._adapted is None:
            self._hidden = {
                name: HiddenReference(name, documents, pad_token_id, folder) for name, documents in self._needed.items()
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
