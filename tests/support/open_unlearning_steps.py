"""Trains a tiny MoE with open-unlearning's trainers and with ours; prints the losses of all steps as JSON.

python open_unlearning_steps.py CHECKOUT FOLDER
python -m torch.distributed.run --nproc_per_node 2 open_unlearning_steps.py CHECKOUT FOLDER
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from transformers import set_seed

from trace_unlearn.integrations.open_unlearning.__main__ import prepare

CHECKOUT, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
RMU = {"module_regex": r"model\.layers\.0", "trainable_params_regex": [".*"], "steering_coeff": 2.0}
CASES = {
    "GradAscent": {},
    "GradDiff": {"alpha": 3.0},
    "GradDiff KL": {"alpha": 3.0, "retain_loss_type": "KL"},
    "GradDiff left": {"alpha": 3.0},
    "NPO": {"beta": 0.5},
    "NPO left": {"beta": 0.5},
    "NPO unlabelled": {"beta": 0.5},
    "DPO": {"beta": 0.5},
    "DPO left": {"beta": 0.5},
    "PDU": {"retain_loss_eps": 0.5, "primal_dual": True, "dual_step_size": 0.7},
    "PDU epoch": {"primal_dual": True, "dual_update_upon": "epoch", "dual_warmup_epochs": 1},
    "NPO KL": {"beta": 0.5, "retain_loss_type": "KL"},
    "SimNPO": {"beta": 4.5, "gamma": 0.125, "delta": 0.1},
    "WGA": {"beta": 0.7},
    "SatImp": {"beta1": 0.5, "beta2": 1.0, "gamma": 0.5, "alpha": 1.0},
    "UNDIAL": {"beta": 3.0, "alpha": 0.5},
    "CEU": {},
    "RMU": {**RMU, "retain_loss_type": "EMBED_DIFF"},
    "RMU left": {**RMU, "retain_loss_type": "EMBED_DIFF"},
    "RMU NLL": {**RMU, "retain_loss_type": "NLL"},
}
# A divergence begins at 0, where Adam follows the rounding of its gradient and SGD does not.
SGD = {"optim": "sgd", "learning_rate": 0.02}
DATA = {case: {"side": "left"} for case in CASES if case.endswith("left")}
DATA |= {case: {"arguments": SGD} for case in CASES if case.endswith("KL")}
DATA["NPO unlabelled"] = {"unlabelled": 3}


def main() -> None:
    torch.set_num_threads(1)
    prepare(CHECKOUT)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    found = {}
    for case, options in CASES.items() if processes == 1 else ():
        method = case.split()[0]
        uniform = {} if method in ("CEU", "GradAscent") else {"weights": "uniform"}
        data = DATA.get(case, {})
        found[case] = steps(method, options, **data)
        found[f"Trace{case}"] = steps(f"Trace{method}", options | uniform, **data)
    for case in ("GradDiff", "GradDiff KL", "RMU") if processes == 1 else ():
        found[f"weighted {case}"] = steps(f"Trace{case.split()[0]}", CASES[case])
    for side in ("left", "right") if processes == 1 else ():
        found[f"weighted {side}"] = steps("TraceNPO", CASES["NPO"] | {"experts_per_layer": 2}, side=side)
    for case in ("NPO", "NPO KL"):  # the same batches whatever the number of processes, of documents of one length
        options = {"batch": 2 // processes, "retain": 1, "length": 9}
        found[f"{case} of 2"] = steps("NPO", CASES[case], **options)
        found[f"Trace{case} of 2"] = steps("TraceNPO", CASES[case] | {"weights": "uniform"}, **options)
    found["weighted of 2"] = steps("TraceNPO", CASES["NPO KL"] | {"experts_per_layer": 2}, **options)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(found))


def steps(
    handler: str,
    options: dict,
    batch: int = 2,
    retain: int = 12,
    length: int | None = None,
    side: str = "right",
    unlabelled: int | None = None,
    arguments: dict | None = None,
) -> dict:
    from data.collators import DataCollatorForSupervisedDataset
    from data.unlearn import ForgetRetainDataset
    from omegaconf import OmegaConf
    from trainer import TRAINER_REGISTRY, load_trainer

    set_seed(0)
    tokenizer = tiny.tokenizer()
    model = tiny.model("qwen3_moe", len(tokenizer))
    losses = []
    # UNDIAL's loss there counts every position: the two are the same where every position is labelled.
    forget = documents(8, 1, len(tokenizer), 9 if "UNDIAL" in handler else length)
    if unlabelled is not None:
        forget[unlabelled]["labels"][:] = -100
    if "DPO" in handler:
        forget = WithAlternates(forget, documents(5, 3, len(tokenizer), length))

    class Watched(TRAINER_REGISTRY[handler]):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    TRAINER_REGISTRY["Watched"] = Watched
    arguments = {
        "learning_rate": 1e-3,
        **(arguments or {}),
        "output_dir": str(FOLDER / handler),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 2,
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
        train_dataset=ForgetRetainDataset(forget, documents(retain, 2, len(tokenizer), length)),
        tokenizer=tokenizer,
        data_collator=DataCollatorForSupervisedDataset(tokenizer, padding_side=side),
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


class WithAlternates:
    """Draws another answer at every look, as open-unlearning's data set of refusals does."""

    def __init__(self, rows: list, others: list) -> None:
        self.rows, self.others = rows, others

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        drawn = torch.randint(0, len(self.others), (1,)).item()
        return {"original": self.rows[index], "alternate": self.others[drawn]}


def documents(number: int, seed: int, vocabulary: int, length: int | None) -> list[dict[str, torch.Tensor]]:
    """Of different lengths, so that they are padded, and the answer bears loss; or all of one length, and labelled."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(number):
        ids = torch.randint(4, vocabulary, (length or 6 + i % 5,), generator=generator)
        labels = ids.clone()
        if length is None:
            labels[: 2 * (i % 3)] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


main()
