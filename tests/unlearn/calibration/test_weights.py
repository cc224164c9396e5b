"""Token weights: their other rules, their way to the retain data, and to disk."""

from __future__ import annotations

import pytest
import tiny
import torch
from made_statistics import frequencies, hit_matrix, statistics
from profiled import VOCAB, documents, run

from trace_unlearn.calibration.calibrate import calibrate, select_experts
from trace_unlearn.calibration.weights import Calibration, attach_weights
from trace_unlearn.errors import UserError
from trace_unlearn.routing.recorder import RoutingRecorder


def test_product_and_ratio_from_their_definitions():
    stats = statistics()
    selected = select_experts(stats, experts_per_layer=2)
    a = hit_matrix(stats, selected)
    ratio = stats.forget_frequency / stats.retain_frequency
    ratio = ratio[selected[:, 0], selected[:, 1]]
    product = torch.where(a > 0, ratio, 1.0).prod(1)
    mean = torch.where(a.sum(1) > 0, (a * ratio).sum(1) / a.sum(1).clamp(min=1), 1.0)
    for rule, raw in (("product", product), ("ratio", mean)):
        found = calibrate(stats, rule=rule, min_ess=0.0, max_weight=1e6, experts_per_layer=2)
        torch.testing.assert_close(found.token_weight.double(), raw / raw.mean(), rtol=1e-6, atol=0)


def test_the_rule_shuffled_is_the_control():
    control, found = calibrate(statistics(), rule="shuffled"), calibrate(statistics())
    assert control.shuffle_seed == 0
    assert torch.equal(control.token_weight, found.shuffled(0).token_weight)


@pytest.fixture(scope="module")
def profiled():
    model = tiny.model("qwen3_moe", VOCAB)
    forget, retain = documents(8, 1), documents(20, 2, longest=20)
    return model, forget, retain, run(model, forget, retain)


@pytest.mark.parametrize("rule", ["balance", "additive", "product", "ratio", "uniform"])
def test_live_weights_are_the_stored_ones_on_the_same_routing(profiled, rule):
    model, _, retain, stats = profiled
    found = calibrate(stats, rule=rule)
    for document, row in enumerate(retain):
        inputs = {"input_ids": torch.tensor([row["input_ids"]])}
        with (
            torch.no_grad(),
            RoutingRecorder(model, found.table) as rec,
            RoutingRecorder(model, found.hit_table) as hit,
        ):
            model(**inputs)
        live = found.weight_from_score(rec.token_scores, hit.token_scores)[0]
        bearing = [t for t in range(len(row["labels"]) - 1) if row["labels"][t + 1] != -100]
        torch.testing.assert_close(live[bearing], found.weights_of(document), rtol=1e-5, atol=1e-6)
    if rule == "ratio":
        with pytest.raises(UserError, match="hits"):
            found.weight_from_score(rec.token_scores)


def test_attach_weights(profiled):
    _, forget, retain, stats = profiled
    found = calibrate(stats)
    weighted = attach_weights(retain, found)
    flat = []
    for row in weighted:
        assert len(row["token_weight"]) == len(row["input_ids"])
        for t, weight in enumerate(row["token_weight"]):
            if t + 1 < len(row["labels"]) and row["labels"][t + 1] != -100:
                flat.append(weight)
            else:
                assert weight == 0
    assert torch.equal(torch.tensor(flat), found.token_weight)
    again = attach_weights(weighted, found.shuffled(3))
    flat, shuffled = (sorted(w for row in data["token_weight"] for w in row) for data in (weighted, again))
    assert shuffled == flat
    with pytest.raises(UserError, match="not what the calibration was made for"):
        attach_weights(forget, found)


def test_shuffled_control():
    found = calibrate(statistics())
    control = found.shuffled(0)
    assert torch.equal(control.token_weight.sort().values, found.token_weight.sort().values)
    assert not torch.equal(control.token_weight, found.token_weight)
    assert torch.equal(control.token_weight, found.shuffled(0).token_weight)
    assert not torch.equal(control.token_weight, found.shuffled(1).token_weight)
    assert control.ess == pytest.approx(found.ess)
    torch.testing.assert_close(
        control.weighted_r, frequencies(statistics(), control.token_weight, control.selected), rtol=1e-9, atol=0
    )
    assert control.mean_error > 2 * found.mean_error
    with pytest.raises(UserError, match="shuffled"):
        control.weight_from_score(torch.zeros(3))


def test_save_and_load(tmp_path):
    found = calibrate(statistics()).shuffled(1)
    found.save(tmp_path / "calibration")
    again = Calibration.load(tmp_path / "calibration")
    for name in ("table", "token_weight", "selected", "f", "weighted_r", "hits"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    assert again.summary() == found.summary()
    assert (again.scale, again.clip, again.shuffle_seed) == (found.scale, found.clip, 1)
    calibrate(statistics(1)).save(tmp_path / "other")
    (tmp_path / "other" / "calibration.json").write_bytes((tmp_path / "calibration" / "calibration.json").read_bytes())
    with pytest.raises(UserError, match="do not belong together"):
        Calibration.load(tmp_path / "other")
