"""TRACE in open-unlearning. OPEN_UNLEARNING names a checkout of it; without one its part of the tests is skipped.

OPEN_UNLEARNING_PYTHON may name an interpreter with another transformers, such as the one that the checkout pins.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import open_unlearning_world
import pytest
import yaml

from trace_unlearn.integrations import open_unlearning
from trace_unlearn.integrations.open_unlearning.__main__ import main
from trace_unlearn.integrations.open_unlearning.losses import METHODS

HERE = Path(__file__).parents[2] / "support"
CHECKOUT = os.environ.get("OPEN_UNLEARNING", "")
PYTHON = os.environ.get("OPEN_UNLEARNING_PYTHON", sys.executable)
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="OPEN_UNLEARNING names no checkout of open-unlearning")
CONFIGS = Path(open_unlearning.__file__).parent / "configs" / "trainer"


def run(*command, python=sys.executable, **options):
    done = subprocess.run([python, *map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == options.get("returncode", 0), done.stderr[-3000:]
    return done


@pytest.mark.parametrize("method", METHODS)
def test_configurations_name_what_is_registered(method):
    config = yaml.safe_load((CONFIGS / f"Trace{method}.yaml").read_text())
    assert config["handler"] == f"Trace{method}"
    assert config["defaults"] == [method]


def test_a_folder_without_open_unlearning(tmp_path):
    command = [sys.executable, "-m", "trace_unlearn.integrations.open_unlearning", "--checkout", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --checkout: {tmp_path} holds no src/train.py, allowed is a folder with open-unlearning\n"
    )


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_sharded_models_are_refused_before_anything_is_loaded(name, monkeypatch, capsys):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert main(["--checkout", "nowhere", "trainer=TraceNPO"]) == 2
    assert "launch it without them (DDP works), or run trace-unlearn" in capsys.readouterr().err


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return losses_of_all_steps([], tmp_path_factory.mktemp("one"))


def losses_of_all_steps(launcher, folder):
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [*launcher, HERE / "open_unlearning_steps.py", CHECKOUT, folder]
    done = run(*command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    return json.loads(done.stdout.splitlines()[-1])


CASES = [
    "GradAscent", "GradDiff", "GradDiff left", "GradDiff KL", "NPO", "NPO left", "NPO unlabelled", "NPO KL", "DPO",
    "DPO left", "SimNPO", "WGA", "SatImp", "UNDIAL", "CEU", "RMU", "RMU left", "RMU NLL", "PDU", "PDU epoch",
]  # fmt: skip
WITH_REFERENCE_MODEL = {"GradDiff KL", "NPO KL", "DPO", "DPO left", "UNDIAL", "RMU", "RMU left", "RMU NLL"}


@needs_checkout
@pytest.mark.parametrize("case", CASES)
def test_uniform_weights_reproduce_it_step_for_step(case, one_process):
    theirs, ours = one_process[case], one_process[f"Trace{case}"]
    assert len(ours["losses"]) == len(theirs["losses"]) == 12
    if case not in ("UNDIAL", "CEU"):  # of which the entropy of the target is left out, a constant
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-5)
    assert ours["parameters"] == pytest.approx(theirs["parameters"], rel=1e-7)
    assert ours["logits"] == theirs["logits"]  # evaluation finds them
    assert ours["second_model"] == (case in WITH_REFERENCE_MODEL)
    assert theirs["second_model"] or case in (
        "GradAscent",
        "GradDiff",
        "GradDiff left",
        "SimNPO",
        "CEU",
        "PDU",
        "PDU epoch",
    )


@needs_checkout
@pytest.mark.parametrize("case", ["GradDiff", "GradDiff KL", "RMU"])
def test_weights_change_the_retain_loss(case, one_process):
    weighted = one_process[f"weighted {case}"]
    assert weighted["largest_weight"] > 1.5
    assert weighted["losses"][1:] != pytest.approx(one_process[f"Trace{case}"]["losses"][1:], rel=1e-6)


@needs_checkout
def test_weights_find_their_tokens_on_either_side_of_padding(one_process):
    left, right = one_process["weighted left"], one_process["weighted right"]
    assert left["losses"] == pytest.approx(right["losses"], rel=1e-5)


@needs_checkout
def test_two_processes_train_as_one(one_process, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = losses_of_all_steps(launcher, tmp_path)
    assert two.keys() == {"NPO of 2", "TraceNPO of 2", "NPO KL of 2", "TraceNPO KL of 2", "weighted of 2"}
    for case, found in two.items():
        assert found["parameters"] == pytest.approx(one_process[case]["parameters"], rel=1e-6), case
        if case.startswith("Trace"):
            assert found["losses"] == pytest.approx(two[case.removeprefix("Trace")]["losses"], rel=5e-4)


# What a machine with a CPU only and without bitsandbytes and flash-attn lacks.
ON_A_CPU = ["trainer.args.optim=adamw_torch", "+trainer.args.use_cpu=true", "model.model_args.attn_implementation=sdpa"]


@needs_checkout
@pytest.mark.slow
@pytest.mark.parametrize("case", ["NPO tofu/default", "DPO tofu/idk", "RMU tofu/default"])
def test_its_experiments_run_with_ours_and_all_their_defaults(case, tmp_path):
    method, experiment = case.split()
    checkout = open_unlearning_world.make(Path(CHECKOUT), tmp_path / "checkout", "qwen2_moe")
    regex = [r"trainer.method_args.module_regex=model\.layers\.0"] if method == "RMU" else []  # its model has 8 layers
    command = ["-m", "trace_unlearn.integrations.open_unlearning", "--checkout", checkout]
    done = run(
        *command, "--config-name=unlearn.yaml", f"trainer=Trace{method}", f"experiment=unlearn/{experiment}",
        "task_name=tiny", "trainer.args.num_train_epochs=2", *ON_A_CPU, *regex, python=PYTHON,
    )  # fmt: skip
    saved = checkout / "saves" / "unlearn" / "tiny"
    summaries = [
        json.loads((saved / f"checkpoint-{step}" / "evals" / "TOFU_SUMMARY.json").read_text()) for step in (0, 1, 2)
    ]
    assert summaries[0].keys() == summaries[2].keys() >= {"forget_Q_A_Prob", "forget_Q_A_ROUGE", "model_utility"}
    assert summaries[0]["forget_Q_A_Prob"] != summaries[2]["forget_Q_A_Prob"]
    assert "layer  expert  forget f" in done.stdout
    run(
        *command, "--script", "eval", "--config-name=eval.yaml", "experiment=eval/tofu/default", "task_name=again",
        f"model.model_args.pretrained_model_name_or_path={saved}", "model.model_args.device_map=cpu",
        "model.model_args.attn_implementation=sdpa", python=PYTHON,
    )  # fmt: skip
    again = json.loads((checkout / "saves" / "eval" / "again" / "TOFU_SUMMARY.json").read_text())
    assert again["forget_Q_A_Prob"] == pytest.approx(summaries[2]["forget_Q_A_Prob"], rel=1e-3)
