"""Users' mistakes on the command line: one message, exit code 2, before any model is loaded, nothing left behind."""

import json
import os

import pytest
import tiny
from safetensors import SafetensorError
from transformers import modeling_utils

from trace_unlearn import files
from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json, refuse_existing, write_json
from trace_unlearn.sources import model
from trace_unlearn.verbs import cli
from trace_unlearn.verbs.lock import LOCK

TEXTS = {"forget": [f"the capital of w{i} is w{i + 1} ." for i in range(8)]}
TEXTS["retain"] = [f"the color of w{20 + i} is w{i} ." for i in range(16)]
TEXTS["other"] = [f"the owner of w{i} is a w{i + 30} ." for i in range(8)]


@pytest.fixture
def data(tmp_path):
    for name, texts in TEXTS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test when weights are loaded."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(model.AutoModelForCausalLM, "from_pretrained", load)


def flags(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def refused(capsys, *words):
    """The one message on stderr."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    return "\n".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("trace-unlearn"))


def configuration(data, checkpoint, text):
    (data / "run.yaml").write_text(
        f"model: {checkpoint('mixtral')}\nforget: {data / 'forget.jsonl'}\nretain: {data / 'retain.jsonl'}\n"
        f"output: {data / 'run'}\n{text}\n"
    )
    return data / "run.yaml"


@pytest.mark.parametrize(
    "section, words",
    [
        ("train: {training: {learning_rate: .nan}}", "train: training.learning_rate: got nan"),
        ("train: {method: {objective: ascent}}", "objective: got 'ascent'"),
        ("train: {training: {seed: -1}}", "train: training.seed: got -1"),
        ("calibrate: {rule: magic}", "calibrate: rule: got 'magic'"),
        ("calibrate: {max_weight: .inf}", "calibrate: max_weight: got inf"),
        ("calibrate: {experts_per_layer: 0}", "calibrate: experts_per_layer: got 0"),
        ("evaluate: {batch_size: 0}", "evaluate: batch_size: got 0"),
        ("profile: {batch_size: 0}", "profile: batch_size: got 0"),
        ("attacks: [relearn]\nattack: {relearn_rows: 8}", "attack: relearn_rows: got 8, allowed are at most 7"),
        ("train: {training: {adam_beta1: 2}}", "train: training: "),
        ("train: {training: {push_to_hub: true}}", "'push_to_hub' is not allowed: it would publish"),
        ("question_template: who", "profile: question_template: got 'who'; it must hold"),
        ("dtype: int8", "profile: dtype: got 'int8'"),
        ("train: 3", "train: got 3"),
        ("train: [steps]", "train: got ['steps']"),
    ],
)
def test_a_run_refuses_bad_options_of_any_step_before_the_first(data, checkpoint, no_model, capsys, section, words):
    assert words in refused(capsys, "run", configuration(data, checkpoint, section))
    assert not (data / "run").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("model: moe\n\tforget: f.jsonl\n", "(YAML indents with spaces, not with tabs)"),
        ("model: moe\n\tforget: f.jsonl\n", "run.yaml: line 2, column 1: not valid YAML"),
        ("model: moe\nforget: f.jsonl\n\tretain: r\n", "(YAML indents with spaces, not with tabs)"),
        ("model: {a\n", "run.yaml: line 2, column 1: not valid YAML"),
        ("- model\n- forget\n", "run.yaml: a list; options are expected, one a line"),
        ("model\n", "run.yaml: a single value; options are expected"),
        ("model: a\ntrain:\n  method: {alpha: 1.0, alpha: 2.0}\n", "run.yaml: line 3: 'alpha' is there twice"),
    ],
)
def test_a_configuration_that_is_none_names_file_and_line(tmp_path, capsys, text, words):
    (tmp_path / "run.yaml").write_text(text)
    assert words in refused(capsys, "run", tmp_path / "run.yaml")


@pytest.mark.parametrize("place", ["", "runs/first"])
def test_a_run_inside_the_folder_of_the_model_is_refused(data, checkpoint, no_model, capsys, place):
    """Its profile, and the routes of the retain data, would be published with the unlearned checkpoint."""
    folder = checkpoint("mixtral")
    before = sorted(path.name for path in folder.iterdir())
    config = configuration(data, checkpoint, "")
    config.write_text(config.read_text().replace(f"output: {data / 'run'}", f"output: {folder / place}"))
    assert "lies in the folder of the model" in refused(capsys, "run", config)
    sets = flags(model=folder, forget=data / "forget.jsonl", retain=data / "retain.jsonl", output=folder / "new")
    for verb in ("profile", "train"):
        assert "output: " in refused(capsys, verb, *sets, *(["--method.weighting", "uniform"] * (verb == "train")))
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("name", ["forget_limit", "retain_limit", "max_length"])
def test_a_limit_is_called_by_its_name(data, checkpoint, no_model, capsys, name):
    message = refused(capsys, "run", configuration(data, checkpoint, f"{name}: 0"))
    assert f"{name}: got 0, allowed are integers from" in message


def test_a_section_without_options_is_an_empty_one(data, checkpoint, no_model, capsys):
    message = refused(capsys, "run", configuration(data, checkpoint, "forget_limit: 0\ntrain:\nevaluate:"))
    assert "limit: got 0" in message


def test_a_run_that_could_not_begin_leaves_no_folder(data, checkpoint, no_model, capsys):
    config = configuration(data, checkpoint, "")
    (data / "forget.jsonl").write_text('{"text": "w1"}\n{"text"\n')
    assert "forget.jsonl: line 2" in refused(capsys, "run", config)
    assert not (data / "run").exists()


def test_a_run_refuses_alternates_of_another_length_before_the_first_step(data, checkpoint, no_model, capsys):
    (data / "alternate.jsonl").write_text('{"text": "the capital of w1 is w2 ."}\n')
    section = f"train: {{method: {{objective: dpo}}, alternate: {data / 'alternate.jsonl'}}}"
    message = refused(capsys, "run", configuration(data, checkpoint, section))
    assert "train: alternate: got 1 documents, allowed is one for each of the 8" in message
    assert not (data / "run").exists()


def test_a_configuration_that_is_no_text(data, capsys):
    (data / "run.yaml").write_bytes(b"\xff\xfe\x00")
    assert "run.yaml: not UTF-8 text" in refused(capsys, "run", data / "run.yaml")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"device": "nowhere"}, "device: got 'nowhere'"),
        ({"output": "forget.jsonl/profile"}, "forget.jsonl is not a folder"),
        ({"retain": "forget.jsonl"}, "the forget set equals the retain set"),
    ],
)
def test_profile_checks_its_options_first(data, checkpoint, no_model, capsys, monkeypatch, changes, words):
    monkeypatch.chdir(data)
    given = {"model": checkpoint("mixtral"), "forget": "forget.jsonl", "retain": "retain.jsonl", "output": "profile"}
    assert words in refused(capsys, "profile", *flags(**{**given, **changes}))
    assert not (data / "profile").exists()


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_an_output_below_a_file_is_refused_first(data, checkpoint, no_model, capsys, verb):
    given = {"forget": data / "forget.jsonl", "retain": data / "retain.jsonl", "output": data / "other.jsonl" / "x"}
    named = {"models": checkpoint("mixtral")}
    if verb == "train":
        named = {"model": checkpoint("mixtral"), "method.weighting": "uniform"}
    assert "other.jsonl is not a folder" in refused(capsys, verb, *flags(**given, **named))


def test_an_output_in_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    refuse_existing(tmp_path / "new" / "profile")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as on a file system that is mounted read-only
    with pytest.raises(UserError, match="is not writable"):
        refuse_existing(tmp_path / "new" / "profile")


def test_train_refuses_the_calibration_of_other_forget_data_or_another_model(data, checkpoint, capsys, caplog):
    given = {"model": checkpoint("mixtral"), "forget": data / "forget.jsonl", "retain": data / "retain.jsonl"}
    assert cli.main(["profile", *flags(**given, output=data / "profile")]) == 0
    assert cli.main(["calibrate", *flags(profile=data / "profile", output=data / "calibration")]) == 0
    training = {**given, "calibration": data / "calibration", "training.max_steps": 1, "output": data / "model"}

    message = refused(capsys, "train", *flags(**{**training, "forget": data / "other.jsonl"}))
    assert "forget: the data is not what the calibration was made for" in message
    message = refused(capsys, "train", *flags(**{**training, "model": checkpoint("olmoe")}))
    assert "of type mixtral, and" in message
    assert "of type olmoe" in message
    assert not list(data.glob("model*"))

    again = tiny.save_checkpoint(data / "again", "mixtral", seed=1)
    assert cli.main(["train", *flags(**{**training, "model": again})]) == 0
    assert f"is {again} the same model?" in caplog.text
    # The mean over a run says something else after a resume: not on record.
    assert all("train_loss" not in entry for entry in read_json(data / "model" / "trace.json")["log"])


@pytest.mark.parametrize("metrics", [[], {}, {"checkpoints": {}}, 3])
def test_report_refuses_measures_that_evaluate_did_not_write(tmp_path, capsys, metrics):
    write_json(tmp_path / "metrics.json", metrics)
    assert "metrics.json: not measures that evaluate wrote" in refused(capsys, "report", tmp_path)


def full(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_is_one_message_and_the_run_goes_on(data, checkpoint, capsys, monkeypatch):
    given = {"model": checkpoint("mixtral"), "forget": data / "forget.jsonl", "retain": data / "retain.jsonl"}
    options = {"method.weighting": "uniform", "training.max_steps": 2, "training.save_steps": 1}
    words = flags(**given, **options, output=data / "model")
    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "safe_save_file", full)
        assert "No space left on device" in refused(capsys, "train", *words)
    assert not (data / "model").exists()
    assert cli.main(["train", *words]) == 0

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        message = refused(capsys, "profile", *flags(**given, output=data / "profile"))
    assert "No space left on device" in message
    assert not list(data.glob("*profile*"))


def test_a_run_folder_that_cannot_be_written_to(data, checkpoint, no_model, capsys):
    (data / "run" / LOCK).mkdir(parents=True)
    assert "run: cannot work there" in refused(capsys, "run", configuration(data, checkpoint, ""))
