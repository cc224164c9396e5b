"""A plain transformers Trainer, in mixed precision, whose model never computes logits: `fuse_loss(model)` before it."""

import tempfile

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments, set_seed

from trace_unlearn.integrations import fuse_loss


def tiny_model() -> Qwen3MoeForCausalLM:
    set_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=500,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
    )


def train(model: Qwen3MoeForCausalLM, bf16: bool = True) -> list[float]:
    """The losses of four steps, each of two micro-batches, on rows of which a third bears no loss."""
    ids = torch.randint(500, (16, 24), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :8] = -100
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            bf16=bf16,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def main() -> dict[str, list[float]]:
    plain = train(tiny_model())
    model = tiny_model()
    undo = fuse_loss(model)
    fused = train(model)
    undo()  # the model computes logits again, for generation or another tool
    return {"plain": plain, "fused": fused}


if __name__ == "__main__":
    print(main())
