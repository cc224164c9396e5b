"""Two processes against one: the same losses and weights, whatever is sharded."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_runs import options, record, weights

from trace_unlearn.verbs.train import main

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parents[2] / "support" / "distributed_worker.py"
CONFIGS = Path(__file__).parents[3] / "configs"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
SGD = {"training": {"optim": "sgd", "disable_tqdm": True}, "learning_rate": 0.05}
METHODS = {
    "grad_diff": {"objective": "grad_diff"},
    "best": {"objective": "grad_diff", "alpha": 0.0, "best_forget_nll": 4.02, "stop_documents": 3, "save_steps": 2},
    "npo+kl": {"objective": "npo", "retain_loss": "kl"},
    "rmu": {"objective": "rmu"},
    "simnpo+experts": {"objective": "simnpo", "experts": ["0.1", "1.2"], "anchor": 1.0},
    "lora": {"objective": "npo", "lora_rank": 2, "gradient_checkpointing": True, "weighting": "live"},
}


def launch(tasks, *launcher):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, str(WORKER), json.dumps(tasks)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr


def one_process(files, folder, methods, **changes):
    for name in methods:
        given = options(files, folder / name, per_device_train_batch_size=4, **{**SGD, **METHODS[name], **changes})
        main(given, lambda message: None)


def tasks(files, folder, methods, stand_in=True, stop=None, **changes):
    given = {
        name: options(
            files,
            folder / name,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            **{**SGD, **METHODS[name], **changes},
        )
        for name in methods
    }
    return [
        {"task": "train", "options": dataclasses.asdict(o), "stand_in": stand_in, "stop": stop} for o in given.values()
    ]


def assert_same_runs(first, second, methods):
    for method in methods:
        logs = []
        for folder in (first, second):
            entries = [entry for entry in record(folder / method)["log"] if "loss" in entry]
            names = sorted(n for n in entries[0] if n.endswith(("loss", "nll", "norm")) or n.startswith("weight_"))
            assert len(names) >= 6
            logs.append(torch.tensor([[entry[name] for name in names] for entry in entries]))
        assert len(logs[0]) == 4
        torch.testing.assert_close(*logs, rtol=2e-5, atol=4e-6, msg=lambda m, method=method: f"{method}: {m}")
        if not (second / method / "adapter_config.json").exists():
            expected, found = weights(first / method), weights(second / method)
            assert found.keys() == expected.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-6)


def test_ddp(files, tmp_path):
    methods = ["grad_diff", "npo+kl", "rmu", "simnpo+experts"]
    one_process(files, tmp_path / "one", methods)
    counting = {"task": "divided", "folder": files["model"], "stand_in": False}
    launch([*tasks(files, tmp_path / "two", methods, stand_in=False), counting], *TORCHRUN)
    assert_same_runs(tmp_path / "one", tmp_path / "two", methods)


def test_fsdp2(files, tmp_path):
    """From the configuration file that users take; each run is broken off in its third step and goes on."""
    methods = ["best", "npo+kl", "lora"]
    # A large epsilon: else a gradient that is zero but for rounding moves a weight by the learning rate.
    adam = {"training": {"disable_tqdm": True, "adam_epsilon": 1e-2}, "learning_rate": 1e-2}
    one_process(files, tmp_path / "one", methods, **adam)
    launcher = ["accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2.yaml"), "--num_processes", "2"]
    runs = tasks(files, tmp_path / "two", methods, stop=3, device=None, save_steps=2, **adam)
    launch([*runs, {"task": "counts"}], *launcher, "--main_process_port", "0")
    assert_same_runs(tmp_path / "one", tmp_path / "two", methods)
    first, second = (record(tmp_path / name / "best")["best"] for name in ("one", "two"))
    assert (second["step"], second["trained_steps"], second["reached"]) == (2, 4, True)
    assert second == pytest.approx(first, rel=1e-4)
    assert (tmp_path / "two" / "lora" / "adapter_model.safetensors").exists()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_zero(files, tmp_path):
    one_process(files, tmp_path / "one", methods := ["grad_diff", "npo+kl", "rmu"])
    runs = []
    for stage, some in ((2, ["npo+kl"]), (3, methods)):
        training = {**SGD["training"], "deepspeed": str(CONFIGS / f"zero{stage}.json")}
        runs += tasks(files, tmp_path / str(stage), some, device=None, save_steps=2, stop=3, training=training)
    launch(runs, *TORCHRUN)
    assert_same_runs(tmp_path / "one", tmp_path / "2", ["npo+kl"])
    assert_same_runs(tmp_path / "one", tmp_path / "3", methods)
