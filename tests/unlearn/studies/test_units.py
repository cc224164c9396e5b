"""The study of units: its arms, its arithmetic by hand, its page, and a run of seconds that goes on where it was."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tiny_study
import torch

from studies.method_study.cells import ORACLE, SHUFFLED, UNIFORM, Arm
from studies.method_study.statistics import Difference
from studies.method_study.work import adjacent_weight, arm_file, as_heavy, oracle
from studies.method_study.worlds import Facts
from studies.units import __main__ as units
from studies.units import arms, cells, contrasts, report, results
from trace_unlearn.calibration.calibrate import calibrate
from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json
from trace_unlearn.routing.statistics import RoutingStatistics

FOLDER = Path(units.__file__).parent
MACHINE = {"commit": "c0ffee", "device": "a CPU", "torch": "2"}


def test_every_arm_is_planned_once_and_every_contrast_has_its_arms():
    planned = list(cells.ordered())
    assert len(set(planned)) == len(planned)
    assert {seed for seed, _ in planned} == set(range(12, 24))
    names = [(seed, arm.corpus, arm.name) for seed, arm in planned]
    assert len(set(names)) == len(names)
    known = {arm for _, arm in planned}
    for contrast in contrasts.CONTRASTS:
        assert {contrast.arm, contrast.against} <= known
    assert all(arm in known for lines in contrasts.FRONTIER.values() for line in lines.values() for arm in line)
    assert len({results.label(arm) for arm in known}) == len(known)


def test_families_have_the_sizes_of_the_protocol():
    sizes = {}
    for contrast in contrasts.CONTRASTS:
        for family, measures in contrast.families:
            sizes[family] = sizes.get(family, 0) + len(measures)
    assert sizes == {"primary": 22, "secondary": 22, "confirmations": 12}
    protocol = (FOLDER / "protocol.md").read_text()
    assert protocol.count("22 tests") == 2
    assert "12 tests" in protocol


def test_intervals_by_hand():
    found = Difference.of([1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)
    assert found.interval == pytest.approx((2 - half, 2 + half))
    assert found.smallest == pytest.approx((4.303 + 1.061) / math.sqrt(3))
    assert all(math.isnan(bound) for bound in Difference.of([1.0]).interval)


def statistics():
    """Four documents of two tokens; the forget set uses expert 0, document 3 does too."""
    routes = torch.tensor([1, 2, 1, 2, 2, 1, 0, 0], dtype=torch.uint8).view(8, 1, 1)
    counts = torch.bincount(routes.flatten().long(), minlength=3)[None]
    offsets = torch.tensor([0, 2, 4, 6, 8])
    return RoutingStatistics(torch.tensor([[6, 1, 1]]), counts, 8, 8, 1, routes, offsets)


def test_the_oracle_has_two_weights_and_its_ess():
    found = oracle(calibrate(statistics(), min_count=1), [3], 0.5)
    # A quarter of the tokens: a = 1 + sqrt(3), b = (1 - a / 4) / (3 / 4).
    high = 1 + math.sqrt(3)
    assert found.token_weight.tolist() == pytest.approx([(1 - high / 4) * 4 / 3] * 6 + [high] * 2)
    assert found.token_weight.mean().item() == pytest.approx(1)
    assert found.ess == pytest.approx(0.5)
    assert adjacent_weight(found, [3]) == pytest.approx(high)
    assert adjacent_weight(found, []) is None


def test_weights_are_brought_to_a_wanted_weight_of_a():
    stats = statistics()
    found = as_heavy(lambda ess: calibrate(stats, min_count=1, min_ess=ess, unit="document"), [3], 1.5, 0.5)
    assert adjacent_weight(found, [3]) == pytest.approx(1.5, abs=0.01)
    assert found.ess > 0.5


def test_the_other_domain_is_held_out_and_as_large():
    world = Facts(12, units.sizes_of(cells.FACTS))
    held_out = {fact.sentence for fact in world._corpus.facts["R"]}
    documents = world.other_domain()
    said = {f"{sentence} ." for text in documents for sentence in text.removesuffix(" .").split(" . ")}
    assert len(documents) == len(world.forget)
    assert said <= held_out
    assert len(said) <= len(held_out) / 4
    names = [{word for sentence in group for word in sentence.split()[3:5]} for group in (said, held_out - said)]
    assert not names[0] & names[1]


def run(loss, seed, slope=0.0):
    """A curve along which A loses `loss` of accuracy for each nat, and as much NLL."""
    points = []
    for i in range(7):
        kept = 1 - (loss + slope * seed) * i
        point = {f"{g}_{m}": kept if m == "accuracy" else 1 - kept for g in "ANR" for m in ("accuracy", "nll")}
        points.append({"step": 4 * i, "F_nll": float(i), "F_accuracy": 1.0, **point})
    return {"curve": points, "diverged": ""}


def made_up(seeds, loss_of):
    return {(seed, arm): run(loss_of(arm), seed) for seed, arm in cells.ordered() if seed in seeds}


def kind_loss(arm):
    return {UNIFORM: 0.1, SHUFFLED: 0.1, ORACLE: 0.02}.get(arm.weights, 0.05 if arm.unit == "document" else 0.08)


def test_contrasts_by_hand():
    record = results.collect(made_up(range(12, 24), kind_loss), MACHINE)
    assert record["arms"] == record["planned"]
    assert len(record["contrasts"]) == len(contrasts.CONTRASTS)
    (found,) = [
        c
        for c in record["contrasts"]
        if results.label(cells.DOCUMENT) == c["arm"] and c["against"][:7] == "uniform" and "at 8" in c["against"]
    ]
    accuracy = found["differences"]["A_accuracy"]
    # From 0.5 to 2.5 nats uniform loses 0.1 and document 0.05 a nat: 1.5 * 0.05.
    assert accuracy["values"] == pytest.approx([0.075] * 12)
    assert accuracy["p"] == 2 / 2**12
    assert accuracy["adjusted"] == pytest.approx(22 * 2 / 2**12)
    assert found["differences"]["A_nll"]["mean"] == pytest.approx(-0.075)
    assert "adjusted" not in found["differences"]["R_accuracy"]
    text = report.markdown(record)
    assert "348 of 348" not in text or record["planned"] == 348
    assert "| document, facts, GradDiff at 8 | uniform, facts, GradDiff at 8 | 12 | A accuracy |" in text


def test_a_test_without_arms_still_counts_in_its_family():
    runs = made_up(range(12, 24), kind_loss)
    kept = {cells.DOCUMENT, cells.uniform(cells.FACTS)}
    record = results.collect({key: made for key, made in runs.items() if key[1] in kept}, MACHINE)
    (found,) = record["contrasts"]
    assert found["differences"]["A_nll"]["adjusted"] == pytest.approx(22 * 2 / 2**12)


def test_pairs_are_compared_where_both_are_there_and_few_models_find_nothing():
    runs = made_up(range(12, 15), kind_loss)
    del runs[14, cells.DOCUMENT]
    record = results.collect(runs, MACHINE)
    found = [c for c in record["contrasts"] if c["arm"] == results.label(cells.DOCUMENT)]
    assert all(c["seeds"] == [12, 13] for c in found if "other" not in c["against"])
    assert "| yes |" not in report.markdown(record)
    frontier = record["frontier"]["facts, GradDiff"]
    assert frontier["seeds"] == [12, 13]
    assert {point["line"] for point in frontier["points"]} == {"uniform", "document", "token"}


def test_a_model_that_does_not_know_its_facts_and_an_arm_that_forgot_too_little_are_named():
    runs = made_up(range(12, 14), kind_loss)
    for (seed, _), made in runs.items():
        if seed == 13:
            made["curve"][0]["N_accuracy"] = 0.9
    short = runs[12, cells.DOCUMENT]
    runs[12, cells.DOCUMENT] = {**short, "curve": short["curve"][:2]}
    record = results.collect(runs, MACHINE)
    assert record["unknowing"] == [13]
    facts = [c for c in record["contrasts"] if c["corpus"] == "facts"]
    assert all(c["seeds"] == [12] for c in facts)
    assert not [c for c in facts if c["arm"] == results.label(cells.DOCUMENT)]  # nothing to compare
    text = report.markdown(record)
    assert "did not know their facts: 13" in text


def test_the_published_tables_are_what_their_record_says():
    record = json.loads((FOLDER / "results.json").read_text())
    assert (FOLDER / "results.md").read_text() == f"# Results\n\n{report.markdown(record)}"


def test_wrong_output(tmp_path, capsys):
    assert units.main(["--output", str(tmp_path), "--report-only"]) == 2
    assert "no finished arm" in capsys.readouterr().err


SMALL = [
    (2, [cells.uniform(cells.FACTS), cells.DOCUMENT, cells.shuffled(cells.FACTS), cells.by("context", cells.FACTS)]),
    (
        1,
        [
            cells.other_domain(cells.FACTS),
            cells.oracle(cells.FACTS),
            cells.mild(cells.FACTS),
            cells.uniform(cells.EXPERTS),
        ],
    ),
]


@pytest.mark.slow
def test_a_stopped_study_goes_on_and_reports(tmp_path, monkeypatch):
    tiny = dataclasses.replace(tiny_study.TINY["facts"], forget_rise=2.5)
    monkeypatch.setattr(cells, "BLOCKS", SMALL)
    monkeypatch.setattr(units, "sizes_of", lambda arm: tiny)
    first = arm_file(tmp_path, 12, cells.DOCUMENT)

    def stop(tasks, at_work):
        if first.exists():
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as stopped:
        stopped.setattr(units.TaskBar, "__enter__", lambda self: stop)
        assert units.main(["--output", str(tmp_path), "--jobs", "1", "--corpus", "facts"]) == 130
    made = first.stat().st_mtime_ns
    assert units.main(["--output", str(tmp_path), "--jobs", "1", "--corpus", "facts", "--seeds", "12", "13"]) == 0
    assert first.stat().st_mtime_ns == made
    assert not list(tmp_path.rglob("*.partial"))
    runs = {cell: read_json(arm_file(tmp_path, *cell)) for cell in cells.ordered()}
    assert len(runs) == 12
    assert runs[12, cells.oracle(cells.FACTS)]["calibration"]["ess"] == pytest.approx(0.5, abs=1e-4)
    heavy, mild = (runs[12, arm]["calibration"] for arm in (cells.DOCUMENT, cells.mild(cells.FACTS)))
    assert mild["ess"] >= heavy["ess"]
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["arms"] == 12
    assert (tmp_path / "results.md").read_text() == f"# Results\n\n{report.markdown(record)}"


def test_arms_kept_come_back_the_same(tmp_path):
    arm = cells.shuffled(cells.FACTS)
    run = {
        "seed": 12,
        "arm": dataclasses.asdict(arm),
        "curve": [{"step": 0, "F_nll": 0.5}, {"step": 4, "F_nll": None}],
        "diverged": "",
        "calibration": {"ess": 0.5},
    }
    arms.keep({(12, arm): run}, tmp_path / "arms", tmp_path / "runs")
    assert arms.restore(tmp_path / "arms", tmp_path / "runs") == 1
    assert read_json(arm_file(tmp_path / "runs", 12, arm)) == run
    assert arms.restore(tmp_path / "arms", tmp_path / "runs") == 0  # what is there stays


def test_arms_of_other_manuals_are_not_gone_on_from(tmp_path):
    arm = Arm(corpus="manuals")
    run = {"seed": 12, "arm": dataclasses.asdict(arm), "curve": [{"step": 0}], "diverged": ""}
    here, there = ((tmp_path / name / "manuals" / "text" / "windows.json") for name in ("here", "there"))
    for windows in (here, there):
        windows.parent.mkdir(parents=True)
        windows.write_text(windows.parts[-4])
    arms.keep({(12, arm): run}, tmp_path / "arms", tmp_path / "here")
    arms.check_text(tmp_path / "arms", tmp_path / "here")
    with pytest.raises(UserError, match="other text than this machine has installed"):
        arms.check_text(tmp_path / "arms", tmp_path / "there")
    arms.keep({(12, Arm()): run}, tmp_path / "facts", tmp_path / "here")
    arms.check_text(tmp_path / "facts", tmp_path / "there")


def test_another_size_is_refused(tmp_path, monkeypatch, capsys):
    units._claim(tmp_path)
    sizes = units.sizes_of(Arm())
    monkeypatch.setattr(units, "sizes_of", lambda arm: dataclasses.replace(sizes, pace=2.0))
    with pytest.raises(UserError, match="other sizes"):
        units._claim(tmp_path)
