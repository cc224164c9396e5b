"""TRL's SFTTrainer with our loss: `fuse_loss(model)` before it, and a subclass with one method.

SFTTrainer computes its own loss, by tiles of the vocabulary or, in older versions, from logits. The subclass takes the
loss, the entropy and the token accuracy from one pass over the head, without logits, and logs them as SFTTrainer does.
Packing, prompt masking, chat templates and peft stay as they are. What is off:

- `num_tokens` is not logged.
- The router's auxiliary loss, where the model has one, is switched off here (`router_aux_loss_coef`).
"""

import tempfile

import torch
from datasets import Dataset
from hugging_face_trainer import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM
from trl import SFTConfig, SFTTrainer

import trace_kernels as tk
from trace_unlearn.integrations import fuse_loss, fused_loss_of


class FusedSFTTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with fused_loss_of(model).per_token(tk.linear_token_stats):
            outputs = model(**inputs, use_cache=False)
        stats, counted = outputs.loss, (inputs["labels"][..., 1:] != -100).sum()
        total = counted if num_items_in_batch is None else num_items_in_batch
        loss = -stats.log_prob.sum() / torch.as_tensor(total).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        metrics = self._metrics["train" if model.training else "eval"]
        sums = torch.stack([counted, stats.entropy.detach().sum(), stats.is_top1.sum()])
        tokens, entropy, hits = self.accelerator.reduce(sums).tolist()
        metrics["entropy"].append(entropy / max(tokens, 1))
        metrics["mean_token_accuracy"].append(hits / max(tokens, 1))
        return (loss, outputs) if return_outputs else loss


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(100))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def train(model: Qwen3MoeForCausalLM, kind: type[SFTTrainer]) -> list[dict[str, float]]:
    """The log of four steps on prompts and completions; only completions bear loss."""
    rows = [
        {"prompt": f"w{i} w{i + 1}", "completion": " " + " ".join(f"w{i + j}" for j in range(2, 4 + i % 5))}
        for i in range(32)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            bf16=False,
            router_aux_loss_coef=0.0,
            use_cpu=True,
        )
        trainer = kind(model, arguments, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> dict[str, list[dict[str, float]]]:
    plain = train(tiny_model(), SFTTrainer)
    model = tiny_model()
    fuse_loss(model)
    return {"plain": plain, "fused": train(model, FusedSFTTrainer)}


if __name__ == "__main__":
    print(main())
