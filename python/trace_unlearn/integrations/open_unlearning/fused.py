"""What all trainers share: a model whose losses are computed from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

import trace_kernels as tk
from trace_unlearn.errors import UserError
from trace_unlearn.integrations.open_unlearning.hidden import fuse_loss, fused_loss_of

SHARDED = (
    "open-unlearning: DeepSpeed and FSDP split the model, and TRACE reads the whole one before training; launch it "
    "without them (DDP works), or run trace-unlearn, whose trainer takes sharded models"
)


class FusedTrainer:
    """Before one of open-unlearning's classes, whose arguments it takes."""

    # Trainer's.
    model: Any
    args: Any
    train_dataset: Any
    data_collator: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._fused = fuse_loss(kwargs["model"])  # first: a reference model is a copy of it, and is fused, too
        super().__init__(*args, **kwargs)
        self.refuse_sharded()
        self.pad_token_id = _pad_token_id(self)

    def refuse_sharded(self) -> None:
        trainer: Any = self
        if trainer.is_deepspeed_enabled or getattr(trainer, "is_fsdp_enabled", False) or self.args.fsdp:
            raise UserError(SHARDED)

    def ask(self, model: Any, inputs: Mapping[str, torch.Tensor], function: Callable[..., Any]) -> Any:
        """What `function` makes of the hidden states, as `FusedLoss.per_token` calls it."""
        if "labels" not in inputs:
            raise UserError(
                "open-unlearning: a batch has no labels; allowed are data sets and collators that give them"
            )
        given: dict[str, Any] = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        if getattr(self.model.config, "output_router_logits", False):
            given["output_router_logits"] = False  # the auxiliary loss would be ascended, too
        handle = fused_loss_of(self.accelerator.unwrap_model(model))
        assert handle is not None
        with handle.per_token(function):
            return model(**given, use_cache=False).loss

    def log_probs(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Log p of every next token, [B, S] float32; 0 where it is not labelled."""

        def compute(hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
            return tk.linear_log_prob(hidden, head, target, **options)

        return self.ask(model, inputs, compute)  # type: ignore[no-any-return]

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As before: evaluation code reads logits of batches that have labels."""
        with self._fused.paused():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]


def labels_of(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if "labels" not in batch:
        raise UserError(
            f"open-unlearning: a batch has no labels, only {', '.join(batch)}; allowed are data sets with "
            "input_ids, attention_mask and labels"
        )
    return batch["labels"]


def _pad_token_id(trainer: Any) -> int:
    tokenizer = getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise UserError("open-unlearning: the tokenizer has no padding token")
    return int(tokenizer.pad_token_id)  # type: ignore[union-attr]
