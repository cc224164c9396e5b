import datasets
import pytest
import tiny
import torch
from tiny_runs import V, assert_same_run, documents, history, parameters, trainer
from transformers import TrainingArguments

from trace_unlearn.errors import UserError
from trace_unlearn.training import checkpoints
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.objectives import OBJECTIVES
from trace_unlearn.training.trainable import LoraOptions, add_lora
from trace_unlearn.training.trainer import TraceTrainer

CONFIGS = {
    **{name: {"objective": name, "retain_per_forget": 2} for name in OBJECTIVES if name not in ("grad_diff", "npo")},
    "npo+kl": {"objective": "npo", "retain_loss": "kl", "retain_per_forget": 2},
    "undial+kl": {"objective": "undial", "retain_loss": "kl"},
    "grad_diff+anchor": {"anchor": 1.0, "anchor_experts": ((0, 3), (1, 1), (1, 2))},
}


BOUNDED_AND_MONOTONE = ("simnpo", "npo", "dpo", "ce_u", "undial", "rmu", "grad_ascent", "grad_diff")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """What a model is after learning both sets: the tensors of its state."""
    both = datasets.concatenate_datasets([documents(10, 1), documents(14, 2)])
    config = TraceConfig(objective="finetune")
    arguments = {"per_device_train_batch_size": 12, "optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 60}
    trained = trainer(tmp_path_factory.mktemp("learned"), config=config, retain=both, **arguments)
    trained.train()
    nll = history(trained, "retain_nll")[:, 0]
    assert nll[0] > 3.5
    assert nll[-1] < 0.5
    assert "forget_loss" not in trained.state.log_history[0]
    return {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}


@pytest.fixture
def begin(learned):
    def build(folder, case, adapters=None, **arguments):
        config = TraceConfig(**CONFIGS[case])
        model = tiny.model("qwen3_moe", V)
        model.load_state_dict(learned)
        if adapters is not None:
            torch.manual_seed(0)
            model = add_lora(model, adapters)
        alternate = documents(10, 4) if config.method.needs_alternate else None
        return trainer(folder, model, config, alternate=alternate, **arguments)

    return build


@pytest.mark.parametrize("case", CONFIGS)
def test_training_does_what_it_should(case, begin, tmp_path):
    trained = begin(tmp_path, case, max_steps=20, optim="adamw_torch", learning_rate=2e-3)
    method = trained.trace_config.method
    trained.train()
    log = [entry for entry in trained.state.log_history if "loss" in entry]
    assert ("retain_loss" in log[0]) == method.uses_retain == ("weight_ess" in log[0])
    assert ("forget_loss" in log[0]) == (method.forget_loss is not None)
    names = [name for name in log[0] if name.endswith(("_loss", "_nll"))]
    changes = {name: sum(entry[name] for entry in log[-5:]) / 5 - log[0][name] for name in names}
    if method.forget_loss is None:
        assert changes["retain_nll"] < 0
        return
    if trained.trace_config.objective in BOUNDED_AND_MONOTONE:
        assert changes["forget_loss"] < 0
    if not method.on_hidden_states:
        assert changes["forget_nll"] > 0.3
    if trained.trace_config.retain_loss == "kl" or method.on_hidden_states:
        assert abs(log[0]["retain_loss"]) < 1e-5  # the model is the original one
        assert changes["retain_loss"] > 0
    if "anchor_loss" in changes:
        assert changes["anchor_loss"] < -0.05


@pytest.mark.parametrize("case", CONFIGS)
def test_any_split_into_micro_batches_is_the_same_run(case, begin, tmp_path):
    whole = begin(tmp_path / "whole", case, per_device_train_batch_size=6, max_steps=3, joint_forward=True)
    split = begin(tmp_path / "split", case, per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=3)
    whole.train()
    split.train()
    assert_same_run(whole, split)


@pytest.mark.parametrize("case", ["dpo", "npo+kl", "rmu", "undial", "finetune", "simnpo"])
def test_resuming_is_the_uninterrupted_run(case, begin, tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = begin(tmp_path, case, **arguments)
    whole.train()
    checkpoints.remove(tmp_path / "checkpoint-4")
    resumed = begin(tmp_path, case, **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(history(resumed), history(whole))
    for name, found in parameters(resumed).items():
        assert torch.equal(found, parameters(whole)[name]), name


@pytest.mark.parametrize("case", ["npo+kl", "undial", "rmu"])
def test_adapters_off_is_the_original_model(case, begin, tmp_path):
    pytest.importorskip("peft")
    adapters = LoraOptions(rank=2, parameters=("mlp.experts.down_proj",))
    trained = begin(tmp_path, case, adapters, max_steps=6, learning_rate=0.5)
    frozen = {name: p.clone() for name, p in trained.model.named_parameters() if "lora_" not in name}
    trained.train()
    assert not list(tmp_path.glob("*hidden*"))  # nothing is stored
    assert all(torch.equal(p, frozen[name]) for name, p in trained.model.named_parameters() if name in frozen)
    losses = history(trained, "retain_loss", "forget_loss")
    if case != "undial":
        assert abs(losses[0, 0]) < 1e-5
        assert losses[-1, 0] > 1e-5
    assert losses[-1, 1] < losses[0, 1]


def test_rmu_computes_no_layer_above_its_own(begin, tmp_path):
    trained = begin(tmp_path, "rmu", max_steps=1)
    layers, head = trained.model.model.layers, trained.model.lm_head
    calls = []
    layers[1].register_forward_hook(lambda *args: calls.append(1))
    before = {name: p.clone() for name, p in trained.model.named_parameters()}
    trained.train()
    assert not calls
    assert trained.model.model.layers is layers
    changed = {name for name, p in trained.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("layers.0." in name or "embed_tokens" in name for name in changed)
    assert not head.weight.requires_grad
    with pytest.raises(UserError, match="layer: got 2, but Qwen3MoeForCausalLM has 2 layers"):
        trainer(tmp_path, config=TraceConfig(objective="rmu", layer=2))


@pytest.mark.parametrize("case", ["rmu", "npo+kl", "grad_diff+anchor"])
def test_gradient_checkpointing_is_the_same_run(case, begin, tmp_path):
    plain = begin(tmp_path / "plain", case)
    kinds = (True, False) if case != "grad_diff+anchor" else (False,)
    plain.train()
    for reentrant in kinds:
        arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        checkpointed = begin(tmp_path / str(reentrant), case, **arguments)
        checkpointed.train()
        assert_same_run(plain, checkpointed)


def test_the_anchor_refuses_what_hides_the_routers(begin, tmp_path):
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(UserError, match="anchor: reentrant gradient checkpointing"):
        begin(tmp_path, "grad_diff+anchor", **arguments).train()


def test_kl_at_the_second_step_is_the_kl_to_the_original_model(begin, tmp_path):
    trained = begin(tmp_path, "npo+kl", max_steps=2, learning_rate=0.3)
    original = tiny.model("qwen3_moe", V)
    original.load_state_dict(trained.model.state_dict())
    moved = {}
    step = trained.training_step

    def spy(model, *args, **kwargs):
        if trained.state.global_step == 1:
            moved.update({name: tensor.clone() for name, tensor in trained.model.state_dict().items()})
        return step(model, *args, **kwargs)

    trained.training_step = spy
    trained.train()
    now = tiny.model("qwen3_moe", V)
    now.load_state_dict(moved)
    total, tokens, retain = 0.0, 0, documents(14, 2, weighted=True)
    for position in range(4, 8):
        for i in trained.pairs.retain_indices(position):
            ids = torch.tensor([retain[i]["input_ids"]])
            with torch.no_grad():
                p, q = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (now, original))
            kl = (q.exp() * (q - p)).sum(-1)
            weight = torch.tensor(retain[i]["token_weight"], dtype=torch.float64)
            total += (weight * kl).sum().item()
            tokens += sum(label != -100 for label in retain[i]["labels"][1:])
    assert history(trained, "retain_loss")[1, 0].item() == pytest.approx(total / tokens, rel=1e-4)
    assert total / tokens > 1e-3


def test_a_missing_set_is_named(tmp_path):
    for objective, given, message in (
        ("dpo", {}, "alternate: got none, but objective 'dpo' needs it"),
        ("npo", {"forget": None}, "forget: got none"),
        ("finetune", {"retain": None}, "retain: got none"),
    ):
        sets = {"forget": documents(3, 1), "retain": documents(3, 2, weighted=True), **given}
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
        with pytest.raises(UserError, match=message):
            TraceTrainer(tiny.model("qwen3_moe", V), args, config=TraceConfig(objective=objective), **sets)


def test_lost_hidden_states_are_told(begin, tmp_path):
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    begin(tmp_path, "npo+kl", **arguments).train()
    checkpoints.remove(tmp_path / "checkpoint-4")
    (tmp_path / "retain_hidden.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=r"retain_hidden\.bin: has 5 bytes, expected"):
        begin(tmp_path, "npo+kl", **arguments).train(resume_from_checkpoint=True)
    (tmp_path / "retain_hidden.json").unlink()
    with pytest.raises(UserError, match="what the original model says is missing"):
        begin(tmp_path, "npo+kl", **arguments).train(resume_from_checkpoint=True)


def test_refusals():
    for knobs, message in (
        ({"objective": "rmu", "retain_loss": "kl"}, "retain_loss: got 'kl', but objective 'rmu' has no"),
        ({"objective": "grad_ascent", "retain_loss": "kl"}, "retain_loss: got 'kl'"),
        ({"retain_loss": "mse"}, "retain_loss: got 'mse', allowed: nll, kl"),
        ({"anchor": 1.0, "anchor_experts": ((0, 0),), "objective": "rmu"}, "anchor: got 1.0, but objective 'rmu'"),
        ({"steering": 0.0}, "steering: got 0.0"),
        ({"beta2": -1.0}, "beta2: got -1.0"),
        ({"delta": float("inf")}, "delta: got inf"),
        ({"layer": -1}, "layer: got -1"),
    ):
        with pytest.raises(UserError, match=message):
            TraceConfig(**knobs)
