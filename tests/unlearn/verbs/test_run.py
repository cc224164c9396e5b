"""The verb `run`: all steps, skipping, refusal, resuming after a kill."""

import html
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import trace_unlearn
from trace_unlearn.files import read_json
from trace_unlearn.sources.model import load_model
from trace_unlearn.verbs import cli
from trace_unlearn.verbs.lock import alone

FORGET = [f"the capital of w{i} is w{i + 1} ." for i in range(12)]
RETAIN = [f"the color of w{20 + i} is w{i} ." for i in range(24)]
PRODUCTS = ("profile", "calibration", "model", "metrics.json", "report.html")


def configure(tmp_path, checkpoint):
    """A run that takes seconds; (folder, path of config.yaml, run folder)."""
    for name, texts in (("forget", FORGET), ("retain", RETAIN)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "muse" / "privleak").mkdir(parents=True)
    for name, texts in (("forget", FORGET), ("holdout", RETAIN)):
        (tmp_path / "muse" / "privleak" / f"{name}.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "config.yaml").write_text(
        f"""
model: {checkpoint("qwen3_moe")}
forget: {tmp_path / "forget.jsonl"}
retain: {tmp_path / "retain.jsonl"}
output: {tmp_path / "run"}
max_length: 64
device: cpu
profile:
  batch_size: 4
calibrate:
  experts_per_layer: 2
train:
  training:
    max_steps: 3
    per_device_train_batch_size: 2
    save_steps: 1
    learning_rate: 1.0e-3
evaluate:
  max_new_tokens: 0
  suites:
    muse:
      data: muse
      retrain_auc: 0.5
"""
    )
    return tmp_path, tmp_path / "config.yaml", tmp_path / "run"


@pytest.fixture
def configuration(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return configure(tmp_path, checkpoint)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint):
    """The folder of such a run that is done."""
    home, config, folder = configure(tmp_path_factory.mktemp("finished"), checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert cli.main(["run", str(config)]) == 0
    return folder


@pytest.fixture
def done(configuration, finished):
    """A configuration whose run is done: a copy of the one that was."""
    shutil.copytree(finished, configuration[2])
    return configuration


def made(folder):
    return {name: (folder / name).stat().st_mtime_ns for name in PRODUCTS if (folder / name).exists()}


def test_all_steps_then_nothing_is_done_again(configuration, capsys):
    _, config, folder = configuration
    assert cli.main(["run", str(config)]) == 0
    assert list(made(folder)) == list(PRODUCTS)
    assert "privleak" in read_json(folder / "metrics.json")["suites"][str(folder / "model")]["muse"]
    measures = read_json(folder / "metrics.json")["checkpoints"]
    assert len(measures) == 2
    assert "routing_shift" in measures[str(folder / "model")]["forget"]
    load_model(folder / "model", device="cpu")
    before = made(folder)
    capsys.readouterr()
    assert cli.main(["run", "--config", str(config)]) == 0
    assert made(folder) == before
    assert capsys.readouterr().out.count("done already") == 5


def test_the_verdict_is_the_last_line_and_the_first_of_page_and_card(configuration, capsys):
    _, config, folder = configuration
    assert cli.main(["run", str(config)]) == 0
    (sentence,) = [found["sentence"] for found in read_json(folder / "metrics.json")["verdicts"].values()]
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == sentence
    assert said.index(f"{folder / 'model'}: {sentence}") < said.index(
        next(line for line in said if line.startswith("checkpoint "))
    )
    page = (folder / "report.html").read_text()
    escaped = html.escape(sentence)
    assert page.index(escaped) < page.index("<h2>") < page.index("<table")
    card = (folder / "model" / "README.md").read_text().split("---", 2)[2].strip().splitlines()
    assert card[0].startswith("# ")
    assert next(line for line in card[1:] if line) == f"**{sentence}**"
    before = (folder / "model" / "README.md").read_text()
    capsys.readouterr()
    assert cli.main(["run", str(config)]) == 0  # nothing is done again, and said all the same
    assert capsys.readouterr().out.splitlines()[-1] == sentence
    assert (folder / "model" / "README.md").read_text() == before
    # The same from Python, of what the run left.
    assert trace_unlearn.report(folder, folder / "again", show_tokens=0) == folder / "again" / "report.html"
    assert escaped in (folder / "again" / "report.html").read_text()
    data = [str(folder.parent / f"{name}.jsonl") for name in ("forget", "retain")]
    found = trace_unlearn.attack(
        str(folder / "model"), *data, str(folder / "again"), attacks=["quantize"], bits=[4], max_length=64, device="cpu"
    )
    assert found == read_json(folder / "again" / "attacks.json")
    assert list(found["models"][str(folder / "model")]) == ["unattacked", "quantize_4"]
    with pytest.raises(trace_unlearn.UserError, match="attack: 'bit' is none of its options"):
        trace_unlearn.attack("model", *data, "out", bit=4)


def test_attacks_are_a_step_of_their_own(configuration, checkpoint):
    _, config, folder = configuration
    retrained = str(checkpoint("qwen3_moe", seed=1))
    words = ["--attacks", "[quantize, reroute]", "--attack.bits", "[4]", "--evaluate.retrained", retrained]
    assert cli.main(["run", str(config), *words]) == 0
    assert list(read_json(folder / "attacks.json")["models"]) == [str(folder / "model"), retrained]
    for found in read_json(folder / "attacks.json")["models"].values():
        assert list(found) == ["unattacked", "quantize_4", "reroute"]
        assert set(found["reroute"]) == {"chosen", "critical"}
    page = (folder / "report.html").read_text()
    assert "without critical experts" in page
    card = (folder / "model" / "README.md").read_text()
    for text in ("this model", "without critical experts", "MUSE PrivLeak", "SHA-256 of the calibration"):
        assert text in card
    assert str(folder) not in card
    assert "privleak" in page


def test_a_step_is_made_again_when_its_product_is_gone(done):
    _, config, folder = done
    before = made(folder)
    (folder / "metrics.json").unlink()
    assert cli.main(["run", str(config)]) == 0
    after = made(folder)
    assert {name for name in PRODUCTS if before[name] != after[name]} == {"metrics.json"}


def test_other_options_are_refused_before_anything_is_done(done, capsys):
    _, config, folder = done
    before = made(folder)
    assert cli.main(["run", str(config), "--calibrate.min_ess", "0.3"]) == 2
    message = capsys.readouterr().err
    assert "calibration" in message
    assert "min_ess (was 0.5, now 0.3)" in message
    assert made(folder) == before


def test_other_data_is_refused(done, capsys):
    folder_of_data, config, folder = done
    with (folder_of_data / "retain.jsonl").open("a") as file:
        file.write('{"text": "w1 w2 w3"}\n')
    assert cli.main(["run", str(config), "--report", "false"]) == 2
    assert "other inputs: retain" in capsys.readouterr().err
    (folder_of_data / "muse" / "privleak" / "forget.json").write_text('["w1 w2 w3"]')
    assert cli.main(["run", str(config), "--report", "false"]) == 2
    assert read_json(folder / "steps.json")["profile"]["options"]["batch_size"] == 4


def test_a_product_of_unknown_origin_is_refused(configuration, capsys):
    _, config, folder = configuration
    (folder / "profile").mkdir(parents=True)
    assert cli.main(["run", str(config)]) == 2
    assert "no run made it" in capsys.readouterr().err


def test_the_run_folder_may_move(done):
    _, config, folder = done
    folder.rename(folder.with_name("moved"))
    before = made(folder.with_name("moved"))
    assert cli.main(["run", str(config), "--report", "false", "--output", str(folder.with_name("moved"))]) == 0
    assert made(folder.with_name("moved")) == before


def test_uniform_weights_need_no_calibration(configuration):
    _, config, folder = configuration
    assert cli.main(["run", str(config), "--train.method.weighting", "uniform", "--report", "false"]) == 0
    assert list(made(folder)) == ["model", "metrics.json"]


def test_a_dense_model_with_limits(configuration, checkpoint):
    _, config, folder = configuration
    words = ["--model", str(checkpoint("llama")), "--train.method.weighting", "uniform", "--report", "false"]
    assert cli.main(["run", str(config), *words, "--forget_limit", "5", "--retain_limit", "9"]) == 0
    for measures in read_json(folder / "metrics.json")["checkpoints"].values():
        assert (measures["forget"]["rows"], measures["retain"]["rows"]) == (5, 9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--evaluate.others", '{"more": "typo.jsonl"}'], "evaluate.others.more: typo.jsonl: no such file"),
        (["--evaluate.others", '{"forget": "typo.jsonl"}'], "evaluate.others.forget: typo.jsonl: no such file"),
        (["--train.retain_eval", "typo.jsonl", "--train.method.stop_retain_nll", "9"], "train.retain_eval: typo.jsonl"),
        (
            ["--train.training.lr_scheduler_type", "steep"],
            "train: training.lr_scheduler_type: got 'steep', allowed: linear",
        ),
        (["--train.training.eval_strategy", "steps"], "train: training: 'eval_strategy' is not allowed"),
        (["--retain", "typo.jsonl"], "retain: typo.jsonl: no such file"),
    ],
)
def test_mistakes_are_told_before_anything_is_done(configuration, capsys, words, said):
    _, config, folder = configuration
    assert cli.main(["run", str(config), *words]) == 2
    assert said in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train.steps", "3"], "did you mean 'train.training.max_steps'?"),
        (["--train.learning_rate", "3"], "did you mean 'train.training.learning_rate'?"),
        (["--train.objective", "npo"], "did you mean 'train.method.objective'?"),
        (["--train.training.max_steps", "many"], "training.max_steps: got 'many', allowed are integers from 1"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--forget", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--train.method.objective", "magic"], "objective"),
        (["--calibrate.min_ess", "7"], "min_ess"),
        (["--evaluate.suites.muse", '{"data": "/nowhere"}'], "suites.muse: data: got '/nowhere'"),
    ],
)
def test_mistakes_leave_no_product(configuration, capsys, words, said):
    _, config, folder = configuration
    assert cli.main(["run", str(config), *words]) == 2
    assert said in capsys.readouterr().err
    assert set(made(folder)) <= {"profile", "calibration"}
    assert not list(folder.rglob("*.partial"))


def test_two_runs_do_not_share_a_folder(configuration, capsys):
    _, config, folder = configuration
    folder.mkdir()
    with alone(folder):
        assert cli.main(["run", str(config)]) == 2
    assert "another process is at work" in capsys.readouterr().err
    assert made(folder) == {}


@pytest.mark.slow
@pytest.mark.parametrize("product", PRODUCTS[:3])
def test_killed_anywhere_it_goes_on_to_the_same_model(configuration, product):
    """Killed while the step after `product` is at work."""
    _, config, folder = configuration
    command = [sys.executable, "-m", "trace_unlearn.verbs.cli", "run", str(config), "--train.training.max_steps", "6"]
    # As many threads as this process has: another number may round matrix products otherwise.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not (folder / product).exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert (folder / product).exists()
    assert cli.main(command[3:]) == 0
    assert list(made(folder)) == list(PRODUCTS)
    assert not list(folder.rglob("*.partial"))
    whole = folder.with_name("whole")
    assert cli.main([*command[3:], "--output", str(whole)]) == 0
    ours, theirs = (load_model(each / "model", device="cpu").state_dict() for each in (folder, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert os.path.exists(whole / "report.html")
