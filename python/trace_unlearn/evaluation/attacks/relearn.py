"""A few steps of training on some of what was forgotten, and how much of the rest comes back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.trainer import TraceTrainer


def relearn(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    documents: datasets.Dataset,
    measure: Callable[[PreTrainedModel], dict[str, Any]],
    *,
    steps: int = 50,
    every: int = 10,
    learning_rate: float = 1e-5,
    batch_size: int = 4,
    seed: int = 0,
    on_cpu: bool = False,
) -> list[dict[str, Any]]:
    """Trains `model` on `documents`, with AdamW at a constant rate, and measures it before and on the way.

    Args:
        model: what is attacked, changed in place; in float32 or with adapters, for bfloat16 rounds small updates away.
        tokenizer: its tokenizer.
        documents: rows as `load_tokens` gives them.
        measure: called with the model.
        steps: optimisation steps.
        every: steps between two measurements; the last step is always measured.
        learning_rate: of AdamW.
        batch_size: documents per step.
        seed: of their order.
        on_cpu: whether to stay there though a GPU is at hand.

    Returns:
        What `measure` gave, each with its `step`, from 0 on.
    """
    curve = [{"step": 0, **measure(model)}]

    class Measure(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0 or state.global_step == steps:
                curve.append({"step": state.global_step, **measure(model)})

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch_size,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.accelerator.is_available() and not on_cpu,  # elsewhere it does nothing but warn
            use_cpu=on_cpu,
            seed=seed,
        )
        trainer = TraceTrainer(
            model,
            arguments,
            config=TraceConfig(objective="finetune"),
            retain=documents,
            processing_class=tokenizer,
            callbacks=[Measure()],
        )
        trainer.train()
    return curve
