"""The benchmark of whole steps compares like with like: it times nothing when losses or gradients differ."""

import json

import pytest
import torch

from benchmarks import end_to_end

TINY = ["--documents", "2", "--tokens", "9", "--vocabulary", "300", "--hidden", "64", "--rounds", "1"]


@pytest.mark.parametrize("objective, trainable", [("grad_diff", "experts"), ("npo_kl", "all")])
def test_both_arms_agree_and_are_timed(objective, trainable, tmp_path):
    output = tmp_path / "rows.json"
    options = ["--objective", objective, "--trainable", trainable, "--only", "time", "--output", str(output)]
    assert end_to_end.main([*TINY, *options]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["time_ratio"] == pytest.approx(
        row["milliseconds"]["ours"][0] / row["milliseconds"]["plain"][0], rel=0.3, abs=0.3
    )


def test_a_plain_arm_that_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "language_model_loss", lambda model, ids: torch.tensor(1.0, requires_grad=True))
    with pytest.raises(SystemExit, match="differ, nothing is timed"):
        end_to_end.main([*TINY, "--objective", "grad_diff", "--only", "time", "--output", str(tmp_path / "rows.json")])


@pytest.mark.slow
def test_memory_is_measured_in_a_fresh_process(tmp_path):
    options = end_to_end.parse([*TINY, "--objective", "npo", "--peak-of", "plain"])
    found = end_to_end.memory(options, "npo")
    assert found["plain"]["kept"] > 0
    assert found["ours"]["kept"] == 0
    assert found["ours"]["gradients"] == found["plain"]["gradients"] > 0
