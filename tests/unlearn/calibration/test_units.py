"""Weights of documents and contexts against a general solver of the same problem, and their laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_statistics import hit_matrix, statistics

from trace_unlearn.calibration import averages
from trace_unlearn.calibration.calibrate import calibrate, select_experts
from trace_unlearn.calibration.weights import Calibration
from trace_unlearn.errors import UserError
from trace_unlearn.routing.statistics import Contexts

optimize = pytest.importorskip("scipy.optimize")


def topical(seed=0, sizes=(7, 1, 30, 12, 0, 5, 5, 41, 0, 19, 3, 27, 8, 16), **options):
    """Statistics whose documents are of those lengths and of a topic each: their routing differs beyond chance."""
    stats = statistics(seed, N=sum(sizes), D=2, **options)
    rng = np.random.default_rng(seed)
    routes = stats.retain_routes.numpy()
    E = stats.retain_counts.shape[1]
    begin = 0
    for size in sizes:
        part = routes[begin : begin + size]
        expert = rng.integers(E)
        chosen = (rng.random(part.shape[:2]) < rng.random()) & (part != expert).all(2)
        part[chosen, 0] = expert
        begin += size
    counts = torch.stack(
        [torch.bincount(layer.flatten().int(), minlength=E) for layer in stats.retain_routes.unbind(1)]
    )
    offsets = torch.tensor([0, *np.cumsum(sizes)])
    return type(stats)(
        stats.forget_counts, counts, stats.forget_tokens, stats.retain_tokens, stats.top_k, stats.retain_routes, offsets
    )


def documents_of(stats, selected):
    """Sizes [D] and mean hits [D, M] of the documents with counted tokens, float64."""
    hits = hit_matrix(stats, selected).numpy()
    parts = [hits[a:b] for a, b in zip(stats.retain_offsets[:-1], stats.retain_offsets[1:], strict=True) if b > a]
    return np.array([len(part) for part in parts], dtype=float), np.stack([part.mean(0) for part in parts])


def primal_weights(sizes, rows, f, ridge, rule, cap):
    """The weights of units by a general solver on the problem as it is stated, without its dual."""
    share = sizes / sizes.sum()

    def value(w):
        distance = w * np.log(np.maximum(w, 1e-300)) if rule == "balance" else w**2 / 2
        gap = (share * w) @ rows - f
        return share @ distance + gap @ gap / (2 * ridge)

    def slope(w):
        distance = np.log(np.maximum(w, 1e-300)) + 1 if rule == "balance" else w
        return share * (distance + rows @ ((share * w) @ rows - f) / ridge)

    low = 1e-12 if rule == "balance" else 0.0
    found = optimize.minimize(
        value,
        np.ones(len(sizes)),
        jac=slope,
        method="SLSQP",
        bounds=[(low, cap)] * len(sizes),
        constraints={"type": "eq", "fun": lambda w: share @ w - 1, "jac": lambda w: share},
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    assert found.success, found.message
    return found.x


@pytest.mark.parametrize("cap", [1.7, 1e3])
@pytest.mark.parametrize("rule", ["balance", "additive"])
@pytest.mark.parametrize("seed", range(3))
def test_document_weights_solve_the_problem_as_it_is_stated(seed, rule, cap):
    stats = topical(seed)
    ridge = 0.01
    found = calibrate(stats, unit="document", rule=rule, min_ess=0.0, max_weight=cap, ridge=ridge)
    sizes, rows = documents_of(stats, found.selected)
    expected = primal_weights(sizes, rows, found.f.numpy(), ridge, rule, cap)
    np.testing.assert_allclose(found.token_weight.numpy(), np.repeat(expected, sizes.astype(int)), atol=2e-5)
    assert found.token_weight.std() > 0.05
    if cap < 2:
        assert (found.token_weight > cap * (1 - 1e-6)).any()
    weighted = (sizes * expected) @ rows / sizes.sum()
    np.testing.assert_allclose(found.weighted_r.numpy(), weighted, atol=1e-5)
    assert found.ess == pytest.approx(1 / (sizes @ expected**2 / sizes.sum()), rel=1e-4)
    assert found.unit_ess == pytest.approx(expected.sum() ** 2 / (len(expected) * (expected**2).sum()), rel=1e-4)


@pytest.mark.parametrize("rule", ["product", "ratio"])
def test_the_closed_forms_of_documents_are_those_of_tokens_on_mean_hits(rule):
    stats = topical()
    found = calibrate(stats, unit="document", rule=rule, min_ess=0.0, max_weight=1e6)
    sizes, rows = documents_of(stats, found.selected)
    ratio = (stats.forget_frequency / stats.retain_frequency)[found.selected[:, 0], found.selected[:, 1]].numpy()
    raw = np.exp(rows @ np.log(ratio)) if rule == "product" else rows @ ratio / np.maximum(rows.sum(1), 1e-9)
    if rule == "ratio":
        raw[rows.sum(1) == 0] = 1.0
    expected = raw * sizes.sum() / (sizes @ raw)
    np.testing.assert_allclose(found.token_weight.numpy(), np.repeat(expected, sizes.astype(int)), rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(["balance", "additive", "product", "ratio", "uniform"]),
    sizes=st.lists(st.integers(0, 12), min_size=2, max_size=30).filter(lambda sizes: sum(s > 0 for s in sizes) > 1),
    min_ess=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    max_weight=st.sampled_from([1.3, 4.0, 20.0]),
    skew=st.sampled_from([0.5, 2.0, 6.0]),
)
def test_bounds_hold_for_documents_of_any_length(seed, rule, sizes, min_ess, max_weight, skew):
    stats = topical(seed, sizes, skew=skew)
    options = {"rule": rule, "min_ess": min_ess, "max_weight": max_weight, "experts_per_layer": None, "min_count": 0}
    selected = select_experts(stats, experts_per_layer=None, min_count=0)
    _, rows = documents_of(stats, selected)
    if rule in ("balance", "additive") and (rows.std(0) < 1e-7).all():
        with pytest.raises(UserError, match="selected: "):
            calibrate(stats, unit="document", **options)
        return
    found = calibrate(stats, unit="document", **options)
    w = found.token_weight.double()
    assert abs(w.mean() - 1) < 1e-6
    assert w.min() >= 0
    assert w.max() <= max_weight
    assert found.ess >= min_ess
    assert found.ess == pytest.approx(float(w.sum() ** 2 / (len(w) * (w**2).sum())))
    for document in range(len(sizes)):
        assert len(set(found.weights_of(document).tolist())) == min(1, sizes[document])
    rows = hit_matrix(stats, found.selected)
    torch.testing.assert_close(found.weighted_r, (w[:, None] * rows).sum(0) / w.sum())
    if rule in ("balance", "additive"):
        gap, even = (((r - found.f) ** 2).sum() for r in (found.weighted_r, found.r))
        assert gap <= even + 1e-9
        score = torch.stack([part.mean(0) for part in rows.split(list(sizes)) if len(part)]) @ _values(found)
        expected = found.weight_from_score(score)
        torch.testing.assert_close(
            expected.repeat_interleave(torch.tensor([s for s in sizes if s])), w, rtol=1e-5, atol=1e-6
        )


def _values(found):
    return found.table[found.selected[:, 0], found.selected[:, 1]].double()


@pytest.mark.parametrize("rule", ["balance", "additive"])
def test_more_documents_than_are_held_as_numbers_give_the_same_weights(monkeypatch, rule):
    """Bits instead of numbers, Newton's direction from a sample."""
    rng = np.random.default_rng(0)
    stats = topical(1, tuple(rng.integers(0, 9, 600)))
    options = {"unit": "document", "rule": rule, "min_ess": 0.0, "ridge": 1e-3, "max_weight": 3.0}
    dense = calibrate(stats, **options)
    monkeypatch.setattr(averages, "_SAMPLE", 60)
    found, again = (calibrate(stats, **options) for _ in range(2))
    torch.testing.assert_close(found.token_weight, dense.token_weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.token_weight, again.token_weight)
    assert torch.equal(found.table, again.table)
    bounded = calibrate(stats, unit="document", rule=rule, min_ess=0.9)
    assert 0.9 <= bounded.ess < 0.9 + 1e-4


def test_documents_of_one_token_have_the_weights_of_tokens():
    stats = topical(2, (1,) * 300)
    one, other = (calibrate(stats, unit=unit) for unit in ("token", "document"))
    torch.testing.assert_close(one.token_weight, other.token_weight, rtol=1e-5, atol=1e-6)
    assert other.unit_ess == pytest.approx(other.ess)


def test_the_order_of_documents_does_not_matter():
    sizes = (7, 3, 12, 3, 7, 20, 1, 5, 16, 2)
    stats = topical(3, sizes)
    order = np.random.default_rng(1).permutation(len(sizes))
    parts = stats.retain_routes.split(list(sizes))
    permuted = type(stats)(
        stats.forget_counts,
        stats.retain_counts,
        stats.forget_tokens,
        stats.retain_tokens,
        stats.top_k,
        torch.cat([parts[i] for i in order]),
        torch.tensor([0, *np.cumsum([sizes[i] for i in order])]),
    )
    one, other = (calibrate(s, unit="document") for s in (stats, permuted))
    for place, document in enumerate(order):
        torch.testing.assert_close(other.weights_of(place), one.weights_of(int(document)), rtol=1e-6, atol=0)


def test_shuffled_documents_keep_the_mean_and_exchange_weights_between_documents():
    stats = topical()
    found = calibrate(stats, unit="document")
    control = found.shuffled(0)
    assert torch.equal(calibrate(stats, unit="document", rule="shuffled").token_weight, control.token_weight)
    assert not torch.equal(control.token_weight, found.token_weight)
    assert control.token_weight.double().mean() == pytest.approx(1, abs=1e-6)
    sizes = stats.retain_offsets.diff()
    one, other = ([c.weights_of(d)[0].item() for d in range(len(sizes)) if sizes[d]] for c in (found, control))
    factor = sum(other) / sum(one)
    assert sorted(other) == pytest.approx([factor * w for w in sorted(one)], rel=1e-5)
    for document in range(len(sizes)):
        assert len(set(control.weights_of(document).tolist())) == min(1, sizes[document])
    assert control.unit_ess == pytest.approx(found.unit_ess, rel=1e-5)


def test_a_pair_that_every_document_activates_equally_often_is_dropped():
    """Two formats of one document: the first token of each goes to expert 0, the others to 1 or 2."""
    routes = [[[0]], [[1]], [[1]], [[2]], [[0]], [[1]], [[2]], [[2]]] * 6
    stats = statistics(N=48, L=1, E=3, k=1)
    stats = type(stats)(
        torch.tensor([[40, 50, 10]]),
        torch.tensor([[12, 18, 18]]),
        100,
        48,
        1,
        torch.tensor(routes, dtype=torch.uint8),
        torch.arange(0, 49, 4),
    )
    found = calibrate(stats, torch.tensor([[0, 0], [0, 1]]), unit="document", min_ess=0.0)
    assert found.selected.tolist() == [[0, 1]]
    assert any(
        "every retain document activates (0, 0) (layer, expert) equally often: dropped" in n for n in found.notes
    )
    assert found.weighted_r[0] == pytest.approx(0.5, abs=1e-4)
    with pytest.raises(UserError, match=r"equally often.*cannot change that. Use unit 'token'"):
        calibrate(stats, torch.tensor([[0, 0]]), unit="document")


def test_a_set_of_one_document_has_one_weight():
    stats = topical(sizes=(0, 40, 0))
    with pytest.raises(UserError, match="unit: got 'document', but the retain set has one document"):
        calibrate(stats, unit="document")
    assert set(calibrate(stats, unit="document", rule="uniform").token_weight.tolist()) == {1.0}
    with pytest.raises(UserError, match="unit: got 'sentence', allowed: 'token', 'context', 'document'"):
        calibrate(topical(), unit="sentence")


def test_uniform_weights_without_any_selected_pair():
    found = calibrate(topical(), torch.zeros(0, 2, dtype=torch.int64), unit="document", rule="uniform")
    assert set(found.token_weight.tolist()) == {1.0}
    assert found.unit_ess == found.ess == 1.0


def test_the_record_says_the_unit(tmp_path):
    found = calibrate(topical(), unit="document")
    found.save(tmp_path / "calibration")
    again = Calibration.load(tmp_path / "calibration")
    assert again.unit == "document"
    assert again.unit_ess == found.unit_ess
    assert again.summary() == found.summary()
    assert f"unit document: effective sample size {found.ess:.3f} of 174 tokens" in found.summary()
    assert f"and {found.unit_ess:.3f} of 12 documents" in found.summary()
    assert "unit token: effective" in calibrate(topical()).summary()


def test_documents_carry_more_weight_where_tokens_say_little():
    """Documents that differ in their mean hits: their weights follow the mean, not the single token."""
    stats = topical(5, (20,) * 30)
    selected = select_experts(stats)
    found = calibrate(stats, selected, unit="document", min_ess=0.5)
    _, rows = documents_of(stats, found.selected)
    score = rows @ _values(found).numpy()
    weight = np.array([found.weights_of(d)[0].item() for d in range(30)])
    assert np.corrcoef(score, np.log(weight))[0, 1] > 0.999
    assert math.isclose(found.ess, 0.5, abs_tol=1e-3)


def prompted(seed, window, skew=2.0):
    """Statistics with prompts, and [N, P] float64: the share of each position in each counted token's context."""
    rng = np.random.default_rng(seed)
    counted, offsets, rows = [], [0], []
    for length in (9, 1, 14, 0, 9, 6, 11, 3, 20, 8, 17, 5):
        bearing = rng.random(length) < 0.6
        bearing[-1:] = True
        begin = len(counted)
        for t in np.flatnonzero(bearing):
            rows.append((begin + (max(0, t - window + 1) if window else 0), begin + t + 1))
        counted += bearing.tolist()
        offsets.append(offsets[-1] + int(bearing.sum()))
    counted = torch.tensor(counted)
    everything = statistics(seed, N=len(counted), D=2, skew=skew)
    share = torch.zeros(len(rows), len(counted), dtype=torch.float64)
    for i, (low, high) in enumerate(rows):
        share[i, low:high] = 1 / (high - low)
    L, E = everything.retain_counts.shape
    pairs = torch.tensor([(layer, e) for layer in range(L) for e in range(E)])
    hits = hit_matrix(everything, pairs)
    contexts = Contexts(
        counted,
        everything.retain_routes[~counted],
        everything.forget_counts.double() / everything.forget_tokens * 500,
        (share @ hits).sum(0).view(L, E),
        window,
    )
    own = everything.retain_routes[counted]
    counts = torch.stack([torch.bincount(layer.flatten().int(), minlength=E) for layer in own.unbind(1)])
    forget = (everything.forget_counts * 500) // everything.forget_tokens
    stats = type(everything)(
        forget, counts, 500, len(own), everything.top_k, own, torch.tensor(offsets), contexts=contexts
    )
    return stats, share, everything


@pytest.mark.parametrize("as_numbers", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("rule", ["balance", "additive", "product", "ratio", "uniform"])
def test_context_weights_solve_the_problem_as_it_is_stated(rule, window, as_numbers, monkeypatch):
    stats, share, everything = prompted(1, window)
    if not as_numbers:
        monkeypatch.setattr(averages, "_SAMPLE", 40)
    found = calibrate(stats, unit="context", rule=rule, min_ess=0.0, max_weight=1e3, ridge=0.01)
    rows = (share @ hit_matrix(everything, found.selected)).numpy()
    ratio = (found.f / found.r).numpy()
    np.testing.assert_allclose(found.r.numpy(), rows.mean(0), rtol=1e-12)
    if rule in ("balance", "additive"):
        expected = primal_weights(np.ones(len(rows)), rows, found.f.numpy(), 0.01, rule, 1e3)
    elif rule == "product":
        expected = np.exp(rows @ np.log(ratio))
    elif rule == "ratio":
        expected = np.where(rows.sum(1) > 0, rows @ ratio / np.maximum(rows.sum(1), 1e-9), 1.0)
    else:
        expected = np.ones(len(rows))
    expected = expected / expected.mean()
    np.testing.assert_allclose(found.token_weight.numpy(), expected, atol=3e-5)
    np.testing.assert_allclose(found.weighted_r.numpy(), expected @ rows / len(rows), atol=1e-5)
    assert rule == "uniform" or found.token_weight.std() > 0.05
    assert found.unit_ess == found.ess
    control = found.shuffled(0)
    np.testing.assert_allclose(
        control.weighted_r.numpy(), control.token_weight.double().numpy() @ rows / len(rows), atol=1e-6
    )


def test_contexts_reach_the_disk_and_are_asked_for(tmp_path):
    stats, _, _ = prompted(2, 4)
    stats.save(tmp_path / "profile")
    again = type(stats).load(tmp_path / "profile")
    one, other = (calibrate(s, unit="context") for s in (stats, again))
    assert torch.equal(one.token_weight, other.token_weight)
    one.save(tmp_path / "calibration")
    loaded = Calibration.load(tmp_path / "calibration")
    assert torch.equal(loaded.shuffled(1).weighted_r, one.shuffled(1).weighted_r)
    assert loaded.choices["attention_window"] == 4
    assert torch.equal(calibrate(again, unit="document").token_weight, calibrate(stats, unit="document").token_weight)
    with pytest.raises(UserError, match="unit: got 'context', but the profile does not hold"):
        calibrate(topical(), unit="context")
