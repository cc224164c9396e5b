import pytest
import tiny
import torch
from tiny_runs import V, assert_same_run, trainer

from trace_unlearn.errors import UserError
from trace_unlearn.routing.profile import RoutingStatistics
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.experts import chosen_experts, top_experts, train_experts


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_other_rows_stay(optimizer, tmp_path):
    model = tiny.model("qwen3_moe", V)
    before = {name: p.clone() for name, p in model.named_parameters()}
    count = train_experts(model, [(1, 3), (1, 5), (1, 3)])
    assert count == 2 * 3 * 32 * 16 + 8 * 32
    trainer(tmp_path, model, optim=optimizer, max_steps=3, learning_rate=1e-2).train()
    for name, parameter in model.named_parameters():
        if "layers.1.mlp.experts" in name:
            changed = (parameter != before[name]).flatten(1).any(1)
            assert changed.nonzero().flatten().tolist() == [3, 5]
        else:
            assert torch.equal(parameter, before[name]) == ("layers.1.mlp.gate" not in name), name


def test_accumulation_and_checkpointing_are_the_same_run(tmp_path):
    runs = []
    config = TraceConfig(objective="simnpo", anchor=0.5, anchor_experts=((0, 2),))
    for number, arguments in enumerate(
        (
            {"per_device_train_batch_size": 4},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        )
    ):
        model = tiny.model("qwen3_moe", V)
        train_experts(model, [(0, 2)])
        runs.append(trainer(tmp_path / str(number), model, config, max_steps=2, **arguments))
        runs[-1].train()
    for run in runs[1:]:
        assert_same_run(runs[0], run)


def test_every_family_has_experts_and_routers(family):
    model = tiny.model(family, V)
    with pytest.raises(UserError, match="experts: layer 9 is no MoE layer"):
        train_experts(model, [(9, 0)])
    with pytest.raises(UserError, match="experts: layer 1 has no expert 8"):
        train_experts(model, [(1, 8)])
    with pytest.raises(UserError, match="experts: got none"):
        train_experts(model, [])
    with_router, alone = train_experts(model, [(1, 2)]), train_experts(model, [(1, 2)], routers=False)
    assert with_router > alone > 0
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("layers.1.mlp.experts" in name for name in names)


def test_a_weight_decay_that_would_touch_others_is_refused(tmp_path):
    model = tiny.model("qwen3_moe", V)
    train_experts(model, [(0, 1)])
    with pytest.raises(UserError, match=r"weight_decay: got 0\.1"):
        trainer(tmp_path, model, weight_decay=0.1)


def test_choices():
    counts = torch.tensor([[3, 1, 4], [9, 0, 2]])
    routes, offsets = torch.zeros(8, 2, 1, dtype=torch.uint8), torch.tensor([0, 8])
    stats = RoutingStatistics(counts, counts, 12, 8, 1, routes, offsets, {"layer_indices": [1, 4]})
    assert top_experts(stats, 2) == [(4, 0), (1, 2)]
    assert chosen_experts(["3.17", "3.17", "0.0"], None, None) == ((3, 17), (0, 0))
    assert chosen_experts([], None, None) == ()
    with pytest.raises(UserError, match="'selected' needs a calibration"):
        chosen_experts(["selected"], None, None)
