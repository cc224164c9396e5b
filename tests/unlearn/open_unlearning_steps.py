"""Trains a tiny MoE with open-unlearning's trainers and with ours; prints the losses of all steps as JSON.

python open_unlearning_steps.py CHECKOUT FOLDER
"""

import json
import sys
from pathlib import Path

import tiny
import torch
from transformers import set_seed

from trace_unlearn.integrations.open_unlearning.__main__ import prepare

CHECKOUT, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
OPTIONS = {"GradDiff": {"alpha": 3.0}, "NPO": {"beta": 0.5}, "SimNPO": {"beta": 4.5, "gamma": 0.125, "delta": 0.1}}


def main() -> None:
    torch.set_num_threads(1)
    prepare(CHECKOUT)
    import trainer as theirs

    for name in OPTIONS:  # transformers 5 renamed one argument and added another
        theirs._register_trainer(spoken_to_as_now(getattr(theirs, name)))
    found = {}
    for name, options in OPTIONS.items():
        found[name] = steps(f"Now{name}", options)
        found[f"Trace{name}"] = steps(f"Trace{name}", {**options, "weights": "uniform"})
    found["weighted"] = steps("TraceGradDiff", OPTIONS["GradDiff"])
    print(json.dumps(found))


def spoken_to_as_now(base: type) -> type:
    class Now(base):
        def __init__(self, *args, tokenizer=None, **kwargs):
            super().__init__(*args, processing_class=tokenizer, **kwargs)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs)

    Now.__name__ = f"Now{base.__name__}"
    return Now


def steps(handler: str, options: dict) -> dict:
    from data.collators import DataCollatorForSupervisedDataset
    from data.unlearn import ForgetRetainDataset
    from omegaconf import OmegaConf
    from trainer import TRAINER_REGISTRY, load_trainer

    set_seed(0)
    tokenizer = tiny.tokenizer()
    model = tiny.model("qwen3_moe", len(tokenizer))
    losses = []

    class Watched(TRAINER_REGISTRY[handler]):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    TRAINER_REGISTRY["Watched"] = Watched
    arguments = {
        "output_dir": str(FOLDER / handler),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "num_train_epochs": 3,
        "logging_dir": "gone from transformers 5",
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    trainer, _ = load_trainer(
        OmegaConf.create({"handler": "Watched", "args": arguments, "method_args": options}),
        model,
        train_dataset=ForgetRetainDataset(documents(8, 1, len(tokenizer)), documents(12, 2, len(tokenizer))),
        tokenizer=tokenizer,
        data_collator=DataCollatorForSupervisedDataset(tokenizer),
    )
    trainer.train()
    found = {"losses": losses, "parameters": sum(p.double().abs().sum().item() for p in model.parameters())}
    ids = torch.arange(4, 9)[None]
    with trainer._fused.paused() if hasattr(trainer, "_fused") else torch.no_grad():
        found["logits"] = list(model(input_ids=ids, labels=ids).logits.shape)
    if hasattr(trainer, "calibration"):
        found["largest_weight"] = trainer.calibration.token_weight.max().item()
    found["second_model"] = getattr(trainer, "ref_model", None) is not None
    return found


def documents(number: int, seed: int, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Of different lengths, so that they are padded; the answer bears loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(number):
        ids = torch.randint(4, vocabulary, (6 + i % 5,), generator=generator)
        labels = ids.clone()
        labels[: 2 + i % 3] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


main()
