"""The learning rate that a run finds by itself: at its boundaries, in training, and after a stop."""

import pytest
import torch
from tiny_runs import history, parameters, trainer

from trace_unlearn.errors import UserError
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.pace import LARGEST, factor, rate_of_width


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([], 1.0),
        ([(0, 0.0)], 1.0),
        ([(0, 0.0), (10, 0.0)], 2.0),
        # 1.5 over 10 intervals of 10 steps; after the first, what is left over 9.
        ([(0, 0.0), (10, 0.149)], 2.0),
        ([(0, 0.0), (10, 0.151)], 1.0),
        ([(0, 0.0), (10, 0.5)], 1.0),
        ([(0, 0.0), (10, 0.501)], 0.5),
        ([(0, 1.0), (10, 1.0), (20, 1.0), (30, 1.9)], 2.0),  # doubled twice, halved once
        ([(0, 0.0), (10, -1.0)], 2.0),
        ([(0, 0.0), (100, 0.1)], 2.0),  # at the end: not enough
    ],
)
def test_what_is_measured_sets_the_rate(measured, expected):
    start = measured[0][1] if measured else 0.0
    assert factor(measured, start + 1.5, 100) == expected


def test_the_rate_has_limits():
    slow = [(10 * i, 0.0) for i in range(40)]
    fast = [(10 * i, float(i)) for i in range(40)]
    assert factor(slow, 1.5, 1000) == LARGEST
    assert factor(fast, 100.0, 1000) >= 1 / LARGEST


def test_the_rate_to_begin_with_follows_the_width():
    assert rate_of_width(2048) == pytest.approx(1e-5, rel=0.05)
    assert rate_of_width(32) == pytest.approx(64 * rate_of_width(2048), rel=0.05)
    assert rate_of_width(512, adapters=True) == pytest.approx(10 * rate_of_width(512), rel=0.05)


def test_a_pace_needs_a_goal():
    with pytest.raises(UserError, match="pace: got true, but neither stop_forget_nll"):
        TraceConfig(pace=True)
    with pytest.raises(UserError, match=r"stop_forget_increase: got 0\.0"):
        TraceConfig(stop_forget_increase=0.0)


def paced(folder, pace=True, **arguments):
    config = TraceConfig(
        objective="npo", weighting="uniform", pace=pace, stop_forget_increase=0.5, stop_every=2, stop_documents=4
    )
    given = {"optim": "adamw_torch", "learning_rate": 1e-5, "max_steps": 40, "logging_steps": 2}
    return trainer(folder, config=config, **{**given, **arguments})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = paced(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


def test_a_paced_run_forgets_from_a_rate_that_moves_nothing(whole):
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert max(rates) >= 16 * 1e-5
    measured = [entry["stop_forget_nll"] for entry in whole.state.log_history if "stop_forget_nll" in entry]
    assert measured[-1] >= measured[0] + 0.5
    assert whole.state.global_step < 40


def test_at_the_same_rate_without_a_pace_it_does_not(tmp_path):
    fixed = paced(tmp_path, pace=False)
    fixed.train()
    measured = [entry["stop_forget_nll"] for entry in fixed.state.log_history if "stop_forget_nll" in entry]
    assert fixed.state.global_step == 40
    assert measured[-1] < measured[0] + 0.25


def test_a_resumed_run_keeps_its_pace(whole, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 7}
    through = paced(tmp_path / "through", **saving)
    through.train()

    class StopTrainingError(Exception):
        pass

    stopped = paced(tmp_path / "stopped", **saving)
    step = stopped.training_step

    def until_nine(*arguments, **options):
        if stopped.state.global_step == 9:
            raise StopTrainingError
        return step(*arguments, **options)

    stopped.training_step = until_nine
    with pytest.raises(StopTrainingError):
        stopped.train()
    resumed = paced(tmp_path / "stopped", **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == through.state.global_step == whole.state.global_step
    # Log entries too, though the run stopped in the midst of a window: none spans a checkpoint.
    names = ("loss", "forget_nll", "retain_nll", "learning_rate", "step")
    assert torch.equal(history(resumed, *names), history(through, *names))
    for name, found in parameters(resumed).items():
        assert torch.equal(found, parameters(through)[name]), name
