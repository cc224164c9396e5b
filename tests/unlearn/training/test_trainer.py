import dataclasses

import pytest
import tiny
import torch
from tiny_runs import V, assert_same_run, documents, history, parameters, trainer
from transformers import AutoModelForCausalLM

from trace_unlearn.errors import UserError
from trace_unlearn.sources.data import loss_bearing
from trace_unlearn.training import checkpoints
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.trainable import LoraOptions, add_lora, train_only


def test_the_first_loss_is_its_formula(tmp_path):
    model = tiny.model("qwen3_moe", V)
    forget, retain = documents(10, 1), documents(14, 2, weighted=True)
    config = TraceConfig(gamma=0.7, alpha=1.3, retain_per_forget=2)
    trained = trainer(tmp_path, model, config, forget, retain, max_steps=1)
    nll = {"forget": [], "retain": []}
    weights = []
    for position in range(4):
        rows = [("forget", forget[trained.pairs.forget_index(position)])]
        rows += [("retain", retain[i]) for i in trained.pairs.retain_indices(position)]
        for kind, row in rows:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            for t, label in enumerate(row["labels"][1:]):
                if label != -100:
                    nll[kind].append(-logits[t].log_softmax(-1)[label].item())
                    if kind == "retain":
                        weights.append(row["token_weight"][t])
    trained.train()
    names = ("loss", "forget_loss", "retain_loss", "retain_nll")
    found = dict(zip(names, history(trained, *names)[0].tolist(), strict=True))
    forget_loss = -sum(nll["forget"]) / len(nll["forget"])
    retain_loss = sum(w * n for w, n in zip(weights, nll["retain"], strict=True)) / len(weights)
    assert abs(sum(weights) / len(weights) - 1) > 0.1  # so a division by their sum would show
    assert found["forget_loss"] == pytest.approx(forget_loss, rel=1e-4)
    assert found["retain_loss"] == pytest.approx(retain_loss, rel=1e-4)
    assert found["retain_nll"] == pytest.approx(sum(nll["retain"]) / len(weights), rel=1e-4)
    assert found["loss"] == pytest.approx(0.7 * forget_loss + 1.3 * retain_loss, rel=1e-4)
    logged = trained.state.log_history[0]
    assert logged["weight_max"] == pytest.approx(max(weights))
    assert logged["weight_mean"] == pytest.approx(sum(weights) / len(weights))
    ess = sum(weights) ** 2 / len(weights) / sum(w * w for w in weights)
    assert logged["weight_ess"] == pytest.approx(ess)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("case", ["grad_diff", "grad_ascent", "finetune", "kl"])
def test_gradients_are_those_of_the_formula_on_logits(case, frozen, tmp_path):
    """A trainable head's gradient is formed in the pass that computes the losses; some tokens weigh 0."""
    config = TraceConfig("grad_diff" if case == "kl" else case, gamma=0.7, alpha=1.3, retain_per_forget=2)
    config = dataclasses.replace(config, retain_loss="kl" if case == "kl" else "nll")
    retain = documents(14, 2, weighted=True)
    retain = retain.map(lambda row: {"token_weight": [max(0.0, w - 0.5) for w in row["token_weight"]]})
    trained = trainer(tmp_path, tiny.model("qwen3_moe", V), config, retain=retain)
    trained.model.lm_head.requires_grad_(not frozen)
    trained.state.max_steps = 1
    trained.begin_training()
    for parameter in trained.model.parameters():  # away from the original model, for the divergence
        parameter.data.mul_(1.1)
    batches = iter(trained.get_train_dataloader())
    (batch,), totals = trained.get_batch_samples(batches, 1, trained.args.device)
    model, head = trained.model, trained.model.lm_head
    loss = trained.compute_loss(model, batch, num_items_in_batch=totals)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    hidden = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    log_softmax = (hidden.double() @ head.weight.double().T).log_softmax(-1)[:, :-1]
    target, bearing = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    nll = -log_softmax.gather(-1, target.where(bearing, 0)[..., None])[..., 0].where(bearing, 0.0)
    forget, kept = batch["forget_index"] >= 0, batch["retain_index"] >= 0
    weight = batch.get("token_weight", torch.ones_like(batch["labels"], dtype=torch.float32))[:, :-1] * bearing
    expected = torch.zeros((), dtype=torch.float64)
    if case != "finetune":
        expected = expected - 0.7 * nll[forget].sum() / bearing[forget].sum()
    if case == "kl":
        before = trained._forward._reference_weight.double() if not frozen else head.weight.double() / 1.1
        original = torch.zeros_like(hidden, dtype=torch.float64)
        mask = trained._original.rows(model, batch, loss_bearing(batch["labels"], batch["attention_mask"]))
        original[mask.mask] = mask.hidden.double()
        wanted = (original @ before.T).log_softmax(-1)[:, :-1].detach()
        losses = (wanted.exp() * (wanted - log_softmax)).sum(-1)
        expected = expected + 1.3 * (losses * weight)[kept].sum() / bearing[kept].sum()
    elif case != "grad_ascent":
        expected = expected + 1.3 * (nll * weight)[kept].sum() / bearing[kept].sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: n + m)
    assert ("lm_head.weight" in found) != frozen
    if case != "grad_ascent":
        mean = nll[kept].sum() / bearing[kept].sum()
        assert trained._log_window.close(trained.accelerator)["retain_nll"] == pytest.approx(mean.item(), rel=1e-5)


@pytest.mark.parametrize("retained", [1, 2, 4, 8, 32])
def test_a_document_weighs_what_it_was_given_however_many_a_step_holds(retained, tmp_path):
    """Divided by the sum of the step's weights, one per step would weigh 1 whatever it was given."""
    retain = documents(32, 2).map(
        lambda row, i: {"token_weight": [2.5 if i % 4 == 0 else 0.5] * len(row["labels"])}, with_indices=True
    )
    config = TraceConfig(retain_per_forget=min(retained, 4))
    batch = max(1, retained // 4)
    trained = trainer(tmp_path, config=config, retain=retain, per_device_train_batch_size=batch, max_steps=100)
    trained.state.max_steps = 100
    batches = iter(trained.get_train_dataloader())
    found, even = (torch.zeros(2) for _ in range(2))
    for _ in range(10 // batch):
        (rows,), totals = trained.get_batch_samples(batches, 1, trained.args.device)
        bearing = loss_bearing(rows["labels"], rows["attention_mask"])
        is_forget, is_retain = rows["forget_index"] >= 0, rows["retain_index"] >= 0
        assert totals.retain_tokens == bearing[is_retain].sum()
        coefficient = trained._coefficient(rows, bearing, is_forget, is_retain, totals)  # of each token's NLL
        heavy = rows["retain_index"] % 4 == 0
        for group, chosen in enumerate((is_retain & heavy, is_retain & ~heavy)):
            found[group] += coefficient[chosen].sum()
            even[group] += bearing[chosen].sum() / totals.retain_tokens
    weight = (found / even)[even > 0]
    assert weight.tolist() == pytest.approx(torch.tensor([2.5, 0.5])[even > 0].tolist(), rel=1e-5)


@pytest.mark.parametrize("objective", ["grad_diff", "npo"])
def test_training_forgets_and_retains(objective, tmp_path):
    trained = trainer(
        tmp_path, config=TraceConfig(objective=objective), max_steps=40, optim="adamw_torch", learning_rate=2e-3
    )
    trained.train()
    nll = history(trained, "forget_nll", "retain_nll")
    assert nll[-5:, 0].mean() > nll[0, 0] + 0.5
    assert nll[-5:, 1].mean() < nll[0, 1]


def test_npo_starts_at_its_value_for_the_original_model(tmp_path):
    trained = trainer(tmp_path, config=TraceConfig(objective="npo", beta=0.2), max_steps=3)
    trained.train()
    losses = history(trained, "forget_loss")[:, 0]
    assert losses[0].item() == pytest.approx(2 / 0.2 * 0.6931472, rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("objective", ["grad_diff", "npo"])
@pytest.mark.parametrize("size, accumulation", [(4, 2), (1, 8)])
def test_any_split_into_micro_batches_is_the_same_run(objective, size, accumulation, tmp_path):
    config = TraceConfig(objective=objective, retain_per_forget=2)
    options = {"config": config, "max_steps": 3}  # over the end of an epoch
    whole = trainer(tmp_path / "whole", per_device_train_batch_size=8, joint_forward=True, **options)
    split = trainer(
        tmp_path / "split", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **options
    )
    whole.train()
    split.train()
    assert len(history(split)) == 3
    assert_same_run(whole, split)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("config", [TraceConfig("grad_diff"), TraceConfig("npo", retain_loss="kl")], ids=["nll", "kl"])
def test_the_losses_memory_is_returned_between_head_and_layers(config, joint, tmp_path, monkeypatch):
    trained = trainer(tmp_path, config=config, max_steps=1, joint_forward=joint)
    norm, head = trained.model.model.norm.weight, trained.model.lm_head.weight
    events = []
    monkeypatch.setattr("trace_unlearn.training.forward.tk.release_workspace", lambda: events.append("returned"))
    head.register_post_accumulate_grad_hook(lambda parameter: events.append("head"))
    norm.register_post_accumulate_grad_hook(lambda parameter: events.append("norm"))
    trained.train()
    assert events == (["head", "norm"] if joint else ["head", "returned", "norm"] * 2)


@pytest.mark.parametrize("objective", ["grad_diff", "npo"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_the_same_run(objective, reentrant, tmp_path):
    config = TraceConfig(objective=objective)
    plain = trainer(tmp_path / "plain", config=config)
    checkpointed = trainer(
        tmp_path / "checkpointed",
        config=config,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    plain.train()
    checkpointed.train()
    assert checkpointed.model.is_gradient_checkpointing
    assert_same_run(plain, checkpointed)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_lora_trains(reentrant, tmp_path):
    pytest.importorskip("peft")
    arguments = {}
    if reentrant is not None:
        arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    options = LoraOptions(rank=2, parameters=("mlp.experts.down_proj",))
    torch.manual_seed(0)
    adapted = add_lora(tiny.model("qwen3_moe", V), options)
    trained = trainer(tmp_path, adapted, TraceConfig(objective="npo"), max_steps=3, learning_rate=0.5, **arguments)
    before, frozen = parameters(trained), trained.model.get_base_model().lm_head.weight.clone()
    assert all("lora_" in name for name in before)
    trained.train()
    moved = {name for name, p in parameters(trained).items() if not torch.equal(p, before[name])}
    assert moved == set(before)
    assert torch.equal(trained.model.get_base_model().lm_head.weight, frozen)
    losses = history(trained, "forget_loss")[:, 0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("reentrant", [True, False])
def test_some_layers_only_with_gradient_checkpointing(reentrant, tmp_path):
    runs = []
    for arguments in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model = tiny.model("qwen3_moe", V)
        train_only(model, [r"layers\.1\.mlp\.experts"])
        runs.append(trainer(tmp_path / str(len(runs)), model, **arguments))
        start = parameters(runs[-1])
        runs[-1].train()
        assert all(not torch.equal(p, start[name]) for name, p in parameters(runs[-1]).items())
    assert_same_run(*runs)


def test_patterns():
    model = tiny.model("qwen3_moe", V)
    count = train_only(model, ["experts", r"\.1\.mlp\.gate"])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("experts" in name or "layers.1.mlp.gate" in name for name in trained)
    assert any("layers.1.mlp.gate" in name for name in trained)
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with pytest.raises(UserError, match=r"trainable: 'mlp\.down_proj\.weight' is found in no .*experts\.down_proj"):
        train_only(model, ["experts", "mlp.down_proj.weight"])
    with pytest.raises(UserError, match="not a regular expression"):
        train_only(model, ["("])
    with pytest.raises(UserError, match="lora_modules: no name in this model ends with 'c_attn'"):
        add_lora(model, LoraOptions(modules=("c_attn",)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_auxiliary_loss_stays_out(family, tmp_path):
    losses = []
    for index, changes in enumerate(({}, {"output_router_logits": True, "router_aux_loss_coef": 100.0})):
        trained = trainer(tmp_path / str(index), tiny.model(family, V, **changes), max_steps=1)
        trained.train()
        losses.append(history(trained))
    assert torch.equal(*losses)


def test_weights(tmp_path):
    retain = documents(14, 2, weighted=True)
    ones = retain.map(lambda row: {"token_weight": [float(w > 0) for w in row["token_weight"]]})
    uniform = TraceConfig(weighting="uniform", retain_per_forget=2)
    runs = [trainer(tmp_path / "0", retain=ones), trainer(tmp_path / "1", config=uniform)]
    for run in runs:
        run.train()
    assert_same_run(*runs)
    assert history(runs[0], "weight_ess", "weight_max").eq(1).all()
    weighted = trainer(tmp_path / "2")
    weighted.train()
    assert (history(weighted, "retain_loss") != history(runs[0], "retain_loss")).all()
    assert history(weighted, "weight_ess").lt(0.9).all()


def test_resuming_is_the_uninterrupted_run(tmp_path):
    arguments = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "optim": "adamw_torch",
    }
    config = TraceConfig(objective="npo", retain_per_forget=2)
    whole = trainer(tmp_path / "whole", config=config, **arguments)
    whole.train()
    stopped = trainer(tmp_path / "stopped", config=config, **arguments)

    class StopTrainingError(Exception):
        pass

    def stop(*args, **kwargs):
        raise StopTrainingError

    step = stopped.training_step
    stopped.training_step = lambda *a, **k: stop() if stopped.state.global_step == 5 else step(*a, **k)
    with pytest.raises(StopTrainingError):
        stopped.train()
    assert [folder.name for folder in (tmp_path / "stopped").glob("checkpoint-*")] == ["checkpoint-4"]
    resumed = trainer(tmp_path / "stopped", config=config, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(history(resumed), history(whole))
    for name, found in parameters(resumed).items():
        assert torch.equal(found, parameters(whole)[name]), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*tiny.FAMILIES, "llama"])
def test_every_family_resumes_and_is_saved_whole(family, tied, tmp_path):
    def begin(name):
        config = TraceConfig(objective="npo", weighting="uniform")
        model = tiny.model(family, V, tie_word_embeddings=tied)
        return trainer(tmp_path / name, model, config, max_steps=3, save_strategy="steps", save_steps=2)

    whole = begin("whole")
    whole.train()
    checkpoints.remove(tmp_path / "whole" / "checkpoint-3")
    resumed = begin("whole")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.log_history[-2]["epoch"] == whole.state.log_history[-2]["epoch"]
    expected = parameters(whole)
    for name, found in parameters(resumed).items():
        assert torch.equal(found, expected[name]), name
    whole.save_unlearned(tmp_path / "saved")
    assert "## Method" in (tmp_path / "saved" / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    for name, found in loaded.named_parameters():
        assert torch.equal(found, expected[name]), name
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():  # not to the bit: a matrix product may depend on where in memory its operands lie
        torch.testing.assert_close(loaded(input_ids=ids).logits, whole.model.eval()(input_ids=ids).logits)
    assert type(loaded) is type(tiny.model(family, V))


def test_half_written_checkpoints_do_not_count(tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    trained = trainer(tmp_path, **arguments)
    trained.train()
    assert checkpoints.last_complete(tmp_path).name == "checkpoint-4"
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / checkpoints.MARKER).unlink()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{")
    resumed = trainer(tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert not (tmp_path / "checkpoint-2").exists()
    assert len(history(resumed)) == 4
    assert torch.equal(history(resumed)[3], history(trained)[3])
    assert checkpoints.last_complete(tmp_path).name == "checkpoint-4"


def test_resuming_without_a_checkpoint_starts(tmp_path):
    trained = trainer(tmp_path, max_steps=1)
    trained.train(resume_from_checkpoint=True)
    assert len(history(trained)) == 1


def test_a_diverged_run_stops(tmp_path):
    trained = trainer(tmp_path, learning_rate=1e12, max_steps=6, max_grad_norm=0.0, logging_nan_inf_filter=False)
    with pytest.raises(UserError, match="lower the learning rate"):
        trained.train()


def test_refusals(tmp_path):
    for options, message in (
        ({"objective": "ppo"}, "objective: got 'ppo', allowed: grad_diff, npo"),
        ({"weighting": "off"}, "weighting: got 'off', allowed: reference, live, uniform"),
        ({"gamma": -1.0}, "gamma: got -1.0"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"beta": 0.0}, "beta: got 0.0"),
        ({"retain_per_forget": 0}, "retain_per_forget: got 0"),
    ):
        with pytest.raises(UserError, match=message):
            TraceConfig(**options)
    for name, value in (("auto_find_batch_size", True), ("label_smoothing_factor", 0.1), ("use_liger_kernel", True)):
        with pytest.raises(UserError, match=f"{name}: got {value}"):
            trainer(tmp_path, **{name: value})
    with pytest.raises(UserError, match="calibration: weighting 'reference' needs one"):
        trainer(tmp_path, retain=documents(4, 2))
    with pytest.raises(UserError, match="calibration: weighting 'live' needs one"):
        trainer(tmp_path, config=TraceConfig(weighting="live"))


def test_evaluation_on_plain_documents(tmp_path):
    trained = trainer(tmp_path)
    metrics = trained.evaluate(documents(5, 3))
    assert 0 < metrics["eval_loss"] < 50
