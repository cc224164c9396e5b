"""Calibration against other solvers, its laws, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_profile import VOCAB, documents, run

from trace_unlearn import balance as balance_module
from trace_unlearn import plots
from trace_unlearn.balance import DISTANCES, balance
from trace_unlearn.calibrate import CalibrateOptions, calibrate, main, select_experts
from trace_unlearn.errors import UserError
from trace_unlearn.patterns import Patterns
from trace_unlearn.profile import RoutingStatistics
from trace_unlearn.routing import RoutingRecorder
from trace_unlearn.selection import RANKS, rank_values
from trace_unlearn.weights import Calibration, attach_weights


def statistics(seed=0, N=400, L=2, E=8, k=2, D=10, skew=1.5, forget_tokens=1000):
    """Random routing; the forget side prefers the low experts."""
    generator = torch.Generator().manual_seed(seed)

    def routes(tokens, bias):
        logits = torch.randn(tokens, L, E, generator=generator) + bias
        return logits.topk(k, dim=-1).indices

    def counts(chosen):
        return torch.stack([torch.bincount(layer.flatten(), minlength=E) for layer in chosen.unbind(1)])

    retain, forget = routes(N, 0.0), routes(forget_tokens, torch.linspace(skew, 0.0, E))
    offsets = torch.cat([torch.tensor([0]), torch.randint(0, N + 1, (D - 1,), generator=generator).sort().values])
    offsets = torch.cat([offsets, torch.tensor([N])])
    return RoutingStatistics(
        counts(forget),
        counts(retain),
        forget_tokens,
        N,
        k,
        retain.to(torch.uint8),
        offsets,
        {"retain_fingerprint": "x"},
    )


def hit_matrix(stats, selected):
    return torch.stack([(stats.retain_routes[:, i] == e).any(1) for i, e in selected.tolist()], dim=1).double()


def frequencies(stats, weights, selected):
    w = weights.double()
    return (w[:, None] * hit_matrix(stats, selected)).sum(0) / w.sum()


@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
@pytest.mark.parametrize("seed", range(4))
def test_balance_against_lbfgs_on_the_dual(seed, ridge):
    """The textbook dual without a cap: log mean exp(a . lambda) - lambda . f + ridge / 2 |lambda|^2."""
    stats = statistics(seed)
    found = calibrate(stats, min_ess=0.0, max_weight=1e6, ridge=ridge, experts_per_layer=2)
    a = hit_matrix(stats, found.selected)
    free = torch.zeros(a.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [free], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss():
        solver.zero_grad()
        value = torch.logsumexp(a @ free, 0) - math.log(len(a)) - free @ found.f + ridge / 2 * free @ free
        value.backward()
        return value

    solver.step(loss)
    expected = torch.softmax(a @ free.detach(), 0) * len(a)
    assert (found.token_weight.double() - expected).abs().max() < 1e-5
    assert found.token_weight.std() > 0.1


@pytest.mark.parametrize("cap", [1.5, 2.5])
@pytest.mark.parametrize("rule", ["balance", "additive"])
def test_a_cap_meets_the_optimality_conditions(rule, cap):
    """They are w = F(lambda . a + mu), lambda = (f - weighted r) / ridge, mean 1; no neighbour wins."""
    ridge = 0.01
    stats = statistics(1)
    selected = select_experts(stats, experts_per_layer=2)
    a = hit_matrix(stats, selected).numpy()
    f = stats.forget_frequency[selected[:, 0], selected[:, 1]]
    patterns = Patterns.of(torch.from_numpy(np.packbits(a.astype(bool), axis=1)), a.shape[1])
    found = balance(patterns, f, ridge=ridge, min_ess=0.0, cap=cap, rule=rule)
    mu = DISTANCES[rule].scale(patterns.scores(found.coefficients), patterns.counts, cap)
    f, coefficients = f.numpy(), found.coefficients.numpy()
    x = a @ coefficients + mu
    w = np.minimum(np.exp(x), cap) if rule == "balance" else np.clip(x, 0, cap)
    assert (w >= cap * (1 - 1e-12)).sum() > 10  # the cap is active
    assert abs(w.mean() - 1) < 1e-12
    np.testing.assert_allclose(coefficients, (f - w @ a / len(w)) / ridge, atol=1e-6)

    def primal(v):
        distance = v * np.log(v) if rule == "balance" else v**2 / 2
        return distance.mean() + ((v @ a / len(v) - f) ** 2).sum() / (2 * ridge)

    rng = np.random.default_rng(0)
    for _ in range(200):  # no feasible neighbour is better
        other = np.clip(w + rng.normal(size=len(w)) * 0.01, 1e-9, cap)
        other = np.minimum(other, cap)
        room = other < cap * 0.999
        other[room] += (1 - other.mean()) * len(w) / room.sum()
        if (other > 0).all() and (other <= cap).all():
            assert primal(other) >= primal(w)


def scipy_weights(a, f, ridge):
    """The weights from scipy's general solver on the dual without a cap."""
    special = pytest.importorskip("scipy.special")
    optimize = pytest.importorskip("scipy.optimize")

    def dual(free):
        x = a @ free
        value = special.logsumexp(x) - math.log(len(a))
        return value - free @ f + ridge / 2 * free @ free, special.softmax(x) @ a - f + ridge * free

    found = optimize.minimize(
        dual, np.zeros(a.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-10}
    )
    return special.softmax(a @ found.x) * len(a)


def test_many_patterns_against_a_general_solver(monkeypatch):
    """Also where Newton sees a sample of the patterns only."""
    monkeypatch.setattr(balance_module, "_SAMPLE", 1000)
    stats = statistics(N=20_000, L=4, E=16, k=4, skew=1.0, forget_tokens=10_000)
    found = calibrate(stats, min_ess=0.0, max_weight=1e6, ridge=1e-4)
    a = hit_matrix(stats, found.selected).numpy()
    assert len(np.unique(a, axis=0)) > 5000
    expected = scipy_weights(a, found.f.numpy(), 1e-4)
    np.testing.assert_allclose(found.token_weight.numpy(), expected, rtol=1e-5)
    bounded = calibrate(stats, min_ess=0.9)
    assert 0.9 <= bounded.ess < 0.9 + 1e-4
    torch.manual_seed(1)
    assert torch.equal(calibrate(stats, min_ess=0.9).token_weight, bounded.token_weight)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(["balance", "additive"]),
    shape=st.sampled_from([(3, 1, 3, 1), (12, 2, 4, 2), (40, 1, 2, 1), (200, 3, 6, 2)]),
    cap=st.sampled_from([1.2, 3.0, 20.0]),
    ridge=st.sampled_from([1e-6, 1e-3, 1.0]),
    skew=st.sampled_from([0.0, 2.0, 8.0]),
)
def test_small_instances_are_solved_to_optimality(seed, rule, shape, cap, ridge, skew):
    """Few tokens, targets that often nothing meets: finite weights that meet the optimality conditions."""
    N, L, E, k = shape
    stats = statistics(seed, N=N, L=L, E=E, k=k, D=2, skew=skew, forget_tokens=50)
    selected = (stats.retain_counts > 0).nonzero()
    a = hit_matrix(stats, selected)
    f = stats.forget_frequency[selected[:, 0], selected[:, 1]]
    patterns = Patterns.of(torch.from_numpy(np.packbits(a.numpy().astype(bool), axis=1)), len(selected))
    found = balance(patterns, f, ridge=ridge, min_ess=0.0, cap=cap, rule=rule)
    distance = DISTANCES[rule]
    x = patterns.scores(found.coefficients)
    x += distance.scale(x, patterns.counts, cap)
    w = distance.weights(x, cap)
    assert patterns.mean(w) == pytest.approx(1, abs=1e-9)
    assert ((w >= 0) & (w <= cap * (1 + 1e-12))).all()
    torch.testing.assert_close(patterns.frequencies(w) + found.ridge * found.coefficients, f, rtol=0, atol=1e-8)


def test_targets_are_hit_when_they_can_be():
    found = calibrate(statistics(), min_ess=0.0, max_weight=1e6, experts_per_layer=2)
    assert found.max_error < 1e-4
    assert (found.r - found.f).abs().max() > 0.1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(["balance", "additive", "product", "ratio", "uniform"]),
    min_ess=st.sampled_from([0.0, 0.2, 0.5, 0.8, 0.99, 0.9999]),
    max_weight=st.sampled_from([1.001, 1.2, 3.3, 20.0, 1000.0]),
    per_layer=st.sampled_from([1, 2, 4, None]),
    skew=st.sampled_from([0.3, 1.5, 4.0]),
)
def test_bounds_hold_always(seed, rule, min_ess, max_weight, per_layer, skew):
    stats = statistics(seed, N=120, skew=skew)
    found = calibrate(stats, rule=rule, min_ess=min_ess, max_weight=max_weight, experts_per_layer=per_layer)
    w = found.token_weight.double()
    assert abs(w.mean() - 1) < 1e-6
    assert w.min() >= 0
    assert w.max() <= max_weight
    assert w.sum() ** 2 / (len(w) * (w**2).sum()) >= min_ess
    assert found.ess == pytest.approx(float(w.sum() ** 2 / (len(w) * (w**2).sum())))
    torch.testing.assert_close(found.weighted_r, frequencies(stats, found.token_weight, found.selected))
    error = (found.weighted_r - found.f).abs()
    assert found.max_error == pytest.approx(float(error.max()))
    if rule in ("balance", "additive"):  # uniform weights are allowed, so the nearest ones are no further away
        assert (error**2).sum() <= ((found.r - found.f) ** 2).sum() + 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), rule=st.sampled_from(["balance", "additive", "product", "ratio"]))
def test_permuting_tokens_permutes_weights(seed, rule):
    stats = statistics(seed, N=150)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(seed))
    permuted = RoutingStatistics(
        stats.forget_counts,
        stats.retain_counts,
        stats.forget_tokens,
        stats.retain_tokens,
        stats.top_k,
        stats.retain_routes[order],
        stats.retain_offsets,
        stats.meta,
    )
    one, two = calibrate(stats, rule=rule), calibrate(permuted, rule=rule)
    assert torch.equal(one.token_weight[order], two.token_weight)
    assert torch.equal(one.table, two.table)


def test_the_bound_on_the_sample_size_is_used_up_and_a_lower_one_matches_better():
    errors = []
    for bound in (0.9, 0.7, 0.5):
        found = calibrate(statistics(skew=3.0), min_ess=bound, experts_per_layer=None)
        assert bound <= found.ess < bound + 1e-4
        assert any("bound on the effective sample size is active" in note for note in found.notes)
        errors.append(found.mean_error)
    assert errors == sorted(errors, reverse=True)


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


def test_selection_from_its_definition():
    stats = statistics(skew=0.5)
    f, r = stats.forget_frequency, stats.retain_frequency
    for limit in (1, 3, None):
        expected = []
        for layer in range(2):
            good = [e for e in range(8) if f[layer, e] > r[layer, e] and f[layer, e] >= 0.9 * 2 / 8]
            good.sort(key=lambda e: -f[layer, e] * math.log(f[layer, e] / r[layer, e]))
            expected += [[layer, e] for e in sorted(good[:limit])]
        assert select_experts(stats, experts_per_layer=limit, tau=0.9).tolist() == expected


@pytest.mark.parametrize("rank", RANKS)
def test_rank_rules_from_their_definitions(rank):
    stats = statistics(skew=0.8, L=3)
    n, m = stats.forget_tokens, stats.retain_tokens
    value = {}
    for layer in range(3):
        for e in range(8):
            hits, others = int(stats.forget_counts[layer, e]), int(stats.retain_counts[layer, e])
            f, r, p = hits / n, others / m, (hits + others) / (n + m)
            value[layer, e] = {
                "log_ratio": f * math.log(f / r),
                "difference": f - r,
                "ratio": f / r,
                "z_score": (f - r) / math.sqrt(p * (1 - p) * (1 / n + 1 / m)),
            }[rank]
    good = sorted((v, pair) for pair, v in value.items() if stats.forget_counts[pair] >= 300)[::-1]
    good = [(v, pair) for v, pair in good if stats.forget_frequency[pair] > stats.retain_frequency[pair]]
    options = {"rank": rank, "tau": 0.0, "min_count": 300, "experts_per_layer": None}
    assert 4 < len(good) < 24
    expected = sorted(list(pair) for _, pair in good)
    assert select_experts(stats, **options).tolist() == expected
    expected = sorted(list(pair) for _, pair in good[:4])
    assert select_experts(stats, **options, max_experts=4).tolist() == expected
    threshold = good[2][0]
    expected = sorted(list(pair) for _, pair in good[:3])
    assert select_experts(stats, **options, threshold=threshold).tolist() == expected
    assert calibrate(stats, **options, threshold=threshold).selected.tolist() == expected
    with pytest.raises(UserError, match=r"Lower threshold \(now 1e\+300\)"):
        calibrate(stats, **options, threshold=1e300)
    with pytest.raises(UserError, match=r"min_count \(now 5000\) to \d+ or less"):
        calibrate(stats, min_count=5000)


def test_documents_widen_the_intervals_and_lower_the_z_score():
    stats = statistics()
    found = calibrate(stats)
    z = 1.959963984540054
    for frequency, interval, n in ((found.f, found.f_interval, 1000), (found.r, found.r_interval, 400)):
        assert ((interval[:, 0] < frequency) & (frequency < interval[:, 1])).all()
        # Both ends p of Wilson's interval solve |p - frequency| = z sqrt(p (1 - p) / n).
        deviation = (interval - frequency[:, None]).abs()
        torch.testing.assert_close(deviation, z * (interval * (1 - interval) / n).sqrt())
    alike = dataclasses.replace(
        stats, forget_design_effect=torch.full((2, 8), 4.0), retain_design_effect=torch.full((2, 8), 4.0)
    )
    torch.testing.assert_close(rank_values(alike, "z_score"), rank_values(stats, "z_score") / 2)
    wider = calibrate(alike)
    assert (wider.r_interval.diff() > 1.8 * found.r_interval.diff()).all()
    assert "[0." in wider.summary()
    single = dataclasses.replace(stats, retain_design_effect=torch.full((2, 8), math.inf))
    assert (calibrate(single).r_interval == torch.tensor([0.0, 1.0])).all()
    assert (rank_values(single, "z_score") == 0).all()


def test_the_plot_of_intervals_shows_every_selected_expert():
    found = calibrate(statistics())
    labels = [f"{layer} / {expert}" for layer, expert in found.selected.tolist()]
    arrays = (found.f, found.f_interval, found.r, found.r_interval, found.weighted_r)
    (ax,) = plots.frequency_intervals(labels, *(values.numpy() for values in arrays)).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == labels
    spans = [segment[:, 0] for segment in ax.collections[0].get_segments()]
    np.testing.assert_allclose(spans, found.f_interval)


def test_additive_matches_more_closely_than_any_other_rule_of_the_same_sample_size():
    errors = {}
    for rule in ("balance", "additive"):
        found = calibrate(statistics(skew=3.0), rule=rule, min_ess=0.6, experts_per_layer=None)
        assert found.ess == pytest.approx(0.6, abs=1e-4)
        errors[rule] = float(((found.weighted_r - found.f) ** 2).sum())
    assert errors["additive"] < 0.999 * errors["balance"]


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


def lonely(stats, layer, expert):
    """The statistics with an expert that no retain token reaches."""
    routes = stats.retain_routes.clone()
    routes[:, layer][routes[:, layer] == expert] = 255
    counts = stats.retain_counts.clone()
    counts[layer, expert] = 0
    return RoutingStatistics(
        stats.forget_counts, counts, stats.forget_tokens, stats.retain_tokens, 2, routes, stats.retain_offsets
    )


def test_an_expert_that_retain_data_never_reaches_is_dropped_with_a_note():
    stats = lonely(statistics(), 0, 0)
    assert [0, 0] in select_experts(stats).tolist()
    found = calibrate(stats)
    assert [0, 0] not in found.selected.tolist()
    assert any("no retain token activates (0, 0)" in note for note in found.notes)
    with pytest.raises(UserError, match=r"no retain token ever activates \(0, 0\)"):
        calibrate(stats, torch.tensor([[0, 0]]))


def handmade(routes, forget):
    """Statistics of [N][L][k] retain routes and of [L][E] counts over 100 forget tokens."""
    routes = torch.tensor(routes, dtype=torch.uint8)
    N, _, k = routes.shape
    forget = torch.tensor(forget)
    counts = torch.stack(
        [torch.bincount(layer.flatten().int(), minlength=forget.shape[1]) for layer in routes.unbind(1)]
    )
    return RoutingStatistics(forget, counts, 100, N, k, routes, torch.tensor([0, N]))


@pytest.mark.parametrize("rule", ["balance", "additive"])
@pytest.mark.parametrize(
    ("routes", "forget", "selected", "note"),
    [
        # Everything hits one of the two, or both; no forget token hits the third.
        ([[[0]], [[1]], [[0]], [[1]]], [[100, 0]], [[0, 0]], r"every forget token activates \(0, 0\)"),
        ([[[0, 1]], [[2, 3]], [[2, 3]]], [[60, 50, 50, 40]], [[0, 0], [0, 1]], r"same retain .*differ by 0\.100"),
        ([[[0, 1]], [[2, 3]], [[2, 3]]], [[50, 50, 50, 50]], [[0, 0], [0, 1]], r"same retain .*one of them says it"),
        (
            [[[0]], [[1]], [[2]], [[1]]],
            [[30, 20, 10, 40]],
            [[0, 0], [0, 1], [0, 2]],
            r"every retain token hits 1 of the selected experts of layer 0, and forget tokens 0\.600",
        ),
        ([[[0, 1]], [[0, 2]]], [[99, 60, 41]], [[0, 0], [0, 1]], r"every retain token activates \(0, 0\).*dropped"),
    ],
)
def test_targets_that_no_weights_meet_are_named_and_the_nearest_weights_given(rule, routes, forget, selected, note):
    found = calibrate(handmade(routes * 50, forget), torch.tensor(selected), rule=rule, min_ess=0.0)
    assert any(re.search(note, line) for line in found.notes)
    assert torch.isfinite(found.token_weight).all()
    assert torch.isfinite(found.table).all()
    before = ((found.r - found.f) ** 2).sum()
    assert ((found.weighted_r - found.f) ** 2).sum() <= before + 1e-12
    assert not any("retain token" in line or "forget token" in line for line in calibrate(statistics()).notes)


def test_an_expert_of_every_retain_token_alone_is_refused():
    with pytest.raises(UserError, match=r"every retain token activates \(0, 0\)"):
        calibrate(handmade([[[0, 1]], [[0, 2]]], [[99, 60, 41]]), torch.tensor([[0, 0]]))


def test_nothing_selected_says_which_knob_to_turn():
    stats = statistics(skew=0.5)
    with pytest.raises(UserError, match=r"Lower tau \(now 3\.0\) to ([\d.]+) or less") as caught:
        calibrate(stats, tau=3.0)
    advised = float(str(caught.value).split(" to ")[1].split()[0])
    assert len(select_experts(stats, tau=advised)) > 0
    assert len(select_experts(stats, tau=advised * 1.01)) == 0
    same = RoutingStatistics(
        stats.retain_counts, stats.retain_counts, 400, 400, 2, stats.retain_routes, stats.retain_offsets
    )
    with pytest.raises(UserError, match="equally often"):
        calibrate(same)
    assert torch.equal(calibrate(same, rule="uniform").token_weight, torch.ones(400))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "raking"}, "rule: got 'raking'"),
        ({"min_ess": 1.0}, "min_ess: got 1.0"),
        ({"min_ess": math.nan}, "min_ess: got nan"),
        ({"max_weight": 1.0}, "max_weight: got 1.0"),
        ({"max_weight": math.nan}, "max_weight: got nan"),
        ({"ridge": 0.0}, "ridge: got 0.0"),
        ({"experts_per_layer": 0}, "experts_per_layer: got 0"),
        ({"tau": math.nan}, "tau: got nan"),
        ({"rank": "kl"}, "rank: got 'kl'"),
        ({"threshold": math.nan}, "threshold: got nan"),
        ({"max_experts": 0}, "max_experts: got 0"),
        ({"min_count": -1}, "min_count: got -1"),
        ({"selected": torch.tensor([[0, 8]])}, "selected: got"),
        ({"selected": torch.tensor([[0, 1], [0, 1]])}, "more than once"),
        ({"selected": torch.tensor([0, 1])}, "selected: got"),
        ({"selected": torch.zeros(0, 2, dtype=torch.long)}, "names no"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        calibrate(statistics(), **options)


def test_weights_that_follow_the_position_are_pointed_out():
    """Retain documents whose first tokens alone use expert 0: a format, no content."""
    N, D = 400, 40
    routes = torch.full((N, 1, 1), 2, dtype=torch.uint8)
    routes[::10] = 0
    counts = torch.tensor([[N // 10, 0, N - N // 10]])
    stats = RoutingStatistics(torch.tensor([[50, 0, 50]]), counts, 100, N, 1, routes, torch.arange(0, N + 1, N // D))
    assert any("position" in note for note in calibrate(stats, tau=0.1).notes)
    assert not any("position" in note for note in calibrate(statistics()).notes)


def test_killed_at_work_leaves_nothing_and_a_rerun_works(tmp_path, profiled):
    profiled[3].save(tmp_path / "profile")
    options = {"profile": str(tmp_path / "profile"), "output": str(tmp_path / "calibration")}
    code = f"""
import os, signal
from trace_unlearn import calibrate, files
from trace_unlearn.calibrate import CalibrateOptions, main
right = files.save_tensors
def deadly(*args, **others):
    right(*args, **others)
    os.kill(os.getpid(), signal.SIGKILL)
files.save_tensors = deadly
main(CalibrateOptions(**{options!r}), lambda line: None)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {path.name for path in tmp_path.iterdir()} - {"profile"}
    assert left  # it was within the writing
    assert all(name.startswith(".calibration.") for name in left)
    main(CalibrateOptions(**options), lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration", "profile"]
    assert torch.equal(Calibration.load(options["output"]).token_weight, calibrate(profiled[3]).token_weight)


def test_the_verb(tmp_path, profiled):
    profiled[3].save(tmp_path / "profile")
    said = []
    options = CalibrateOptions(profile=str(tmp_path / "profile"), output=str(tmp_path / "calibration"))
    main(options, said.append)
    text = "\n".join(said)
    for word in ("weighted r", "error with uniform weights", "effective sample size", "largest weight", "median"):
        assert word in text
    assert Calibration.load(tmp_path / "calibration").rule == "balance"
    with pytest.raises(UserError, match="exists"):
        main(options, said.append)
    with pytest.raises(UserError):
        main(CalibrateOptions(profile=str(tmp_path / "nothing"), output=str(tmp_path / "new")), said.append)
    assert not (tmp_path / "new").exists()
