"""What `plan` says, against what training really allocates."""

import dataclasses
import json

import pytest
import tiny
import torch
from tiny_runs import trainer

from trace_unlearn.errors import UserError
from trace_unlearn.sources.model import load_model
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.trainable import LoraOptions, add_lora, train_only
from trace_unlearn.verbs.cli import main as command
from trace_unlearn.verbs.plan import GB, PlanOptions, check, estimate, trained_in
from trace_unlearn.verbs.train import TrainOptions


def measured(folder, optimizer, dtype, lora_rank=0, trainable=()):
    """The bytes of weights, gradients and optimiser state after a step."""
    model = load_model(folder, dtype=dtype, device="cpu").train()
    if lora_rank:
        model = add_lora(model, LoraOptions(lora_rank))
    elif trainable:
        train_only(model, trainable)
    stepping = optimizer([p for p in model.parameters() if p.requires_grad])
    ids = torch.arange(3, 63)[None]
    (loss := model(input_ids=ids, labels=ids).loss).backward()
    stepping.step()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = sum(value.nbytes for state in stepping.state.values() for name, value in state.items() if name != "step")
    assert loss.isfinite()
    return sum(p.nbytes for p in model.parameters()), gradients, states


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "sgd", "dtype": "bfloat16"},
        {"lora_rank": 2, "dtype": "bfloat16"},
        {"trainable": [r"layers\.1\.mlp\.experts"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_optimizer_are_exact(changes, tied, checkpoint):
    # 8 experts, 2 of them a token: all are reached by 60 tokens, and stacked weights have whole gradients anyway.
    folder = checkpoint("qwen3_moe", tie_word_embeddings=tied)
    training = {"optim": changes["optimizer"]} if "optimizer" in changes else {}
    changes = {name: value for name, value in changes.items() if name != "optimizer"}
    options = PlanOptions(TrainOptions(str(folder), training=training, **changes))
    plan = estimate(options, check(options))
    given = {name: changes[name] for name in ("lora_rank", "trainable") if name in changes}
    optimizer = torch.optim.SGD if training else torch.optim.AdamW
    expected = measured(folder, optimizer, changes.get("dtype", "auto"), **given)
    assert (plan.weights, plan.gradients, plan.optimizer) == expected


def test_only_the_layers_that_rmu_reaches_have_gradients(checkpoint, tmp_path):
    options = PlanOptions(TrainOptions(str(checkpoint("qwen3_moe")), method=TraceConfig("rmu")))
    trained = trainer(tmp_path, load_model(options.train.model, device="cpu"), TraceConfig("rmu", retain_per_forget=2))
    expected = sum(p.nbytes for p in trained.model.parameters() if p.requires_grad)
    assert estimate(options, check(options)).gradients == expected
    assert expected < sum(p.nbytes for p in trained.model.parameters())


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_size_of_a_checkpoint(lora_rank, checkpoint, tmp_path):
    folder = checkpoint("qwen3_moe")
    options = PlanOptions(TrainOptions(str(folder), lora_rank=lora_rank))
    model = load_model(folder, dtype="auto", device="cpu")
    model = add_lora(model, LoraOptions(lora_rank)) if lora_rank else model
    saving = {"optim": "adamw_torch", "max_steps": 1, "save_strategy": "steps"}
    trainer(tmp_path, model, **saving).train()
    found = sum(
        path.stat().st_size for path in tmp_path.glob("checkpoint-1/*") if path.suffix in (".safetensors", ".pt")
    )
    assert 0 <= found - estimate(options, check(options)).checkpoint < 60_000  # names, and a header a tensor


def test_sharding_divides(checkpoint):
    options = PlanOptions(TrainOptions(str(checkpoint("qwen3_moe"))))
    config = check(options)
    whole = estimate(options, config)
    for sharding, divided in (
        ("ddp", ()),
        ("zero2", ("gradients", "optimizer")),
        ("zero3", ("weights", "gradients", "optimizer")),
        ("fsdp2", ("weights", "gradients", "optimizer")),
    ):
        part = estimate(dataclasses.replace(options, sharding=sharding, processes=4), config)
        for name in ("weights", "gradients", "optimizer"):
            assert getattr(part, name) == getattr(whole, name) / (4 if name in divided else 1)
    kl = estimate(
        dataclasses.replace(options, train=dataclasses.replace(options.train, method=TraceConfig(retain_loss="kl"))),
        config,
    )
    assert whole.reference_avoided == 0
    assert kl.reference_avoided == whole.weights


def test_it_says_what_fits_and_what_to_change(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("qwen3_moe", 80).to_dict()))  # and no weights
    given = ["plan", "--model", str(tmp_path), "--train.method.objective", "npo"]
    assert command([*given, "--memory", "1"]) == 0
    assert "it fits" in capsys.readouterr().out
    assert command([*given, "--memory", "0.00001"]) == 2  # what follows in a script does not begin
    said = capsys.readouterr()
    assert "it does not fit" in said.out
    assert "lora_rank 8" in said.out
    assert "0.00 GB" not in said.out
    assert "memory: it does not fit: " in said.err
    assert "10.00 kB (given)" in said.err
    assert command([*given, "--sharding", "fsdp"]) == 2
    assert "sharding: got 'fsdp', allowed: none, ddp" in capsys.readouterr().err
    with pytest.raises(UserError, match="sharding: got 'none' with 2 processes"):
        check(PlanOptions(TrainOptions(str(tmp_path)), processes=2))


def test_it_reads_the_file_that_run_reads(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny.config("qwen3_moe", 80).to_dict()))
    (tmp_path / "config.yaml").write_text(
        f"model: {tmp_path}\nforget: forget.jsonl\nretain: retain.jsonl\nmax_length: 64\ncalibrate: {{min_ess: 0.3}}\n"
        "train:\n  method: {objective: npo}\n  training: {per_device_train_batch_size: 2, optim: sgd}\n"
    )
    assert command(["plan", "--config", str(tmp_path / "config.yaml"), "--memory", "1"]) == 0
    said = capsys.readouterr().out
    assert "optimiser (sgd)" in said
    short = next(line for line in said.splitlines() if "a plain loss's logits" in line)
    assert command(["plan", "--config", str(tmp_path / "config.yaml"), "--memory", "1", "--max_length", "64000"]) == 0
    assert short not in capsys.readouterr().out
    assert command(["plan", "--config", str(tmp_path / "config.yaml"), "--batch_size", "1"]) == 2


@pytest.mark.parametrize(("memory", "expected"), [(1.0, "float32"), (1e-6, "bfloat16")])
def test_half_precision_is_trained_in_float32_where_that_fits(memory, expected, tmp_path, capsys):
    config = tiny.config("qwen3_moe", 80, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    options = PlanOptions(TrainOptions(str(tmp_path)), memory=memory)
    assert trained_in(options, check(options), memory * GB).train.dtype == expected
    command(["plan", "--model", str(tmp_path), "--memory", str(memory)])
    assert f"the weights are trained in {expected}" in capsys.readouterr().out
    full, half = (
        estimate(PlanOptions(dataclasses.replace(options.train, dtype=dtype)), check(options))
        for dtype in ("float32", "bfloat16")
    )
    assert (full.weights, full.optimizer) == (2 * half.weights, 2 * half.optimizer)
