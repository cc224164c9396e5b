"""The solver of the weights against other solvers, and its laws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_statistics import frequencies, hit_matrix, statistics

from trace_unlearn.calibration import patterns as patterns_module
from trace_unlearn.calibration.balance import DISTANCES, balance
from trace_unlearn.calibration.calibrate import calibrate, select_experts
from trace_unlearn.calibration.patterns import Patterns
from trace_unlearn.routing.profile import RoutingStatistics


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
    monkeypatch.setattr(patterns_module, "_SAMPLE", 1000)
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


def test_runs_and_chunks_give_the_same_bits(monkeypatch):
    """Twice on as many threads, and with rows compared in other chunks; on one thread the same but for rounding."""
    stats = statistics(N=20_000, L=4, E=16, k=4, skew=1.0, forget_tokens=10_000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first, again = (calibrate(stats, min_ess=0.9) for _ in range(2))
        monkeypatch.setattr(patterns_module, "_CHUNK", 77)
        chunks = calibrate(stats, min_ess=0.9)
        torch.set_num_threads(1)
        alone = calibrate(stats, min_ess=0.9)
    finally:
        torch.set_num_threads(before)
    for name in ("token_weight", "table", "weighted_r"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.equal(getattr(first, name), getattr(chunks, name))
    torch.testing.assert_close(alone.token_weight, first.token_weight, rtol=1e-6, atol=0)


def test_the_bound_on_the_sample_size_is_used_up_and_a_lower_one_matches_better():
    errors = []
    for bound in (0.9, 0.7, 0.5):
        found = calibrate(statistics(skew=3.0), min_ess=bound, experts_per_layer=None)
        assert bound <= found.ess < bound + 1e-4
        assert any("bound on the effective sample size is active" in note for note in found.notes)
        errors.append(found.mean_error)
    assert errors == sorted(errors, reverse=True)


def test_additive_matches_more_closely_than_any_other_rule_of_the_same_sample_size():
    errors = {}
    for rule in ("balance", "additive"):
        found = calibrate(statistics(skew=3.0), rule=rule, min_ess=0.6, experts_per_layer=None)
        assert found.ess == pytest.approx(0.6, abs=1e-4)
        errors[rule] = float(((found.weighted_r - found.f) ** 2).sum())
    assert errors["additive"] < 0.999 * errors["balance"]
