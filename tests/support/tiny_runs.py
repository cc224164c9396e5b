"""Small runs of TraceTrainer on random documents, and how to compare two of them."""

from __future__ import annotations

import datasets
import tiny
import torch
from transformers import TrainingArguments

from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.trainer import TraceTrainer

V = 60


def documents(count, seed, weighted=False):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = 6 + (5 * i + seed) % 7
        ids = torch.randint(3, V, (length,), generator=generator).tolist()
        masked = i % 3
        row = {"input_ids": ids, "labels": [-100] * masked + ids[masked:], "prompt": "", "answer": ""}
        if weighted:
            bearing = [float(label != -100) for label in row["labels"][1:]] + [0.0]
            row["token_weight"] = [w * 0.25 * (1 + (i + t) % 9) for t, w in enumerate(bearing)]
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def trainer(folder, model=None, config=None, forget=None, retain=None, **arguments):
    given = {name: arguments.pop(name, None) for name in ("alternate", "retain_eval", "calibration")}
    given["joint_forward"] = arguments.pop("joint_forward", False)
    options = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        **arguments,
    }
    return TraceTrainer(
        model or tiny.model("qwen3_moe", V),
        TrainingArguments(str(folder), **options),
        config=config or TraceConfig(retain_per_forget=2),
        forget=forget or documents(10, 1),
        retain=retain or documents(14, 2, weighted=True),
        **given,
    )


LOGGED = ("loss", "forget_loss", "forget_nll", "retain_loss", "retain_nll", "weight_mean", "weight_ess")


def history(trained, *names):
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    names = names or [name for name in LOGGED if name in entries[0]]
    return torch.tensor([[entry[name] for name in names] for entry in entries])


def parameters(trained):
    return {name: p.detach().clone() for name, p in trained.model.named_parameters() if p.requires_grad}


def assert_same_run(first, second, rtol=2e-5, atol=2e-6):
    torch.testing.assert_close(history(second), history(first), rtol=rtol, atol=atol)
    expected = parameters(first)
    for name, found in parameters(second).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
