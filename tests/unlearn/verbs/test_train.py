import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from train_runs import losses, options, record, weights, write_facts

from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.errors import UserError
from trace_unlearn.routing.profile import RoutingStatistics
from trace_unlearn.sources.model import load_model, load_tokenizer
from trace_unlearn.training.experts import top_experts
from trace_unlearn.training.trainer import TraceTrainer
from trace_unlearn.verbs.lock import alone
from trace_unlearn.verbs.train import main


def assert_same_checkpoint(first, second):
    expected, found = weights(first), weights(second)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("objective", ["grad_diff", "npo"])
def test_writes_a_checkpoint_that_forgets(objective, files, tmp_path):
    said = []
    main(
        options(files, tmp_path / "out", objective=objective, max_steps=12, per_device_train_batch_size=6), said.append
    )
    assert "forgets" in said[0]
    log = [entry for entry in record(tmp_path / "out")["log"] if "loss" in entry]
    assert log[-1]["forget_nll"] > log[0]["forget_nll"] + 0.2
    assert {"forget_loss", "retain_loss", "retain_nll", "weight_mean", "weight_max", "weight_ess"} <= log[0].keys()
    assert not (tmp_path / "out.training").exists()
    model, tokenizer = load_model(tmp_path / "out", device="cpu"), load_tokenizer(tmp_path / "out")
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    assert model.config.use_cache
    configs = [json.loads((Path(folder) / "config.json").read_text()) for folder in (files["model"], tmp_path / "out")]
    assert configs[0] == configs[1]
    assert weights(tmp_path / "out").keys() == weights(files["model"]).keys()
    ids = torch.tensor([tokenizer("the capital of w1 is w2 .")["input_ids"]])
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    facts = record(tmp_path / "out")
    assert facts["method"] == "TRACE"
    assert len(facts["calibration"]["sha256"]) == 64
    assert facts["config"]["objective"] == objective
    assert facts["options"]["retain"] == files["retain"]
    assert {"torch", "transformers", "trace_kernels"} <= facts["versions"].keys()


@pytest.mark.parametrize("rule", ["balance", "ratio"])
def test_weightings(rule, files, tmp_path):
    calibration = str(Path(files["calibration"]).with_name(rule))
    first = {}
    for weighting in ("uniform", "reference", "live"):
        output = tmp_path / weighting
        main(options(files, output, weighting=weighting, calibration=calibration, max_steps=1), lambda message: None)
        first[weighting] = record(output)["log"][0]
    assert first["uniform"]["weight_ess"] == pytest.approx(1)
    assert first["reference"]["weight_max"] > 1.01
    # At the first step the current routing is the original one.
    for name in ("weight_max", "weight_mean", "weight_ess"):
        assert first["live"][name] == pytest.approx(first["reference"][name], rel=1e-5)
    assert record(tmp_path / "uniform")["method"] == "uniform retain weights"


def test_lora_is_merged(files, tmp_path):
    pytest.importorskip("peft")
    changes = {"lora_rank": 2, "lora_parameters": ["mlp.experts.down_proj"], "gradient_checkpointing": True}
    main(options(files, tmp_path / "out", learning_rate=0.05, weighting="live", **changes), lambda message: None)
    before, after = weights(files["model"]), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("self_attn" in name or "down_proj" in name for name in changed)


def test_a_pattern_trains_only_what_it_names(files, tmp_path):
    main(options(files, tmp_path / "out", trainable=[r"layers\.1\.mlp\.experts"]), lambda message: None)
    before, after = weights(files["model"]), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("layers.1.mlp.experts" in name for name in changed)


def test_seuf_trains_one_expert_and_its_router(files, tmp_path):
    profile = str(Path(files["calibration"]).with_name("profile"))
    [(layer, expert)] = top_experts(RoutingStatistics.load(profile), 1)
    said = []
    changes = {"experts": ["top1"], "profile": profile, "anchor": 1.0, "objective": "npo"}
    main(options(files, tmp_path / "out", max_steps=6, learning_rate=1e-2, **changes), said.append)
    before, after = weights(files["model"]), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    own = f"layers.{layer}.mlp.experts.{expert}."  # the checkpoint holds experts apart
    assert any(own in name for name in changed)
    assert all(own in name or f"layers.{layer}.mlp.gate" in name for name in changed)
    assert any("mlp.gate" in name for name in changed)
    count = 3 * 32 * 16 + 8 * 32
    assert any(message.startswith(f"{count:,} of ") for message in said)
    log = [entry for entry in record(tmp_path / "out")["log"] if "loss" in entry]
    assert log[-1]["anchor_loss"] < log[0]["anchor_loss"]
    assert record(tmp_path / "out")["experts"] == [[layer, expert]]


def test_the_selected_experts_are_those_of_the_calibration(files, tmp_path):
    main(options(files, tmp_path / "out", experts=["selected"], max_steps=2), lambda message: None)
    pairs = Calibration.load(files["calibration"]).selected.tolist()
    before, after = weights(files["model"]), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    allowed = [f"layers.{layer}.mlp.experts.{expert}." for layer, expert in pairs]
    assert all("mlp.gate" in name or any(own in name for own in allowed) for name in changed)
    assert all(any(own in name for name in changed) for own in allowed)


def test_finetune_learns_one_set(files, tmp_path):
    said = []
    given = {"objective": "finetune", "forget": None, "calibration": None, "max_steps": 12, "learning_rate": 5e-3}
    main(options(files, tmp_path / "out", **given), said.append)
    assert "learns" in said[0]
    log = [entry for entry in record(tmp_path / "out")["log"] if "loss" in entry]
    assert log[-1]["retain_nll"] < log[0]["retain_nll"] - 0.5
    assert record(tmp_path / "out")["method"] == "fine-tuning"


def test_dpo_prefers_the_alternates(files, tmp_path):
    lines = Path(files["forget"]).read_text().splitlines()
    refusals = [{**json.loads(line), "answer": "what is the ?"} for line in lines]
    alternate = tmp_path / "alternate.jsonl"
    alternate.write_text("".join(json.dumps(row) + "\n" for row in refusals))
    given = {"objective": "dpo", "alternate": str(alternate), "max_steps": 8, "learning_rate": 5e-3}
    main(options(files, tmp_path / "out", **given), lambda message: None)
    log = [entry for entry in record(tmp_path / "out")["log"] if "loss" in entry]
    assert log[0]["forget_loss"] == pytest.approx(13.8629, rel=1e-3)
    assert log[-1]["forget_loss"] < log[0]["forget_loss"] - 1
    moved = [{**row, "question": "w1 ?"} for row in refusals]
    alternate.write_text("".join(json.dumps(row) + "\n" for row in moved))
    with pytest.raises(UserError, match="alternate: document 0 has the prompt"):
        main(options(files, tmp_path / "other", **given), lambda message: None)


PROGRAM = """
import json, sys
from trace_unlearn.verbs.train import TrainOptions, main

main(TrainOptions(**json.loads(sys.argv[1])))
"""


def start(given, *launcher):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *(launcher or ("-c", PROGRAM)), json.dumps(dataclasses.asdict(given))]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_when(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"objective": "npo"}, {"lora_rank": 2, "weighting": "live"}])
def test_a_killed_run_goes_on(changes, files, tmp_path):
    changes = {"max_steps": 30, "save_steps": 3, **changes}
    whole = options(files, tmp_path / "whole", **changes)
    assert start(whole).wait() == 0
    killed = options(files, tmp_path / "killed", **changes)
    work = tmp_path / "killed.training"
    for step in (3, 9):  # as soon as the folder appears, so most likely in the middle of writing it
        process = start(killed)
        kill_when(process, (work / f"checkpoint-{step}").exists)
        assert not (tmp_path / "killed").exists()
    assert start(killed).wait() == 0
    assert len(losses(tmp_path / "whole")) == 30
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "killed")
    assert not work.exists()


def test_a_run_that_lacks_only_its_result(files, tmp_path, monkeypatch):
    main(options(files, tmp_path / "whole", save_steps=2), lambda message: None)

    def fail(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trace_unlearn.training.trainer.TraceTrainer.save_unlearned", fail)
        with pytest.raises(KeyboardInterrupt):
            main(options(files, tmp_path / "out", save_steps=2), lambda message: None)
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        UserError, match=r"interrupted run with other method\.alpha, training\.seed; give the same again"
    ):
        main(options(files, tmp_path / "out", save_steps=2, alpha=2.0, seed=3), lambda message: None)
    main(options(files, tmp_path / "out", save_steps=3, logging_steps=5), lambda message: None)
    assert_same_checkpoint(tmp_path / "whole", tmp_path / "out")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_mistakes_are_told_before_the_model_is_loaded(files, tmp_path, monkeypatch):
    monkeypatch.setattr("trace_unlearn.verbs.train.load_model", None)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    other = write_facts(tmp_path / "other.jsonl", 9, 5)
    for changes, message in (
        ({"output": str(tmp_path / "there")}, "there: the folder exists"),
        ({"calibration": None}, "calibration: got none, but weighting 'reference' needs"),
        ({"calibration": str(tmp_path / "nowhere")}, "nowhere"),
        ({"model": str(tmp_path / "nowhere")}, "nowhere: no such folder"),
        ({"forget": str(tmp_path / "nothing.jsonl")}, r"nothing\.jsonl"),
        ({"retain": other}, "retain: the data is not what the calibration was made for"),
        ({"forget": files["retain"]}, "the forget set equals the retain set"),
        ({"objective": "ppo"}, "objective: got 'ppo'"),
        ({"objective": "dpo"}, "alternate: got none, but objective 'dpo' needs it"),
        ({"forget": None}, "forget: got none, but objective 'grad_diff' needs it"),
        ({"objective": "dpo", "alternate": other}, "alternate: got 9 documents, allowed is one for each of the 12"),
        ({"experts": ["0.1"], "lora_rank": 4}, "experts and lora_rank: got both"),
        ({"experts": ["0.1"], "weight_decay": 0.1}, "weight_decay: got 0.1, allowed is 0 with experts"),
        ({"experts": ["first"]}, "experts: got 'first', allowed: LAYER.EXPERT"),
        ({"experts": ["top1"]}, "experts: 'top1' needs the folder that profile wrote"),
        ({"anchor": 1.0}, "anchor: got 1.0, but no experts"),
        ({"trainable": ["("]}, "not a regular expression"),
        ({"trainable": ["mlp"], "lora_rank": 4}, "trainable and lora_rank: got both"),
        ({"max_steps": 0}, "training.max_steps: got 0, allowed are integers from 1"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"lr_scheduler_type": "steep"}, "steep"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"training": {"learning_rat": 1}}, "'learning_rat' is no field of .*; did you mean 'training.learning_rate'"),
        ({"training": {"steps": 9}}, "'steps' is no field of .*; did you mean 'training.max_steps'"),
        ({"training": {"max_steps": "many"}}, "training.max_steps: got 'many', allowed are integers"),
        (
            {"training": {"gradient_checkpointing": "maybe"}},
            "gradient_checkpointing: got 'maybe', allowed are",
        ),
        ({"training": {"bf16": "off"}}, "training.bf16: got 'off', allowed are true and false"),
        ({"training": {"logging_first_step": 2}}, "training.logging_first_step: got 2, allowed are true and false"),
        ({"training": {"use_cpu": True}}, "'use_cpu' is not allowed: `device` says it"),
        ({"save_strategy": "no", "best_forget_nll": 2.0}, "save_strategy: got 'no', but best_forget_nll"),
        ({"training": {"push_to_hub": True}}, "'push_to_hub' is not allowed: it would publish .*hf upload"),
        ({"training": {"hub_model_id": "me/model"}}, "'hub_model_id' is not allowed: it would publish"),
        ({"training": {"load_best_model_at_end": True}}, "is not allowed: best_forget_nll chooses"),
        ({"training": {"optim": "adamw_fantasy"}}, "adamw_fantasy"),
        ({"training": {"adam_beta1": 2}}, "training: .*beta"),
        ({"training": {"adam_epsilon": -1.0}}, "training: .*epsilon"),
        (
            {"lr_scheduler_type": "polynomial", "training": {"lr_scheduler_kwargs": {"lr_end": 1.0}}},
            "training: .*lr_end",
        ),
        ({"lr_scheduler_type": "cosine", "training": {"lr_scheduler_kwargs": {"cycles": 1.0}}}, "training: .*cycles"),
        ({"question_template": "who?"}, "question_template: got 'who.'; it must hold"),
        ({"max_length": 2000, "forget": write_long(tmp_path)}, "max_length: forget has rows of .* 256 positions"),
        (
            {"training": {"eval_strategy": "steps"}},
            "'eval_strategy' is not allowed: nothing is evaluated while training",
        ),
        ({"training": {"save_only_model": True}}, "'save_only_model' is not allowed: an interrupted run"),
        ({"training": {"report_to": ["paper"]}}, "report_to: got 'paper', allowed is what is installed"),
        ({"lora_rank": 4, "lora_modules": []}, "lora_modules: got none"),
    ):
        with pytest.raises(UserError, match=message):
            main(options(files, tmp_path / "out", **changes) if "output" not in changes else options(files, **changes))
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.training").exists()


def write_long(folder):
    (folder / "long.txt").write_text("w1 w2 w3 w4 " * 100)
    return str(folder / "long.txt")


@pytest.fixture(scope="module")
def half(files, tmp_path_factory):
    """A checkpoint in bfloat16 as it might be downloaded: in shards, with code and papers of its own."""
    folder = tmp_path_factory.mktemp("half") / "base"
    shutil.copytree(files["model"], folder)
    model = load_model(folder, device="cpu").to(torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"do_sample": False, "temperature": 0.3, "top_p": 0.5, "transformers_version": "4.40.0"}
    for name, text in {
        "configuration_own.py": "# code",
        "modeling_own.py": "# more code",
        "LICENSE": "do as you like",
        "README.md": "the base model's card",
        "chat_template.jinja": "{% for m in messages %}{{ m.content }} </s>{% endfor %}",
        "generation_config.json": json.dumps(generation),  # which transformers reads and refuses to write
        "extra/notes.txt": "more",
        "extra/weights.safetensors": "",
        ".hidden": "no",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def stored(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_output_has_what_the_input_had(half, files, tmp_path):
    said = []
    given = {**files, "model": str(half)}
    main(
        options(given, tmp_path / "out", weighting="uniform", max_steps=2, save_steps=1, learning_rate=1e-4),
        said.append,
    )
    assert any("are trained in float32, and written in bfloat16" in line for line in said)
    out = tmp_path / "out"

    def names(folder):
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    left_behind = {".hidden", "extra/weights.safetensors"}
    assert names(out) == names(half) - left_behind | {"trace.json", "README.base.md"}
    for name in names(half) - left_behind - {"README.md", "config.json"}:
        if "safetensors" not in name:
            assert (out / name).read_bytes() == (half / name).read_bytes(), name
    assert (out / "README.base.md").read_text() == "the base model's card"
    assert "# base, unlearned" in (out / "README.md").read_text()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (out, half))
    assert {**ours, "transformers_version": 0} == {**theirs, "transformers_version": 0}
    before, after = stored(half), stored(out)
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert sum(path.stat().st_size for path in out.glob("*.safetensors")) < 1.1 * sum(
        path.stat().st_size for path in half.glob("*.safetensors")
    )
    facts = record(out)
    assert facts["trained_in"] == "float32"


def test_half_precision_forgets_as_float32_does(half, files, tmp_path):
    """Updates too small for bfloat16 add up: as many weights change as in float32, rounded at the end."""
    changed = {}
    for dtype in ("auto", "bfloat16"):
        given = {**files, "model": str(half)}
        output = tmp_path / dtype
        main(
            options(given, output, weighting="uniform", max_steps=12, learning_rate=2e-5, dtype=dtype),
            lambda line: None,
        )
        before, after = stored(half), stored(output)
        different = sum((after[name] != before[name]).sum().item() for name in before)
        changed[dtype] = different / sum(tensor.numel() for tensor in before.values())
    assert changed["auto"] > 2 * changed["bfloat16"]


def test_a_float32_checkpoint_stays_float32(files, tmp_path):
    main(options(files, tmp_path / "out", weighting="uniform", max_steps=1), lambda line: None)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}


def test_bf16_needs_no_gpu(files, tmp_path):
    given = options(files, tmp_path / "out", weighting="uniform", max_steps=1, bf16=True, device=None)
    main(given, lambda line: None)
    assert losses(tmp_path / "out")


def test_without_a_learning_rate_a_run_finds_its_own(files, tmp_path):
    said = []
    given = options(
        files, tmp_path / "out", weighting="uniform", learning_rate=None, stop_every=5, stop_documents=8, max_steps=60
    )
    main(given, said.append)
    facts = record(tmp_path / "out")
    assert facts["learning_rate"] == pytest.approx(0.02 / 32, rel=0.05)
    assert facts["config"]["pace"]
    assert facts["config"]["stop_forget_increase"] == 1.5
    measured = [entry["stop_forget_nll"] for entry in facts["log"] if "stop_forget_nll" in entry]
    assert measured[-1] >= measured[0] + 1.5
    assert facts["steps"] < 60
    assert any(line.startswith("NLL of forget documents") for line in said)


def test_tensorboard_files_stay(files, tmp_path):
    pytest.importorskip("tensorboardX" if importlib.util.find_spec("tensorboard") is None else "tensorboard")
    given = options(files, tmp_path / "out", weighting="uniform", max_steps=1)
    given.training["report_to"] = "tensorboard"
    main(given, lambda line: None)
    assert list((tmp_path / "out.logs").glob("events.out.tfevents.*"))
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


@pytest.mark.slow
def test_weights_and_biases_offline(files, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    given = options(files, tmp_path / "out", weighting="uniform", max_steps=1)
    given.training["report_to"] = "wandb"
    main(given, lambda line: None)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_run_that_was_too_short_says_so(files, tmp_path):
    said = []
    main(options(files, tmp_path / "out", learning_rate=None, max_steps=1), said.append)
    assert any(line.startswith("NOT ENOUGH FORGOTTEN") for line in said)


def test_a_pattern_without_a_match_leaves_nothing_behind(files, tmp_path):
    with pytest.raises(UserError, match="found in no parameter's name"):
        main(options(files, tmp_path / "out", trainable=["mlp.down_proj.weight"]), lambda message: None)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.training").exists()


def test_half_precision_is_warned_about(files, tmp_path, caplog):
    main(options(files, tmp_path / "out", max_steps=1, dtype="bfloat16"), lambda message: None)
    assert "small updates are lost to rounding" in caplog.text
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_run_that_wrote_no_checkpoint_starts_anew(files, tmp_path):
    with pytest.raises(UserError, match="the loss is"):
        main(options(files, tmp_path / "out", max_steps=9, learning_rate=1e30), lambda message: None)
    main(options(files, tmp_path / "out", max_steps=1), lambda message: None)
    assert len(losses(tmp_path / "out")) == 1


def test_a_slash_and_a_tilde_name_the_same_folder(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(files["model"])
    main(options(files, "~/out/", weighting="uniform", max_steps=1), lambda message: None)
    assert losses(tmp_path / "out")
    assert not list(tmp_path.glob("*.training"))
    assert not Path("~").exists()


def test_what_a_stop_after_the_result_leaves_is_removed(files, tmp_path, monkeypatch):
    given = options(files, tmp_path / "out", weighting="uniform", max_steps=1)
    monkeypatch.setattr("trace_unlearn.verbs.train.shutil.rmtree", lambda *arguments, **options: None)
    main(given, lambda message: None)
    monkeypatch.undo()
    assert (tmp_path / "out.training").exists()
    with pytest.raises(UserError, match="not empty"):
        main(dataclasses.replace(given, method=dataclasses.replace(given.method, alpha=2.0)), lambda message: None)
    said = []
    main(given, said.append)
    assert "done already" in said[-1]
    assert not (tmp_path / "out.training").exists()


def test_another_base_model_is_refused_when_a_run_goes_on(files, tmp_path, monkeypatch):
    shutil.copytree(files["model"], tmp_path / "base")
    given = options({**files, "model": str(tmp_path / "base")}, tmp_path / "out", weighting="uniform", save_steps=2)
    monkeypatch.setattr(TraceTrainer, "save_unlearned", stopped)
    with pytest.raises(KeyboardInterrupt):
        main(given, lambda message: None)
    monkeypatch.undo()
    path = tmp_path / "base" / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(UserError, match="other model_digest"):
        main(given, lambda message: None)


def stopped(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("changes", [{"logging_steps": 10}, {"logging_steps": 10, "save_steps": 2}])
def test_a_diverged_model_is_not_written(changes, files, tmp_path):
    given = options(files, tmp_path / "out", weighting="uniform", learning_rate=1e30, max_grad_norm=0.0, **changes)
    with pytest.raises(UserError, match=r"not finite after step|loss is nan at step"):
        main(given, lambda message: None)
    assert not (tmp_path / "out").exists()


def test_one_process_at_a_time(files, tmp_path):
    (tmp_path / "out.training").mkdir()
    with alone(tmp_path / "out.training"), pytest.raises(UserError, match="another process is at work"):
        main(options(files, tmp_path / "out", weighting="uniform"), lambda message: None)


def test_the_warm_up_counts_with_a_constant_schedule(files, tmp_path):
    main(options(files, tmp_path / "out", weighting="uniform", warmup_steps=4), lambda message: None)
    rates = [entry["learning_rate"] for entry in record(tmp_path / "out")["log"] if "loss" in entry]
    assert rates == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4])
