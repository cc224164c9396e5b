"""Calibration of what no weights can meet, of wrong settings and odd data; and the verb."""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from made_statistics import handmade, lonely, statistics
from profiled import VOCAB, documents, run

from trace_unlearn.calibration.calibrate import calibrate, select_experts
from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.errors import UserError
from trace_unlearn.routing.profile import RoutingStatistics
from trace_unlearn.verbs.calibrate import CalibrateOptions, main


@pytest.fixture(scope="module")
def profiled():
    model = tiny.model("qwen3_moe", VOCAB)
    forget, retain = documents(8, 1), documents(20, 2, longest=20)
    return model, forget, retain, run(model, forget, retain)


def test_an_expert_that_retain_data_never_reaches_is_dropped_with_a_note():
    stats = lonely(statistics(), 0, 0)
    assert [0, 0] in select_experts(stats).tolist()
    found = calibrate(stats)
    assert [0, 0] not in found.selected.tolist()
    assert any("no retain token activates (0, 0)" in note for note in found.notes)
    with pytest.raises(UserError, match=r"no retain token ever activates \(0, 0\)"):
        calibrate(stats, torch.tensor([[0, 0]]))


@pytest.mark.parametrize("rule", ["balance", "additive"])
@pytest.mark.parametrize(
    ("routes", "forget", "selected", "note"),
    [
        # Everything hits one of the two, or both; no forget token hits the third.
        ([[[0]], [[1]], [[0]], [[1]]], [[100, 0]], [[0, 0]], r"every forget token activates \(0, 0\)"),
        ([[[0, 1]], [[2, 3]], [[2, 3]]], [[60, 50, 50, 40]], [[0, 0], [0, 1]], r"same retain .*differ by 0\.100"),
        ([[[0, 1]], [[2, 3]], [[2, 3]]], [[50, 50, 50, 50]], [[0, 0], [0, 1]], r"same retain .*one of them says it"),
        (
            [[[0]], [[1]], [[2]], [[1]]],
            [[30, 20, 10, 40]],
            [[0, 0], [0, 1], [0, 2]],
            r"every retain token hits 1 of the selected experts of layer 0, and forget tokens 0\.600",
        ),
        ([[[0, 1]], [[0, 2]]], [[99, 60, 41]], [[0, 0], [0, 1]], r"every retain token activates \(0, 0\).*dropped"),
    ],
)
def test_targets_that_no_weights_meet_are_named_and_the_nearest_weights_given(rule, routes, forget, selected, note):
    found = calibrate(handmade(routes * 50, forget), torch.tensor(selected), rule=rule, min_ess=0.0)
    assert any(re.search(note, line) for line in found.notes)
    assert torch.isfinite(found.token_weight).all()
    assert torch.isfinite(found.table).all()
    before = ((found.r - found.f) ** 2).sum()
    assert ((found.weighted_r - found.f) ** 2).sum() <= before + 1e-12
    assert not any("retain token" in line or "forget token" in line for line in calibrate(statistics()).notes)


def test_an_expert_of_every_retain_token_alone_is_refused():
    with pytest.raises(UserError, match=r"every retain token activates \(0, 0\)"):
        calibrate(handmade([[[0, 1]], [[0, 2]]], [[99, 60, 41]]), torch.tensor([[0, 0]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "raking"}, "rule: got 'raking'"),
        ({"min_ess": 1.0}, "min_ess: got 1.0"),
        ({"min_ess": 0.9999995}, "min_ess: got 0.9999995, allowed is 0 <= min_ess <= 0.9999"),
        ({"min_ess": math.nan}, "min_ess: got nan"),
        ({"max_weight": 1.0}, "max_weight: got 1.0"),
        ({"max_weight": math.nan}, "max_weight: got nan"),
        ({"ridge": 0.0}, "ridge: got 0.0"),
        ({"experts_per_layer": 0}, "experts_per_layer: got 0"),
        ({"tau": math.nan}, "tau: got nan"),
        ({"rank": "kl"}, "rank: got 'kl'"),
        ({"threshold": math.nan}, "threshold: got nan"),
        ({"max_experts": 0}, "max_experts: got 0"),
        ({"min_count": -1}, "min_count: got -1"),
        ({"selected": torch.tensor([[0, 8]])}, "selected: got"),
        ({"selected": torch.tensor([[0, 1], [0, 1]])}, "more than once"),
        ({"selected": torch.tensor([0, 1])}, "selected: got"),
        ({"selected": torch.zeros(0, 2, dtype=torch.long)}, "names no"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        calibrate(statistics(), **options)


def test_weights_that_follow_the_position_are_pointed_out():
    """Retain documents whose first tokens alone use expert 0: a format, no content."""
    N, D = 400, 40
    routes = torch.full((N, 1, 1), 2, dtype=torch.uint8)
    routes[::10] = 0
    counts = torch.tensor([[N // 10, 0, N - N // 10]])
    stats = RoutingStatistics(torch.tensor([[50, 0, 50]]), counts, 100, N, 1, routes, torch.arange(0, N + 1, N // D))
    assert any("position" in note for note in calibrate(stats, tau=0.1).notes)
    assert not any("position" in note for note in calibrate(statistics()).notes)


@pytest.mark.slow
def test_killed_at_work_leaves_nothing_and_a_rerun_works(tmp_path, profiled):
    profiled[3].save(tmp_path / "profile")
    options = {"profile": str(tmp_path / "profile"), "output": str(tmp_path / "calibration")}
    code = f"""
import os, signal
from trace_unlearn import calibrate, files
from trace_unlearn.verbs.calibrate import CalibrateOptions, main
right = files.save_tensors
def deadly(*args, **others):
    right(*args, **others)
    os.kill(os.getpid(), signal.SIGKILL)
files.save_tensors = deadly
main(CalibrateOptions(**{options!r}), lambda line: None)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()} - {"profile"}
    assert left  # it was within the writing
    assert all(name.startswith(".calibration.") for name in left)
    main(CalibrateOptions(**options), lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration", "profile"]
    assert torch.equal(Calibration.load(options["output"]).token_weight, calibrate(profiled[3]).token_weight)


def test_the_verb(tmp_path, profiled):
    profiled[3].save(tmp_path / "profile")
    said = []
    options = CalibrateOptions(profile=str(tmp_path / "profile"), output=str(tmp_path / "calibration"))
    main(options, said.append)
    text = "\n".join(said)
    for word in ("weighted r", "error with uniform weights", "effective sample size", "largest weight", "median"):
        assert word in text
    assert Calibration.load(tmp_path / "calibration").rule == "balance"
    with pytest.raises(UserError, match="exists"):
        main(options, said.append)
    with pytest.raises(UserError):
        main(CalibrateOptions(profile=str(tmp_path / "nothing"), output=str(tmp_path / "new")), said.append)
    assert not (tmp_path / "new").exists()
