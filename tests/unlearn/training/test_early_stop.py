import dataclasses
import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from tiny_runs import V, documents, history, parameters, trainer
from train_runs import options, record, weights, write_facts

from trace_unlearn.errors import UserError
from trace_unlearn.training import checkpoints
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.early_stop import EarlyStop
from trace_unlearn.training.trainable import LoraOptions, add_lora
from trace_unlearn.verbs.train import main


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


@pytest.mark.parametrize("limited", ["stop_forget_nll", "stop_retain_nll", "stop_retain_increase"])
def test_stops_at_the_threshold_and_a_resumed_run_too(limited, tmp_path):
    sets = {"forget": documents(10, 1), "retain": documents(14, 2, weighted=True), "retain_eval": documents(9, 7)}
    sets["retain_eval"] = None if limited == "stop_forget_nll" else sets["retain_eval"]
    on, name = ("forget", limited) if "forget" in limited else ("retain_eval", "stop_retain_nll")
    arguments = {"max_steps": 40, "learning_rate": 0.2, "save_strategy": "steps", "save_steps": 1, **sets}
    options = {"gamma": 1.0, "alpha": 0.0, "stop_every": 2, "stop_documents": 5}
    free = TraceConfig(**options, **{limited: 1e6})
    whole = trainer(tmp_path / "free", config=free, **{**arguments, "max_steps": 12})
    original = nll(whole.model, sets[on].select(range(5)))
    whole.train()
    seen = measures(whole, name)
    assert [step for step, _ in seen] == [0, 2, 4, 6, 8, 10, 12]
    assert seen[0][1] == pytest.approx(original, rel=1e-4)
    assert seen[-1][1] == pytest.approx(nll(whole.model.eval(), sets[on].select(range(5))), rel=1e-4)
    first, highest = max(seen, key=lambda measure: measure[1])
    limit = (highest + max(value for step, value in seen if step < first)) / 2
    assert first > 4
    config = TraceConfig(**options, **{limited: limit - original if limited == "stop_retain_increase" else limit})
    stopped = trainer(tmp_path / "stopped", tiny.model("qwen3_moe", V), config, **arguments)
    stopped.train()
    assert stopped.state.global_step == first
    assert len(history(stopped)) == first
    for last in (first, 3):  # killed after the checkpoint of the last step, or of the third
        for folder in (tmp_path / "stopped").glob("checkpoint-*"):
            if checkpoints._step(folder) > last:
                checkpoints.remove(folder)
        resumed = trainer(tmp_path / "stopped", tiny.model("qwen3_moe", V), config, **arguments)
        resumed.train(resume_from_checkpoint=True)
        assert measures(resumed, name) == measures(stopped, name)
        assert resumed.state.global_step == first


@pytest.mark.parametrize("adapters", [False, True])
def test_the_best_checkpoint_is_the_result(adapters, tmp_path):
    """The learning rate is far too large: what is kept is lost more and more after the first checkpoint that forgot."""

    def begin(name, **options):
        model = tiny.model("qwen3_moe", V)
        if adapters:
            pytest.importorskip("peft")
            torch.manual_seed(0)
            model = add_lora(model, LoraOptions(rank=2, parameters=("mlp.experts.down_proj",)))
        config = TraceConfig(alpha=0.0, stop_documents=5, **options)
        arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
        arguments |= {
            "optim": "adamw_torch",
            "learning_rate": 0.02 if adapters else 2e-3,
            "retain_eval": documents(9, 7),
        }
        return trainer(tmp_path / name, model, config, retain=documents(14, 2, weighted=True), **arguments)

    free = begin("free", best_forget_nll=1e6)  # which nothing reaches: the one that forgot most
    free.train()
    forget, retain = (dict(measures(free, f"stop_{name}_nll")) for name in ("forget", "retain"))
    assert [*forget] == [*retain] == [0, 2, 4, 6, 8]
    most = max((2, 4, 6, 8), key=forget.get)
    assert free.state.best_global_step == most
    limit = sorted(forget.values())[2]  # which all but two reach
    allowed = [step for step in (2, 4, 6, 8) if forget[step] >= limit]
    best = min(allowed, key=retain.get)
    assert best != 8
    assert len(allowed) > 1
    chosen = begin("chosen", best_forget_nll=limit)
    chosen.train()
    assert history(chosen).equal(history(free))
    assert chosen.state.best_global_step == best
    kept = {folder.name for folder in (tmp_path / "chosen").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-8"}
    assert nll(chosen.model.eval(), documents(9, 7).select(range(5))) == pytest.approx(retain[best], rel=1e-4)
    expected = parameters(chosen)
    checkpoints.remove(tmp_path / "chosen" / "checkpoint-8")  # as if it was killed after it had saved the best one
    resumed = begin("chosen", best_forget_nll=limit)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed).equal(history(chosen))
    assert all(torch.equal(p, expected[name]) for name, p in parameters(resumed).items())
    resumed.save_unlearned(tmp_path / "saved")
    facts = record(tmp_path / "saved")
    assert (facts["steps"], facts["best"]["trained_steps"], facts["best"]["reached"]) == (best, 8, True)
    assert (facts["best"]["forget_nll"], facts["best"]["retain_nll"]) == (forget[best], retain[best])
    assert f"The model after {best} of 8 steps: of the checkpoints" in (tmp_path / "saved" / "README.md").read_text()
    checkpoints.remove(tmp_path / "chosen" / f"checkpoint-{best}")
    with pytest.raises(UserError, match=f"checkpoint-{best}: the best checkpoint is missing"):
        begin("chosen", best_forget_nll=limit).train(resume_from_checkpoint=True)


def test_a_tenth_is_held_out(tmp_path):
    retain = documents(34, 2, weighted=True)
    trained = trainer(tmp_path, config=TraceConfig(stop_retain_increase=1e6, stop_every=1), retain=retain, max_steps=1)
    kept, out = trained.pairs._retain["input_ids"], trained._early_stop._sets["stop_retain_nll"]["input_ids"]
    assert sorted([*kept, *out]) == sorted(retain["input_ids"])
    assert out == [retain[i]["input_ids"] for i in (10, 21, 32)]
    trained.train()
    assert len(measures(trained, "stop_retain_nll")) == 2


def test_the_verb_with_data_of_its_own(files, tmp_path):
    held_out = str(tmp_path / "held_out.jsonl")
    write_facts(tmp_path / "held_out.jsonl", 9, 5)
    given = {"best_forget_nll": 50.0, "retain_eval": held_out, "save_steps": 2, "stop_documents": 6}
    main(options(files, tmp_path / "out", **given), lambda message: None)
    facts = record(tmp_path / "out")
    assert not facts["best"]["reached"]
    assert len(facts["retain_eval_fingerprint"]) == 64
    assert "no checkpoint came to a mean loss of 50.0 nats" in (tmp_path / "out" / "README.md").read_text()


KILLED = """
import json, os, signal, sys
from trace_unlearn.training import checkpoints
from trace_unlearn.verbs.train import TrainOptions, main
from trace_unlearn.training.trainer import TraceTrainer

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

def in_a_step(number):
    step = TraceTrainer.training_step
    def replaced(self, *args):
        return die() if self.state.global_step == number else step(self, *args)
    TraceTrainer.training_step = replaced

def before_a_checkpoint_counts(number):
    mark = checkpoints.mark_complete
    checkpoints.mark_complete = lambda folder: die() if folder.name == f"checkpoint-{number}" else mark(folder)

def after_training():
    TraceTrainer.save_unlearned = die

whole, killed = (TrainOptions(**options) for options in json.loads(sys.argv[1]))
for options, deadly in (
    (whole, None),
    (killed, (in_a_step, 7)),
    (killed, (before_a_checkpoint_counts, 12)),
    (killed, (in_a_step, 14)),
    (killed, (after_training,)),
    (killed, None),
):
    if (child := os.fork()) == 0:
        if deadly is not None:
            deadly[0](*deadly[1:])
        main(options)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if deadly is None else -signal.SIGKILL), (deadly, code)
"""


@pytest.mark.slow
def test_killed_anywhere_it_stops_there_and_chooses_the_same(files, tmp_path):
    changes = {"max_steps": 30, "save_steps": 3, "stop_every": 4, "best_forget_nll": 5.5, "alpha": 0.0}
    changes |= {"learning_rate": 1e-3, "stop_retain_increase": 1.6}
    runs = [options(files, tmp_path / name, **changes) for name in ("whole", "killed")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, json.dumps([dataclasses.asdict(run) for run in runs])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (record(tmp_path / name) for name in ("whole", "killed"))
    assert second["log"] == first["log"]
    assert second["best"] == first["best"]
    assert first["best"]["reached"]
    assert (first["best"]["step"], first["best"]["trained_steps"]) == (12, 16)
    expected, found = (weights(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_refusals(files, tmp_path, monkeypatch):
    for given, message in (
        ({"stop_every": 0}, "stop_every: got 0"),
        ({"stop_forget_nll": -1.0}, "stop_forget_nll: got -1.0, allowed are finite numbers above 0"),
        ({"stop_retain_nll": 3.0, "objective": "grad_ascent"}, "stop_retain_nll: got 3.0, but objective 'grad_ascent'"),
        ({"stop_forget_nll": 3.0, "objective": "rmu"}, "stop_forget_nll: got 3.0, but objective 'rmu'"),
        ({"best_forget_nll": 3.0, "objective": "grad_ascent"}, "best_forget_nll: got 3.0, but objective 'grad_ascent'"),
        (
            {"best_forget_nll": 3.0, "stop_forget_nll": 3.0},
            "best_forget_nll: got 3.0, allowed is less than stop_forget",
        ),
    ):
        with pytest.raises(UserError, match=message):
            TraceConfig(**given)
    best = TraceConfig(best_forget_nll=6.0)
    with pytest.raises(UserError, match="save_strategy: got 'no', allowed with best_forget_nll: steps, epoch"):
        trainer(tmp_path, config=best)
    with pytest.raises(UserError, match="retain_eval: got documents, but nothing is measured"):
        trainer(tmp_path, retain_eval=documents(4, 2))
    with pytest.raises(UserError, match="retain: got 1 document, allowed are two"):
        trainer(tmp_path, config=best, retain=documents(1, 2, weighted=True), save_strategy="steps")
    with pytest.raises(UserError, match=r"stop_retain_nll: got 0\.5, but the original model's loss of these"):
        trainer(tmp_path, config=TraceConfig(stop_retain_nll=0.5)).train()
    monkeypatch.setattr("trace_unlearn.verbs.train.load_model", None)
    for given, message in (
        ({"retain_eval": files["retain"]}, "retain_eval: got .*, but nothing is measured on it"),
        ({"retain_eval": files["retain"], "best_forget_nll": 9.0}, "retain_eval: 30 of its 30 rows are in retain too"),
        ({"save_steps": 0, "best_forget_nll": 9.0}, "save_steps: got 0, allowed are integers from 1"),
    ):
        with pytest.raises(UserError, match=message):
            main(options(files, tmp_path / "out", **given))
        assert not (tmp_path / "out.training").exists()


def test_the_rule():
    rule = EarlyStop(TraceConfig(best_forget_nll=3.0), documents(3, 1), documents(3, 2), 0)
    nan = float("nan")
    measured = {1: (nan, 1.0), 2: (1.0, 9.0), 3: (2.0, 9.5), 4: (1.5, 1.0), 5: (3.0, 5.0), 6: (9.0, 4.0), 7: (4.0, 4.5)}
    log = [{"step": 0, "stop_forget_nll": 0.5, "stop_retain_nll": 0.7}, {"step": 0, "loss": 1.0}]
    best, chosen = None, []
    for step, (forget, retain) in measured.items():
        log.append({"step": step, "stop_forget_nll": forget, "stop_retain_nll": retain})
        rule.resume(log)
        best = step if rule.is_best(step, best) else best
        chosen.append(best)
    assert chosen == [1, 2, 3, 3, 5, 6, 6]
    assert rule.choice(6) == {
        "step": 6,
        "reached": True,
        "forget_nll": 9.0,
        "retain_nll": 4.0,
        "original_forget_nll": 0.5,
        "original_retain_nll": 0.7,
    }
