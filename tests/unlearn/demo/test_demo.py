"""The demo: its world, its arithmetic, its workers, and the whole of it in a small configuration."""

import contextlib
import dataclasses
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
from trace_unlearn.demo import compare, corpus, positions, verdict, workers
from trace_unlearn.demo.compare import CONTROL, STRONG, TRACE, UNIFORM
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


ALL = (*ARMS, STRONG)


def test_differences_are_paired_with_their_intervals():
    steps = [0.0, 3.0]
    models = {
        seed: {arm: curve(steps, [1.0, 1.0 - loss]) for arm, loss in zip(ALL, losses, strict=True)}
        for seed, losses in enumerate(([0.6, 0.5, 0.6, 0.3], [0.8, 0.5, 0.8, 0.3], [0.7, 0.2, 0.7, 0.3]))
    }
    found = compare.compare(models)
    middle = sum(compare.FORGET_NLL) / 2 / 3  # utility is linear in forgetting here
    gains = middle * np.array([0.1, 0.3, 0.5])
    difference = found.differences["N_accuracy"][TRACE, UNIFORM]
    assert difference.values == pytest.approx(gains)
    error = gains.std(ddof=1) / math.sqrt(3)
    assert difference.standard_error == pytest.approx(error)
    assert difference.interval == pytest.approx((gains.mean() - 4.303 * error, gains.mean() + 4.303 * error))
    assert difference.smallest_seen == pytest.approx((4.303 + 1.061) * error)
    assert found.differences["N_accuracy"][TRACE, CONTROL].values == pytest.approx(gains)
    assert found.utility["N_accuracy"][UNIFORM] == pytest.approx(1 - middle * 0.7)
    assert found.differences["N_accuracy"][CONTROL, UNIFORM].mean == pytest.approx(0, abs=1e-12)
    assert found.differences["N_accuracy"][STRONG, UNIFORM].mean == pytest.approx(middle * 0.4)
    assert found.utility["step"][UNIFORM] == pytest.approx(4 * middle)


def test_quantiles_of_students_t():
    scipy_stats = pytest.importorskip("scipy.stats")
    for share, table in ((0.975, compare.T_975), (0.8, compare.T_800)):
        for freedom, value in enumerate(table, start=1):
            assert value == pytest.approx(scipy_stats.t.ppf(share, freedom), abs=6e-4)


def test_one_difference_has_no_interval():
    alone = compare.Difference((0.3,))
    assert (alone.interval, alone.smallest_seen, alone.beyond_noise, str(alone)) == (None, None, False, "+0.300")


def test_a_pair_is_compared_where_both_have_been():
    short = curve([0.0, 2.0], [1.0, 0.5])
    long = curve([0.0, 4.0], [1.0, 0.0])
    found = compare.compare({5: {UNIFORM: short, TRACE: long, CONTROL: long, STRONG: curve([0, 1], [1, 1])}})
    assert found.differences["N_accuracy"][TRACE, UNIFORM].mean == pytest.approx(0)
    assert found.utility["N_accuracy"] == pytest.approx(
        {UNIFORM: 1 - 1.25 / 4, TRACE: 1 - 1.5 / 4, CONTROL: 1 - 1.5 / 4}
    )
    assert (STRONG, UNIFORM) not in found.differences["N_accuracy"]
    assert (found.models, found.left_out) == (1, {STRONG: (5,)})
    without = compare.compare({4: {**dict.fromkeys(ARMS, long), STRONG: long}, 5: dict.fromkeys(ARMS, long)})
    assert (without.models, without.left_out) == (2, {})
    assert [len(without.differences["A_nll"][pair].values) for pair in ((TRACE, UNIFORM), (STRONG, UNIFORM))] == [2, 1]
    left_out = compare.compare({5: {UNIFORM: curve([0.0, 1.0], [1.0, 1.0]), TRACE: long, CONTROL: long}})
    assert (left_out.models, left_out.left_out) == (0, {UNIFORM: (5,)})
    assert verdict.sentences(left_out, 4) == ["No claim: no model forgot enough in every arm to compare them."]


def told(over_uniform, over_control, arms=ALL):
    """The sentences of models whose TRACE arm loses so many nats less than uniform weights and than the control."""
    models = {}
    for seed, (gain, beyond) in enumerate(zip(over_uniform, over_control, strict=True)):
        nll = {UNIFORM: 1.0, TRACE: 1.0 - gain, CONTROL: 1.0 - gain + beyond, STRONG: 0.5}
        models[seed] = {arm: curve([0, 3], [0.5 + (1 - nll[arm]) / 4] * 2, [nll[arm]] * 2) for arm in arms}
    return verdict.sentences(compare.compare(models), 4)


@pytest.mark.parametrize(
    ("over_uniform", "over_control", "said"),
    [
        ([0.1, 0.11, 0.12], [0.1, 0.11, 0.12], "than uniform weights and than the control"),
        ([0.1, 0.11, 0.12], [0.1, -0.11, 0.02], "no claim that routing does it"),
        ([0.1, 0.11, 0.12], [-0.1, -0.11, -0.12], "no claim that routing does it"),
        ([-0.1, -0.11, -0.12], [0.1, 0.11, 0.12], "kept less"),
        ([0.1, -0.05, 0.2], [0.1, 0.11, 0.12], "No claim either way"),
        ([0.01, 0.02, 0.03], [0.1, 0.11, 0.12], "No claim either way"),  # two standard errors, but three models
    ],
)
def test_the_first_sentence_goes_by_students_t(over_uniform, over_control, said):
    first, numbers, *_ = told(over_uniform, over_control)
    assert said in first
    assert f"against uniform: accuracy {np.mean(over_uniform) / 4:+.3f}" in numbers
    assert "3 models" in numbers


def test_the_smallest_gain_and_a_larger_retain_weight_are_told():
    gains = [0.1, 0.2, 0.3]
    text = " ".join(told(gains, gains))
    assert f"or {(4.303 + 1.061) * 0.1 / math.sqrt(3):.3f} nats" in text
    assert "A retain weight 4 times as large" in text
    assert "accuracy of A +0.125" in text
    assert "(3 models, +0 steps)" in text
    assert "times as large" not in " ".join(told(gains, gains, ARMS))


def test_one_model_claims_nothing():
    text = " ".join(told([0.2], [0.2]))
    assert "one model cannot tell a gain from noise" in text
    assert "kept" not in text


def weights_by_word(world, values):
    """A stand-in for a calibration: the mean weight at each word of a fact about A; 1 elsewhere."""
    rows = [torch.ones(corpus.DOCUMENT_TOKENS - 1) for _ in world.retain]
    for document in world.adjacent_documents:
        rows[document][1:] = torch.tensor(values).repeat(corpus.SENTENCES)
    return type("Weights", (), {"weights_of": staticmethod(rows.__getitem__)})


def test_weights_are_told_apart_by_the_word_they_fall_on(world):
    names = [1.0, 1.0, 5.0, 9.0, 2.0, 0.5, 0.8, 0.7]
    found = positions.by_position(weights_by_word(world, names), world)
    assert found["A"] == pytest.approx(names)
    assert found["other facts"] == pytest.approx([1.0] * 8)
    said = positions.where_they_fall(found)
    assert said.startswith("The weights avoid what is asked: the value of a fact about A weighs 0.50")
    assert "the mean token of its document 2.50" in said
    assert "the word after 'FIRST' 9.00" in said
    even = positions.by_position(weights_by_word(world, [4.5] * 8), world)
    assert "weighs the same, 4.50" in positions.where_they_fall(even)
    liked = positions.by_position(weights_by_word(world, [1.0] * 5 + [4.0, 1.0, 1.0]), world)
    assert positions.where_they_fall(liked).startswith("The value of a fact about A weighs 4.00")


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


SMALL = Recipe(pretrain=PretrainOptions(steps=450), retain_documents=256, unlearn_steps=80, evaluate_every=8)
SEED = 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One model with a shortened recipe; (output folder, options, results, what was printed)."""
    output = tmp_path_factory.mktemp("demo") / "run"
    options = DemoOptions(output=str(output), models=1, seed=SEED, workers=2)
    printed = []
    return output, options, run_demo(options, SMALL, printed.append), printed


@pytest.mark.slow
def test_calibration_finds_the_adjacent_documents_by_routing_alone(demo):
    (model,) = demo[2].models
    calibration = model.calibration
    assert model.seed == SEED
    assert calibration.unit == SMALL.unit
    assert calibration.mean_error < model.error_before
    assert model.adjacent_weight[TRACE] > 1.3
    assert model.adjacent_weight[CONTROL] == pytest.approx(1, abs=0.5)
    assert calibration.token_weight.double().mean().item() == pytest.approx(1, abs=1e-5)
    assert 0 < calibration.ess <= 1


@pytest.mark.slow
def test_every_arm_forgets_to_chance_and_every_step_of_it_is_recorded(demo):
    curves = demo[2].models[0].curves
    assert set(curves) == {*ARMS, STRONG}
    for points in curves.values():
        assert points[0]["F_nll"] < 0.3
        assert compare.FORGET_NLL[1] < points[-1]["F_nll"]
        assert points[-1]["F_accuracy"] < 0.5 < points[0]["F_accuracy"]
        steps = [point["step"] for point in points if point["F_nll"] > 0.3]
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert len(steps) < len(points)


@pytest.mark.slow
def test_what_is_written_is_a_checkpoint_that_has_forgotten(demo):
    output, _, results, _ = demo
    folder = output / f"model-{SEED}" / "grad_diff" / "TRACE"
    known = ask(load_model(folder, device="cpu"), load_tokenizer(folder), {"F": make_corpus(SEED).facts["F"]})
    assert known["F_nll"] == pytest.approx(results.models[0].curves[TRACE][-1]["F_nll"], rel=1e-3)


@pytest.mark.slow
def test_demo_prints_and_writes_its_findings_the_verdict_first(demo):
    output, _, results, printed = demo
    text = "\n".join(printed)
    for expected in (
        "weighted r",
        "effective sample size",
        "TRACE − uniform",
        "TRACE − shuffled",
        "uniform x 4 − uniform",
        "N accuracy",
        "R NLL",
        "FIRST",
    ):
        assert expected in text
    announced = next(i for i, line in enumerate(printed) if line == "")
    assert printed[announced + 1].startswith("No claim: one model")
    html = (output / "report.html").read_text()
    assert "http" not in html.replace("https://", "http")
    assert html.count("data:image/png;base64,") == 6
    assert html.index("No claim: one model") < html.index("<img") < html.index("Each model learnt")
    record = read_json(output / "results-grad_diff.json")
    assert record["models"][0]["ess"] == results.models[0].calibration.ess
    assert record["verdict"] == results.verdict


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
def test_the_short_form_shows_what_is_there_without_the_stronger_arm(demo):
    _, options, _, _ = demo
    printed = []
    results = run_demo(dataclasses.replace(options, quick=True), SMALL, printed.append)
    assert set(results.models[0].curves) == set(ARMS)
    assert "times as large" not in "\n".join(printed)


@pytest.mark.slow
def test_an_interrupted_demo_goes_on(demo):
    output, options, results, _ = demo
    folder = output / f"model-{SEED}"
    kept = (folder / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    (folder / "grad_diff" / "TRACE").rename(output / "put-aside")
    again = run_demo(options, SMALL, lambda _: None)
    assert (folder / "checkpoint" / "model.safetensors").stat().st_mtime_ns == kept
    torch.testing.assert_close(
        torch.tensor([point["F_nll"] for point in again.models[0].curves[TRACE]]),
        torch.tensor([point["F_nll"] for point in results.models[0].curves[TRACE]]),
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
    assert (output / f"model-{SEED}" / "checkpoint").is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "0"], "--models: got 0"),
        (["--objective", "magic"], "--objective: got 'magic'"),
        (["--workers", "-1"], "--workers: got -1"),
        (["--seed", "-1"], "--seed: got -1"),
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
    assert json.loads((output / verb.MARKER).read_text())["recipe"]["unlearn_steps"] == 250
    assert list(tmp_path.iterdir()) == [output]
    verb._claim(output, Recipe(), overwrite=False)  # the same demo: goes on
