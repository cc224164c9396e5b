"""The method study: its arithmetic by hand, its corpora, and a run of seconds that is killed and goes on."""

import contextlib
import doctest
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_study

from studies.method_study import manuals, merge, report, results, statistics
from studies.method_study.__main__ import main
from studies.method_study.cells import SECTIONS, SHUFFLED, TRACE, UNIFORM, Arm, ordered
from studies.method_study.statistics import Difference, View, at_equal, holm, sign_flip, tuned
from studies.method_study.work import arm_file
from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json


def curve(forgotten, kept):
    pairs = zip(forgotten, kept, strict=True)
    return [{"step": 4 * i, "F_nll": f, "R_nll": f / 10, "A_accuracy": a} for i, (f, a) in enumerate(pairs)]


def test_interpolation_takes_the_first_crossing_and_knows_where_it_ends():
    bent = curve([0, 2, 1, 4], [1.0, 0.8, 0.9, 0.3])
    found = at_equal(bent, "F_nll", np.array([0.0, 1.0, 2.5, 5.0]), "A_accuracy")
    np.testing.assert_allclose(found, [1.0, 0.9, 0.6, np.nan])


def test_equal_forgetting_and_equal_steps_tell_a_slower_arm_from_a_better_one():
    fast, slow = curve([0, 2, 4], [1.0, 0.8, 0.6]), curve([0, 1, 2, 3, 4], [1.0, 0.9, 0.8, 0.7, 0.6])
    assert View("F_nll", 1, 4).difference(slow, fast, "A_accuracy") == pytest.approx(0)
    assert View("R_nll", 0, math.inf).difference(slow, fast, "A_accuracy") == pytest.approx(0)
    assert View("F_nll", 1, 4).difference(slow, fast, "step") == pytest.approx(5)
    # By step 4 fast has lost 0.2, slow 0.1; the mean over steps 0 to 8 is half of the last gap.
    assert View("step", 0, math.inf).difference(slow, fast, "A_accuracy") == pytest.approx(0.1)


def test_the_range_of_forgetting_begins_at_the_start_of_the_curves():
    late = curve([2, 3, 6], [1.0, 0.8, 0.2])
    assert View("F_nll", 1, 4).value(late, "A_accuracy") == pytest.approx(0.5)


def test_arms_that_forgot_too_little_are_not_compared():
    short, full = curve([0, 2], [1, 0.5]), curve([0, 4], [1, 0.5])
    assert math.isnan(View("F_nll", 1, 4).difference(short, full, "A_accuracy"))
    assert not math.isnan(View("F_nll", 0, 4).difference(short, full, "A_accuracy"))


@pytest.mark.parametrize(
    ("values", "p"),
    [([1, 2, 3], 2 / 8), ([3, -1, 2], 4 / 8), ([1] * 12, 2 / 4096), ([0, 0], 1.0), ([1, -1], 1.0)],
)
def test_sign_flip_by_hand(values, p):
    assert sign_flip(np.array(values, dtype=float)) == pytest.approx(p)


def test_sign_flip_of_many_models_is_near_the_normal_tail():
    values = np.array([1.0, -1.0] * 10 + [1.0] * 8)  # z = 8 / sqrt(28), p = 0.13 with the tie
    assert sign_flip(values) == pytest.approx(0.185, abs=0.02)  # P(|sum of 28 signs| >= 8), binomial


def test_difference_by_hand():
    found = Difference.of([0.1, math.nan, 0.3])
    assert (found.n, found.values) == (2, (0.1, None, 0.3))
    assert found.mean == pytest.approx(0.2)
    assert found.standard_error == pytest.approx(0.1)  # sd 0.1414 / sqrt 2
    assert Difference.of([math.nan]).n == 0


def test_holm_by_hand():
    assert holm([0.01, math.nan, 0.5, 0.02])[::2] == pytest.approx([0.03, 0.5])
    assert holm([0.01, math.nan, 0.5, 0.02])[3] == pytest.approx(0.04)
    assert holm([0.9, 0.9]) == [1.0, 1.0]


def test_tuning_looks_at_the_other_models_only():
    # By its own value model 2 would take 1; the others say 8.
    assert tuned({1.0: [0.0, 0.0, 2.0], 8.0: [0.5, 0.5, 0.1]})[2] == 0.1
    assert math.isnan(tuned({1.0: [0.0, math.nan, 1.0], 8.0: [0.0, 0.5, 1.0]})[1])


def test_every_arm_has_its_own_file_name_and_its_baseline_runs_before_it():
    for section, arms in SECTIONS.items():
        assert len({(arm.corpus, arm.name) for arm in arms}) == len(arms)
        queue = list(ordered(["base", section], 2))
        assert len(set(queue)) == len(queue)
        for seed, arm in queue:
            if arm.weights == TRACE:
                assert queue.index((seed, arm.baseline)) < queue.index((seed, arm))


MACHINE = {"commit": "c0ffee", "device": "a CPU", "torch": "2"}


def made_up_runs(gain):
    """Four models whose TRACE arm keeps `gain` more, give or take, and whose control keeps nothing more."""
    rng = random.Random(0)
    runs = {}
    for seed in range(4):
        for weights, extra in ((UNIFORM, 0.0), (TRACE, gain + rng.gauss(0, 0.001)), (SHUFFLED, rng.gauss(0, 0.001))):
            points = [
                {"step": 4 * i, "F_nll": float(i), "R_nll": 0.1 * i}
                | {f"{g}_accuracy": 0.9 - 0.1 * i + (extra if i else 0) for g in "ANR"}
                for i in range(7)
            ]
            runs[seed, Arm(weights=weights)] = {"curve": points, "diverged": ""}
    return runs


def test_words_follow_the_numbers_and_four_models_are_too_few_to_claim():
    record = results.collect(made_up_runs(0.05), 4, MACHINE)
    (found,) = [c for c in record["comparisons"] if c["family"] == "uniform"]
    assert found["differences"]["A_accuracy"]["mean"] == pytest.approx(0.05, abs=0.002)
    assert found["differences"]["A_accuracy"]["p"] == 2 / 16
    text = report.markdown(record)
    assert "too few for any finding" in text
    assert "**" not in text.split("### TRACE")[1]


def test_an_earlier_run_lends_what_it_has_of_more_models():
    few = {key: run for key, run in made_up_runs(0.0).items() if key[0] < 2 and key[1].weights != SHUFFLED}
    other = Arm(weights=UNIFORM, pace=0.5)
    few |= {(seed, other): few[seed, Arm(weights=UNIFORM)] for seed in range(2)}
    record = results.collect(few, 2, MACHINE)
    earlier = results.collect(made_up_runs(0.05), 4, {**MACHINE, "commit": "00dad5"})
    found = merge.merged(record, earlier)
    assert [m["commit"] for m in found["machines"]] == ["c0ffee", "00dad5"]
    assert found["models"] == 4
    pace = [c for c in found["comparisons"] if c["family"] == "pace"]
    (gain,) = [c for c in found["comparisons"] if c["family"] == "uniform"]
    assert {c["machine"] for c in pace} == {0}
    assert gain["machine"] == 1
    assert gain == next({**c, "machine": 1} for c in earlier["comparisons"] if c["family"] == "uniform")
    assert "| TRACE† | uniform | 4 |" in report.markdown(found)
    whole = merge.merged(earlier, record)  # nothing of the smaller run but what only it has
    assert [c["machine"] for c in whole["comparisons"] if c["family"] == "uniform"] == [0]
    assert merge.merged(found, found) == found


def test_two_machines_stand_side_by_side():
    record = results.collect(made_up_runs(0.05), 4, MACHINE)
    other = results.collect(made_up_runs(0.01), 4, {**MACHINE, "device": "another CPU"})
    found = merge.merged(record, other)
    (gain,) = [entry for entry in found["repeated"] if entry["family"] == "uniform"]
    assert [*gain["runs"]] == ["another CPU", "a CPU"]
    row = next(line for line in report.markdown(found).split("two machines")[1].splitlines() if "| TRACE |" in line)
    assert "+0.010 and +0.050 | +0.030 ± 0.00" in row
    assert merge.merged(record, found)["repeated"] == found["repeated"]


def test_publishing_replaces_what_is_between_the_marks():
    page = f"before\n{report.BEGIN_MARK}\nold\n{report.END_MARK}\nafter\n"
    assert report.publish(page, "new") == f"before\n{report.BEGIN_MARK}\n\nnew\n{report.END_MARK}\nafter\n"
    with pytest.raises(UserError, match="lacks the lines"):
        report.publish("no marks", "new")


def test_the_published_page_is_what_its_record_says():
    page = Path(__file__).parents[3] / "studies" / "method_study" / "results.md"
    record = json.loads(page.with_suffix(".json").read_text())
    assert report.publish(page.read_text(), report.markdown(record)) == page.read_text()


def test_text_splits_by_page():
    text = {manuals.FORGOTTEN: [[f"git {page} {i}" for i in range(8)] for page in range(60)]}
    text |= {family: [[f"{family} {page} {i}" for i in range(8)] for page in range(30)] for family in "xyz"}
    text[manuals.GENERAL] = [[f"gpl {i}" for i in range(100)]]
    drawn = manuals.split(text, 3)
    pages = {group: {" ".join(w.split()[:2]) for w in windows} for group, windows in drawn.groups.items()}
    assert {group: len(found) for group, found in pages.items()} == {"F": 12, "N": 24, "A": 24, "R": 36}
    assert not pages["F"] & pages["N"] | pages["F"] & pages["A"] | pages["N"] & pages["A"]
    retain, near = drawn.retain(0.1, 200)
    assert len(retain) == 200
    assert [i for i, window in enumerate(retain) if window in drawn.groups["A"]] == near
    assert len(near) == 20
    assert not set(retain) & {*drawn.groups["F"], *drawn.groups["N"], *drawn.groups["R"]}
    assert manuals.split(text, 3) == drawn != manuals.split(text, 4)


def test_a_machine_without_manuals_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(manuals, "MANUALS", tmp_path / "none")
    monkeypatch.setattr(manuals, "PACKAGES", {})
    with pytest.raises(UserError, match="too little text"):
        manuals.load(tmp_path / "text")
    assert not (tmp_path / "text").exists()


def test_wrong_output(tmp_path, capsys):
    assert main(["--output", str(tmp_path), "--report-only"]) == 2
    assert "no finished arm" in capsys.readouterr().err


@pytest.mark.parametrize("module", [manuals, statistics], ids=lambda module: module.__name__)
def test_docstring_examples(module):
    assert doctest.testmod(module).failed == 0


@pytest.mark.slow
def test_a_killed_study_goes_on_and_reports(tmp_path):
    output = tmp_path / "study"
    first = arm_file(output, 0, Arm(weights=UNIFORM))
    root = Path(__file__).parents[3]  # a script's own folder is on its path, not the one it starts in
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, tiny_study.__file__, str(output)]
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not first.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    made = first.stat().st_mtime_ns
    assert tiny_study.run(output) == 0
    assert first.stat().st_mtime_ns == made
    assert not list(output.rglob("*.partial"))
    arms = [read_json(arm_file(output, seed, arm)) for seed in range(2) for arm in SECTIONS["base"]]
    assert [len(arm["curve"]) for arm in arms] == [4] * 6
    assert all(arm["curve"][-1]["F_nll"] > arm["curve"][0]["F_nll"] for arm in arms)
    assert arms[1]["calibration"]["error"] < arms[1]["calibration"]["error_before"]
    record = json.loads((output / "results.json").read_text())
    assert [level["n"] for level in record["levels"]] == [2, 2, 2]
    assert (output / "results.md").read_text() == report.markdown(record)
    assert (output / "results.png").stat().st_size > 1000
