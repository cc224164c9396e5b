"""TRACE in open-unlearning. OPEN_UNLEARNING names a checkout of it; without one its part of the tests is skipped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trace_unlearn.integrations import open_unlearning
from trace_unlearn.integrations.open_unlearning.__main__ import main
from trace_unlearn.integrations.open_unlearning.losses import METHODS

HERE = Path(__file__).parents[2] / "support"
CHECKOUT = os.environ.get("OPEN_UNLEARNING", "")
needs_checkout = pytest.mark.skipif(not CHECKOUT, reason="OPEN_UNLEARNING names no checkout of open-unlearning")
CONFIGS = Path(open_unlearning.__file__).parent / "configs" / "trainer"


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, **options)
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


# A KL divergence and RMU's distance begin at 0, where the optimiser follows the rounding of their gradients.
EXACT, FROM_ZERO = (2e-5, 1e-7), (1e-3, 1e-5)
CASES = dict.fromkeys(["GradDiff", "NPO", "SimNPO", "WGA", "SatImp", "UNDIAL", "CEU", "RMU NLL"], EXACT)
CASES |= dict.fromkeys(["GradDiff KL", "NPO KL", "RMU"], FROM_ZERO)
WITH_REFERENCE_MODEL = {"GradDiff KL", "NPO KL", "UNDIAL", "RMU", "RMU NLL"}


@needs_checkout
@pytest.mark.parametrize("case", CASES)
def test_uniform_weights_reproduce_it_step_for_step(case, one_process):
    theirs, ours = one_process[case], one_process[f"Trace{case}"]
    loss, parameters = CASES[case]
    assert len(ours["losses"]) == len(theirs["losses"]) == 12
    if case not in ("UNDIAL", "CEU"):  # of which the entropy of the target is left out, a constant
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=loss)
    assert ours["parameters"] == pytest.approx(theirs["parameters"], rel=parameters)
    assert ours["logits"] == theirs["logits"]  # evaluation finds them
    assert ours["second_model"] == (case in WITH_REFERENCE_MODEL)
    assert theirs["second_model"] or case in ("GradDiff", "SimNPO", "CEU")


@needs_checkout
@pytest.mark.parametrize("case", ["GradDiff", "GradDiff KL", "RMU"])
def test_weights_change_the_retain_loss(case, one_process):
    weighted = one_process[f"weighted {case}"]
    assert weighted["largest_weight"] > 1.5
    assert weighted["losses"][1:] != pytest.approx(one_process[f"Trace{case}"]["losses"][1:], rel=1e-6)


@needs_checkout
def test_two_processes_train_as_one(one_process, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = losses_of_all_steps(launcher, tmp_path)
    assert two.keys() == {"NPO of 2", "TraceNPO of 2", "NPO KL of 2", "TraceNPO KL of 2", "weighted of 2"}
    for case, found in two.items():
        assert found["parameters"] == pytest.approx(one_process[case]["parameters"], rel=1e-6), case
        if case.startswith("Trace"):
            assert found["losses"] == pytest.approx(two[case.removeprefix("Trace")]["losses"], rel=5e-4)


@needs_checkout
@pytest.mark.parametrize("method", ["GradDiff", "NPO"])
def test_its_train_script_runs_with_ours(method, tmp_path, checkpoint):
    checkpoint = checkpoint("qwen3_moe")
    data = {}
    for name, first in (("forget", 0), ("retain", 20)):
        rows = [{"question": f"who is w{first + i}", "answer": f"the owner of w{first + i}"} for i in range(6)]
        (tmp_path / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
        data[name] = tmp_path / f"{name}.json"
    run(
        "-m", "trace_unlearn.integrations.open_unlearning", "--checkout", CHECKOUT, "--config-name=unlearn.yaml",
        f"trainer=Trace{method}", "task_name=tiny", "~eval", f"paths.output_dir={tmp_path / 'saved'}",
        f"model.model_args.pretrained_model_name_or_path={checkpoint}", "model.model_args.attn_implementation=sdpa",
        "model.model_args.torch_dtype=float32", f"model.tokenizer_args.pretrained_model_name_or_path={checkpoint}",
        "model.template_args.apply_chat_template=False",
        *(f"data.{name}.TOFU_QA_{name}.args.hf_args.{key}={value}"
          for name in data for key, value in (("path", "json"), ("name", "null"))),
        *(f"+data.{name}.TOFU_QA_{name}.args.hf_args.data_files={path}" for name, path in data.items()),
        "trainer.args.optim=adamw_torch", "trainer.args.bf16=False", "trainer.args.bf16_full_eval=False",
        "trainer.args.report_to=none", "trainer.args.num_train_epochs=1", "trainer.args.per_device_train_batch_size=2",
        "trainer.args.gradient_accumulation_steps=1", "trainer.args.do_eval=False", "trainer.args.eval_on_start=False",
        "trainer.args.eval_strategy=no", "+trainer.args.use_cpu=True", "trainer.method_args.experts_per_layer=2",
    )  # fmt: skip
    assert (tmp_path / "saved" / "model.safetensors").exists()
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
