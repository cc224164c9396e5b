import pytest
import tiny
import torch
from tiny_runs import V, documents, history, trainer

from trace_unlearn.config import TraceConfig
from trace_unlearn.errors import UserError


def measures(trained, name):
    return [(entry["step"], entry[name]) for entry in trained.state.log_history if name in entry]


def nll(model, rows):
    """Token by token, from the definition."""
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        losses += [-logits[t].log_softmax(-1)[y].item() for t, y in enumerate(row["labels"][1:]) if y != -100]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("which", ["forget", "retain"])
def test_stops_at_the_threshold_and_a_resumed_run_too(which, tmp_path):
    sets = {"forget": documents(10, 1), "retain": documents(14, 2, weighted=True)}
    arguments = {"max_steps": 40, "learning_rate": 0.2, "save_strategy": "steps", "save_steps": 3, **sets}
    gamma, alpha = 1.0, 0.0
    free = TraceConfig(gamma=gamma, alpha=alpha, **{f"stop_{which}_nll": 1e6}, stop_every=2, stop_documents=5)
    whole = trainer(tmp_path / "free", config=free, **{**arguments, "max_steps": 12})
    whole.train()
    seen = measures(whole, f"stop_{which}_nll")
    assert [step for step, _ in seen] == [2, 4, 6, 8, 10, 12]
    assert seen[-1][1] == pytest.approx(nll(whole.model.eval(), sets[which].select(range(5))), rel=1e-4)
    first, highest = max(seen, key=lambda measure: measure[1])
    limit = (highest + max(value for step, value in seen if step < first)) / 2
    assert first > 4
    config = TraceConfig(gamma=gamma, alpha=alpha, **{f"stop_{which}_nll": limit}, stop_every=2, stop_documents=5)
    stopped = trainer(tmp_path / "stopped", tiny.model("qwen3_moe", V), config, **arguments)
    stopped.train()
    assert stopped.state.global_step == first
    assert len(history(stopped)) == first
    for folder in (tmp_path / "stopped").glob("checkpoint-*"):  # as if it was killed after its first checkpoint
        if folder.name != "checkpoint-3":
            (folder / "complete.json").unlink()
    resumed = trainer(tmp_path / "stopped", tiny.model("qwen3_moe", V), config, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert measures(resumed, f"stop_{which}_nll") == measures(stopped, f"stop_{which}_nll")
    assert resumed.state.global_step == first


def test_refusals():
    for options, message in (
        ({"stop_every": 0}, "stop_every: got 0"),
        ({"stop_forget_nll": -1.0}, "stop_forget_nll: got -1.0, allowed are finite numbers above 0"),
        ({"stop_retain_nll": 3.0, "objective": "grad_ascent"}, "stop_retain_nll: got 3.0, but objective 'grad_ascent'"),
        ({"stop_forget_nll": 3.0, "objective": "rmu"}, "stop_forget_nll: got 3.0, but objective 'rmu'"),
    ):
        with pytest.raises(UserError, match=message):
            TraceConfig(**options)
