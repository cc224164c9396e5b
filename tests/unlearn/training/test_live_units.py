"""Weights of every unit from a forward of a model: those that were stored, in padded batches, and in one forward."""

from __future__ import annotations

import pytest
import tiny
import torch
from profiled import VOCAB, documents, run
from tiny_runs import trainer

from trace_unlearn.calibration.calibrate import _features, calibrate
from trace_unlearn.errors import UserError
from trace_unlearn.routing.profile import attention_window
from trace_unlearn.sources.data import collate, loss_bearing
from trace_unlearn.training.config import TraceConfig
from trace_unlearn.training.live_weights import LiveWeights

WINDOW = 4


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def profiled(request, tmp_path_factory):
    """A model that attends to everything, and one whose layers all slide."""
    model = tiny.model(request.param, VOCAB)
    if request.param == "mixtral":
        model.config.sliding_window = WINDOW
    folder = tmp_path_factory.mktemp("profiled") / "profile"
    forget, retain = documents(8, 1), documents(20, 2, longest=20)
    stats = run(model, forget, retain, unit="context", output=folder)
    return model, forget, retain, stats


def test_the_profile_holds_what_contexts_activate(profiled):
    model, forget, retain, stats = profiled
    contexts, N = stats.contexts, stats.retain_tokens
    assert contexts.window == (WINDOW if model.config.model_type == "mixtral" else None)
    assert int(contexts.counted.sum()) == N < len(contexts.counted)
    L, E = stats.retain_counts.shape
    pairs = torch.tensor([(layer, e) for layer in range(L) for e in range(E)])
    _, features = _features(stats, pairs, "context")
    sums = features.frequencies(torch.ones(N, dtype=torch.float64)) * N
    torch.testing.assert_close(sums.view(L, E), contexts.retain_sums)
    torch.testing.assert_close(contexts.forget_sums.sum(1), torch.full((L,), 2.0 * stats.forget_tokens).double())
    plain, other = (run(model, forget, retain, **o) for o in ({}, {"unit": "context", "batch_size": 3}))
    assert plain.contexts is None
    assert torch.equal(plain.retain_routes, torch.as_tensor(stats.retain_routes))
    assert torch.equal(plain.retain_counts, stats.retain_counts)
    torch.testing.assert_close(other.contexts.retain_sums, contexts.retain_sums)
    torch.testing.assert_close(other.contexts.retain_design_effect, contexts.retain_design_effect)
    assert torch.equal(other.contexts.prompt_routes, torch.as_tensor(contexts.prompt_routes))


@pytest.mark.parametrize("unit", ["token", "context", "document"])
@pytest.mark.parametrize("rule", ["balance", "additive", "product", "ratio"])
def test_live_weights_are_the_stored_ones_on_the_same_routing(profiled, rule, unit):
    model, _, retain, stats = profiled
    found = calibrate(stats, rule=rule, unit=unit)
    live = LiveWeights(model, found)
    rows = [retain[d] for d in range(7)]
    batch = collate(rows, 0)
    bearing = loss_bearing(batch["labels"], batch["attention_mask"])
    with live, torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        weights = live.weights(bearing, batch["attention_mask"])
    for document in range(7):
        stored = found.weights_of(document)
        torch.testing.assert_close(weights[document][bearing[document]], stored, rtol=2e-5, atol=1e-5)


def test_a_trainer_asks_for_the_unit_that_the_calibration_has(profiled, tmp_path):
    model, forget, retain, stats = profiled
    found = calibrate(stats, unit="document")
    sets = {"model": model, "forget": forget, "retain": retain, "calibration": found}
    trained = trainer(tmp_path, config=TraceConfig(weighting="live"), **sets)
    assert trained.trace_config.unit == "document"
    with pytest.raises(UserError, match="unit: got 'token', but the calibration was made with unit 'document'; calibr"):
        trainer(tmp_path, config=TraceConfig(unit="token"), **sets)
    with pytest.raises(UserError, match="unit: got 'word', allowed: token, context, document"):
        TraceConfig(unit="word")


def test_windows_are_those_of_the_configuration():
    def window(**options):
        config = tiny.model("mixtral", 60).config
        for name, value in options.items():
            setattr(config, name, value)
        return attention_window(config)

    assert window() is None
    assert window(sliding_window=7) == 7
    assert window(sliding_window=7, use_sliding_window=False) is None
    assert window(sliding_window=7, layer_types=["sliding_attention"] * 2) == 7
    assert window(sliding_window=7, layer_types=["sliding_attention", "full_attention"]) is None
    assert window(sliding_window=7, layer_types=["sliding_attention", "linear_attention"]) is None
    with pytest.raises(UserError, match="unit: got 'context', but all layers of mixtral attend within chunks"):
        window(layer_types=["chunked_attention"] * 2)


def test_profile_refuses_another_unit():
    with pytest.raises(UserError, match="unit: got 'word', allowed: token, context, document"):
        run(None, documents(2, 1), documents(2, 2), unit="word")
