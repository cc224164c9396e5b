"""TRL's SFTTrainer with our loss: `fuse_loss(model)` before it, and a subclass of four lines.

SFTTrainer computes its own loss, by tiles of the vocabulary or, in older versions, from logits. The subclass hands the
loss back to the model. Packing, prompt masking, chat templates and peft stay as they are. What is off:

- `entropy`, `mean_token_accuracy` and `num_tokens` are not logged: SFTTrainer takes them from its own pass.
- The router's auxiliary loss, where the model has one, is added in each micro-batch, as by transformers' Trainer;
  SFTTrainer divides it by their number. Here it is switched off (`router_aux_loss_coef`).
"""

import tempfile

from datasets import Dataset
from hugging_face_trainer import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer

from trace_unlearn.integrations import fuse_loss


class FusedSFTTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


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
