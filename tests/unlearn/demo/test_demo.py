"""The demo: its world, its arithmetic, its workers, and the whole of it in a small configuration."""

import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import worker_tasks

from trace_unlearn import files
from trace_unlearn.demo import compare, corpus, workers
from trace_unlearn.demo.corpus import make_corpus
from trace_unlearn.demo.demo import DemoOptions, run_demo
from trace_unlearn.demo.pretrain import PretrainOptions, ask
from trace_unlearn.demo.unlearn import ARMS, Recipe
from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json
from trace_unlearn.sources.model import load_model, load_tokenizer
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.verbs import cli


@pytest.fixture(scope="module")
def world():
    return make_corpus(7, pretrain_documents=400)


def sentences(text):
    return [f"{sentence} ." for sentence in text.removesuffix(" .").split(" . ")]


def test_corpus_is_deterministic(world):
    assert make_corpus(7, pretrain_documents=400) == world
    assert make_corpus(8, pretrain_documents=400) != world
    # Facts, names and retain set do not depend on how much else is drawn.
    assert make_corpus(7, pretrain_documents=3).retain == world.retain


def test_groups_have_the_right_sizes_and_are_disjoint(world):
    assert {group: len(facts) for group, facts in world.facts.items()} == {"F": 48, "N": 96, "A": 96, "R": 96}
    prompts = [fact.prompt for facts in world.facts.values() for fact in facts]
    assert len(set(prompts)) == len(prompts)


def test_domains_have_their_own_names(world):
    def names(group):
        return {word for fact in world.facts[group] for word in fact.prompt.split()[3:5]}

    assert names("N") <= names("F") | names("A") | names("N")
    assert len(names("F") | names("N") | names("A")) == 2 * corpus.NAMES
    assert not names("R") & (names("F") | names("N") | names("A"))


def test_forget_set_is_about_f_alone(world):
    known = {fact.sentence for fact in world.facts["F"]}
    assert all(set(sentences(text)) <= known for text in world.forget)
    assert {sentence for text in world.forget for sentence in sentences(text)} == known


def test_retain_set_has_what_it_should(world):
    said = {sentence for text in world.retain for sentence in sentences(text)}
    for group in "FNR":
        assert not said & {fact.sentence for fact in world.facts[group]}
    share = len(world.adjacent_documents) / len(world.retain)
    assert share == pytest.approx(corpus.ADJACENT_SHARE, abs=1 / len(world.retain))
    adjacent = {fact.sentence for fact in world.facts["A"]}
    for number, text in enumerate(world.retain):  # one source a document
        assert {sentence in adjacent for sentence in sentences(text)} == {number in world.adjacent_documents}


def test_pretraining_sees_every_group(world):
    said = {sentence for text in world.pretrain for sentence in sentences(text)}
    for facts in world.facts.values():
        assert len(said & {fact.sentence for fact in facts}) > 0.9 * len(facts)


def test_every_document_has_the_same_length_and_no_unknown_word(world):
    tokenizer = world.tokenizer()
    for texts in (world.pretrain, world.forget, world.retain):
        ids = tokenizer([f"{text} </s>" for text in texts])["input_ids"]
        assert {len(row) for row in ids} == {corpus.DOCUMENT_TOKENS}
        assert tokenizer.unk_token_id not in {token for row in ids for token in row}
    assert len(set(world.vocabulary)) == len(world.vocabulary) == len(tokenizer)


def curve(f_nll, accuracy, nll=None):
    nll = nll or [1 - value for value in accuracy]
    return [
        {"step": 4 * i, "F_nll": f} | {f"{g}_accuracy": a for g in "NAR"} | {f"{g}_nll": n for g in "NAR"}
        for i, (f, a, n) in enumerate(zip(f_nll, accuracy, nll, strict=True))
    ]


def test_interpolation_takes_the_first_crossing():
    # Forgetting goes back and forth: 2 is first reached half-way between the second and the third point.
    wavy = curve([0.0, 1.0, 3.0, 0.5, 4.0], [1.0, 0.8, 0.4, 0.9, 0.1])
    found = compare.at_equal_forgetting(wavy, "N_accuracy", [0.0, 2.0, 3.5, 5.0])
    np.testing.assert_allclose(found, [1.0, 0.6, 0.9 - 0.8 * 3.0 / 3.5, np.nan])


def test_differences_are_paired_with_their_standard_error():
    steps = [0.0, 6.0]
    models = [
        {arm: curve(steps, [1.0, 1.0 - loss]) for arm, loss in zip(ARMS, losses, strict=True)}
        for losses in ([0.6, 0.5, 0.6], [0.8, 0.5, 0.8], [0.7, 0.2, 0.7])
    ]
    found = compare.compare(models)
    middle = sum(compare.FORGET_NLL) / 2 / 6  # utility is linear in forgetting here
    gains = middle * np.array([0.1, 0.3, 0.5])
    difference = found.differences["N_accuracy"]["TRACE"]
    assert difference.mean == pytest.approx(gains.mean())
    assert difference.standard_error == pytest.approx(gains.std(ddof=1) / math.sqrt(3))
    assert found.utility["N_accuracy"]["uniform"] == pytest.approx(1 - middle * 0.7)
    assert found.differences["N_accuracy"]["shuffled"].mean == pytest.approx(0, abs=1e-12)


def test_arms_are_compared_where_all_have_been():
    short = curve([0.0, 4.0], [1.0, 0.5])
    long = curve([0.0, 8.0], [1.0, 0.0])
    found = compare.compare([{"uniform": short, "TRACE": long, "shuffled": long}])
    assert found.ranges == ((1.5, 4.0),)
    assert found.differences["N_accuracy"]["TRACE"].mean == pytest.approx(0)
    unforgetful = curve([0.0, 1.0], [1.0, 1.0])
    left_out = compare.compare([{"uniform": unforgetful, "TRACE": long, "shuffled": long}])
    assert (left_out.models, left_out.left_out) == (0, (0,))
    assert compare.verdict(left_out, "TRACE", "shuffled") == ["No model forgot enough in every arm to compare them."]


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.1, 0.11, 0.12], "TRACE helped"),
        ([-0.1, -0.11, -0.12], "TRACE hurt"),
        ([0.1, -0.05, 0.2], "the noise is larger"),
        ([0.01, 0.02, 0.03], "the noise is larger"),  # two standard errors, but three models
    ],
)
def test_verdict_goes_by_students_t(gains, said):
    models = [
        {
            "uniform": curve([0, 6], [0.5, 0.5]),
            "TRACE": curve([0, 6], [0.5 + g] * 2),
            "shuffled": curve([0, 6], [0.5] * 2),
        }
        for g in gains
    ]
    sentences = compare.verdict(compare.compare(models), "TRACE", "shuffled")
    assert all(said in sentence for sentence in sentences)


def test_one_model_claims_nothing():
    model = {arm: curve([0, 6], [1.0, 0.0]) for arm in ARMS}
    text = " ".join(compare.verdict(compare.compare([model]), "TRACE", "shuffled"))
    assert "cannot tell a gain from noise" in text
    assert "helped" not in text


def test_every_objective_of_the_demo_has_a_learning_rate_a_title_and_a_weighed_retain_loss():
    from trace_unlearn.demo.demo import OBJECTIVES
    from trace_unlearn.demo.results import TITLES
    from trace_unlearn.demo.unlearn import LEARNING_RATES

    assert set(OBJECTIVES) == set(LEARNING_RATES) == set(TITLES)
    assert all(TraceConfig(objective=name).routes_weigh for name in OBJECTIVES)


def test_tasks_wait_for_what_they_need(tmp_path):
    path = tmp_path / "notes"
    tasks = [
        workers.Task("c", worker_tasks.note, (path, "c"), after=("b",)),
        workers.Task("b", worker_tasks.note, (path, "b"), after=("a", "never asked for")),
        workers.Task("a", worker_tasks.note, (path, "a")),
    ]
    seen = []
    workers.run_tasks(tasks, 2, lambda tasks, at_work: seen.append(at_work))
    assert path.read_text() == "abc"
    assert all(task.done == 1 for task in tasks)
    assert {"a"} in seen


def test_a_users_mistake_in_a_task_stays_one():
    with pytest.raises(UserError, match="disk full"):
        workers.run_tasks([workers.Task("bad", worker_tasks.mistake, ())], 1, lambda *_: None)


def test_a_failed_task_ends_everything(tmp_path):
    tasks = [
        workers.Task("long", worker_tasks.sleep, (tmp_path / "begun",)),
        workers.Task("bad", worker_tasks.fail, ()),
    ]
    begun = time.monotonic()
    with pytest.raises(workers.WorkerError, match="as it should"):
        workers.run_tasks(tasks, 2, lambda *_: None)
    assert time.monotonic() - begun < 55
    assert multiprocessing.active_children() == []


def test_ctrl_c_ends_the_workers(tmp_path):
    def interrupt(tasks, at_work):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.run_tasks([workers.Task("long", worker_tasks.sleep, (tmp_path / "begun",))], 1, interrupt)
    assert (tmp_path / "begun").exists()
    assert multiprocessing.active_children() == []


SMALL = Recipe(
    pretrain=PretrainOptions(steps=450),
    retain_documents=256,
    unlearn_steps=80,
    evaluate_every=8,
    stop_at_forget_nll=3.2,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One model with a shortened recipe; (output folder, options, results, what was printed)."""
    output = tmp_path_factory.mktemp("demo") / "run"
    options = DemoOptions(output=str(output), models=1, workers=2)
    printed = []
    return output, options, run_demo(options, SMALL, printed.append), printed


@pytest.mark.slow
def test_calibration_finds_the_adjacent_tokens_by_routing_alone(demo):
    (model,) = demo[2].models
    calibration = model.calibration
    assert calibration.mean_error < 0.6 * model.error_before
    assert calibration.max_error < (calibration.r - calibration.f).abs().max()
    assert model.adjacent_weight["TRACE"] > 1.3
    assert model.adjacent_weight["shuffled"] == pytest.approx(1, abs=0.2)
    assert calibration.token_weight.double().mean().item() == pytest.approx(1, abs=1e-5)
    assert 0 < calibration.ess <= 1


@pytest.mark.slow
def test_every_arm_forgets(demo):
    for arm_curve in demo[2].models[0].curves.values():
        assert arm_curve[0]["F_nll"] < 1 < 3 < arm_curve[-1]["F_nll"]
        assert arm_curve[-1]["F_accuracy"] < 0.5 < arm_curve[0]["F_accuracy"]


@pytest.mark.slow
def test_what_is_written_is_a_checkpoint_that_has_forgotten(demo):
    output, _, results, _ = demo
    folder = output / "model-0" / "grad_diff" / "TRACE"
    facts = make_corpus(0, pretrain_documents=0).facts["F"]
    _, nll = ask(load_model(folder, device="cpu"), load_tokenizer(folder), facts)
    assert nll == pytest.approx(results.models[0].curves["TRACE"][-1]["F_nll"], rel=1e-3)


@pytest.mark.slow
def test_demo_prints_and_writes_its_findings(demo):
    output, _, results, printed = demo
    text = "\n".join(printed)
    for expected in (
        "weighted r",
        "effective sample size",
        "TRACE − uniform",
        "shuffled − uniform",
        "N accuracy",
        "R NLL",
    ):
        assert expected in text
    assert "cannot tell a gain from noise" in text
    html = (output / "report.html").read_text()
    assert "http" not in html.replace("https://", "http")
    assert html.count("data:image/png;base64,") == 5
    assert read_json(output / "results-grad_diff.json")["models"][0]["ess"] == results.models[0].calibration.ess


@pytest.mark.slow
def test_second_run_reuses_everything_and_says_the_same(demo):
    output, options, _, printed = demo
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    again = []
    begun = time.monotonic()
    run_demo(options, SMALL, again.append)
    assert time.monotonic() - begun < 60
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")} == before
    assert again[2:-1] == printed[2:-1]


@pytest.mark.slow
def test_an_interrupted_demo_goes_on(demo):
    output, options, results, _ = demo
    folder = output / "model-0"
    kept = (folder / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    (folder / "grad_diff" / "TRACE").rename(output / "put-aside")
    again = run_demo(options, SMALL, lambda _: None)
    assert (folder / "checkpoint" / "model.safetensors").stat().st_mtime_ns == kept
    torch.testing.assert_close(
        torch.tensor([point["F_nll"] for point in again.models[0].curves["TRACE"]]),
        torch.tensor([point["F_nll"] for point in results.models[0].curves["TRACE"]]),
    )


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(("signal_number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_stopped_at_work_it_leaves_no_process_and_nothing_half_made(tmp_path, signal_number, exit_code):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "trace_unlearn.verbs.cli", "demo", "--quick", "--output", str(output)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
    )
    try:
        deadline = time.monotonic() + 120
        while not (output / "model-0" / "data").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal_number)
        message = process.communicate(timeout=60)[1].decode()
        assert process.returncode == exit_code
        assert "Traceback" not in message
        while alive(process.pid):  # the workers see that the parent is gone
            assert time.monotonic() < deadline + 60
            time.sleep(0.05)
        assert not list(output.rglob("*.partial"))
        assert [path.name for path in (output / "model-0").iterdir()] == ["data"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_another_recipe_is_refused_in_the_same_folder(demo):
    output, options, _, _ = demo
    with pytest.raises(UserError, match="--overwrite"):
        run_demo(options, Recipe(), lambda _: None)
    assert (output / "model-0" / "checkpoint").is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "0"], "--models: got 0"),
        (["--objective", "magic"], "--objective: got 'magic'"),
        (["--workers", "-1"], "--workers: got -1"),
        (["--models", "many"], "--models: expected int"),
    ],
)
def test_wrong_options(tmp_path, capsys, words, said):
    assert cli.main(["demo", "--output", str(tmp_path / "run"), *words]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, capsys, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert cli.main(["demo", "--output", str(tmp_path), *overwrite]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_replaces_an_earlier_demo(tmp_path, monkeypatch):
    from trace_unlearn.demo import demo as verb

    output = tmp_path / "run"
    files.write_json(output / verb.MARKER, {"demo": "0.0.1", "recipe": {}})
    (output / "old").write_text("")
    verb._claim(output, Recipe(), overwrite=True)
    assert [path.name for path in output.iterdir()] == [verb.MARKER]
    assert json.loads((output / verb.MARKER).read_text())["recipe"]["unlearn_steps"] == 140
    assert list(tmp_path.iterdir()) == [output]
    verb._claim(output, Recipe(), overwrite=False)  # the same demo: goes on
