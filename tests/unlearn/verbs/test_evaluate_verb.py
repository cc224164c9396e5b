import json
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from evaluated import QUESTIONS, TEXTS, dataset, plain_nll
from transformers import AutoModelForCausalLM

from trace_unlearn import files
from trace_unlearn.errors import UserError
from trace_unlearn.verbs import cli, evaluate
from trace_unlearn.verbs.evaluate import EvaluateOptions


@pytest.fixture
def texts(tmp_path):
    return dataset(tmp_path, TEXTS, max_length=9)


@pytest.fixture
def options(tmp_path, checkpoint):
    (tmp_path / "forget.jsonl").write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    (tmp_path / "retain.json").write_text(json.dumps(TEXTS))
    (tmp_path / "held out.txt").write_text("w30 w31 w32 w33")
    return EvaluateOptions(
        models=[str(checkpoint("qwen3_moe")), str(checkpoint("qwen3_moe", seed=1))],
        forget=str(tmp_path / "forget.jsonl"),
        retain=str(tmp_path / "retain.json"),
        output=str(tmp_path / "run"),
        others={"held out": str(tmp_path / "held out.txt")},
        base=str(checkpoint("qwen3_moe")),
        max_new_tokens=3,
    )


def test_main_writes_what_evaluate_model_returns(options, tmp_path, capsys, texts):
    evaluate.main(options)
    metrics = files.read_json(tmp_path / "run" / "metrics.json")
    assert list(metrics["checkpoints"]) == options.models
    first, second = metrics["checkpoints"].values()
    assert list(first) == ["forget", "retain", "held out"]
    assert first["forget"]["answers"] == 3
    assert first["retain"]["routing_shift"]["changed"] == 0
    assert second["retain"]["routing_shift"]["changed"] > 0
    model = AutoModelForCausalLM.from_pretrained(options.models[1]).eval()
    with torch.no_grad():
        nll, tokens = plain_nll(model, dataset(tmp_path, TEXTS))
    assert second["retain"] == {**second["retain"], "nll": pytest.approx(nll, rel=1e-5), "tokens": tokens, "rows": 4}
    assert metrics["choices"]["options"]["max_length"] == 512
    assert set(metrics["choices"]["fingerprints"]) == {"forget", "retain", "held out"}
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.json"]
    printed = capsys.readouterr().out
    assert f"{second['forget']['nll']:.3f}" in printed


@pytest.mark.parametrize(
    "change, match",
    [
        ({"models": []}, "models: got none"),
        ({"models": ["a", "a"]}, "models: got a, a; each may be named once"),
        ({"models": ["no/such/folder"]}, "no/such/folder: no such folder"),
        ({"batch_size": 0}, "batch_size: got 0, allowed are integers from 1"),
        ({"max_generations": 0}, "max_generations: got 0"),
        ({"forget": "absent.jsonl"}, r"absent\.jsonl: no such file"),
        ({"others": {"retain": "retain.json"}}, "others: got the name 'retain', which is taken"),
        ({"dtype": "int4"}, "dtype: got 'int4'"),
    ],
)
def test_mistakes_leave_nothing_behind(options, tmp_path, change, match, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in change.items():
        setattr(options, name, value)
    with pytest.raises(UserError, match=match):
        evaluate.main(options)
    assert not (tmp_path / "run").exists()


def test_mistakes_that_need_files(options, tmp_path, checkpoint):
    retain, options.retain = options.retain, options.forget
    with pytest.raises(UserError, match="the forget set equals the retain set"):
        evaluate.main(options)
    options.base = str(checkpoint("llama"))
    with pytest.raises(UserError, match=r"a dense model \(llama\)"):
        evaluate.main(options)
    small = tmp_path / "small"
    tiny.model("qwen3_moe", 9).save_pretrained(small)
    options.retain, options.base = retain, str(small)
    with pytest.raises(UserError, match=r"base: got .*small, which does not go with .*: the tokenizer does not match"):
        evaluate.main(options)
    other = tmp_path / "other"
    tiny.model("qwen3_moe", 80).save_pretrained(other)
    tiny.tokenizer(words=["a", "b"]).save_pretrained(other)
    options.models[1], options.base = str(other), None
    with pytest.raises(UserError, match=r"other: its tokenizer is not that of .*: NLLs cannot be compared"):
        evaluate.main(options)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"metrics\.json: exists already"):
        evaluate.main(options)
    assert (tmp_path / "run" / "metrics.json").read_text() == "{}"


def test_dense_models_can_be_measured_without_a_base(options, checkpoint, tmp_path):
    options.models, options.base = str(checkpoint("llama")), None
    evaluate.main(options)
    (measures,) = files.read_json(tmp_path / "run" / "metrics.json")["checkpoints"].values()
    assert "routing_shift" not in measures["forget"]
    assert measures["forget"]["nll"] > 0


def test_a_failure_while_writing_keeps_the_disk_clean(options, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_flush", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"metrics\.json: cannot write it: No space left on device"):
        evaluate.main(options)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_killed_at_work_it_leaves_nothing_and_the_same_command_works(options, tmp_path):
    words = ["evaluate", "--models", json.dumps(options.models), "--forget", options.forget, "--retain", options.retain]
    command = [sys.executable, "-u", "-m", "trace_unlearn.verbs.cli", *words, "--output", options.output]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"evaluate: measuring {options.models[1]}"):  # the first one is measured already
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run").exists()
    assert cli.main(command[4:]) == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.json"]
    assert len(files.read_json(tmp_path / "run" / "metrics.json")["checkpoints"]) == 2


def test_killed_while_writing_what_it_left_is_removed_by_the_next_writer(tmp_path):
    target = tmp_path / "metrics.json"
    program = f"""
import os, signal
from trace_unlearn import files
files._flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)
files.write_json({str(target)!r}, {{"checkpoints": {{}}}})
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    files.write_json(target, {"checkpoints": {}})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
