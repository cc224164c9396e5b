"""The metrics against hand-computed cases, brute force, and scipy where it is installed."""

import itertools
import math

import numpy as np
import pytest

from trace_unlearn.evaluation.metrics import (
    answer_probability,
    auc,
    exact_memorization,
    extraction_strength,
    forgotten,
    harmonic_mean,
    ks_p_value,
    min_k,
    option_probability,
    priv_leak,
    rouge_l,
    true_better,
    truth_ratio,
)


def test_rouge_l_counts_words_in_order_without_stemming():
    assert rouge_l("a b c d", "d c b a") == (1 / 4, 1 / 4)
    assert rouge_l("a b c d", "a x c y d z") == (3 / 4, pytest.approx(2 * 3 / (4 + 6)))
    assert rouge_l("the runner runs", "the runners ran") == (1 / 3, pytest.approx(1 / 3))  # a stemmer would say 2/3
    assert rouge_l("Été à Paris", "été, à paris!") == (1, 1)
    assert rouge_l("a b", "") == (0, 0)
    assert rouge_l("?", "a") == (0, 0)


def test_memorization_by_hand():
    assert exact_memorization([True, True, False, True]) == 3 / 4
    assert extraction_strength([True] * 5) == 1
    assert extraction_strength([False, True, True, True]) == 3 / 4  # the first token given, the rest follows
    assert extraction_strength([True, True, True, False]) == 0  # the published loop says 1/4
    assert math.isnan(extraction_strength([]))
    assert math.isnan(exact_memorization([]))


def test_min_k_takes_the_lowest_share_of_all_tokens():
    log_probs = [-1.0, -9.0, -2.0, -3.0, -4.0]
    assert min_k(log_probs, 0.4) == 6.5  # -9 and -4
    assert min_k(log_probs[:2], 0.4) == 9  # int(0.8) = 0 tokens would be NaN: the trap of short texts
    assert min_k(log_probs, 1.0) == pytest.approx(19 / 5)
    assert math.isnan(min_k([]))


def test_auc_by_pairs():
    rng = np.random.default_rng(0)
    high, low = rng.integers(0, 6, 30) + 1.0, rng.integers(0, 6, 20) * 1.0
    pairs = [(h > o) + 0.5 * (h == o) for h in high for o in low]
    assert auc(high, low) == pytest.approx(np.mean(pairs))
    assert auc([2.0], [1.0]) == 1
    assert auc(high, low) + auc(low, high) == pytest.approx(1)
    assert math.isnan(auc([math.nan], [1.0]))
    with pytest.raises(ValueError, match="got 0 and 1 values"):
        auc([], [1.0])


def test_measures_of_a_diverged_model_are_no_numbers():
    assert all(map(math.isnan, (harmonic_mean([math.nan, 0.0]), forgotten(math.nan), true_better(math.nan))))


def test_priv_leak_is_0_at_the_reference_and_minus_100_when_nothing_is_forgotten():
    remembered = auc([0.5, 0.6], [2.0, 3.0])  # every forget text is likelier, lower in Min-K, than any held-out one
    assert priv_leak(remembered, 0.5) == -100
    assert priv_leak(0.4772, 0.4772) == 0
    assert priv_leak(auc([5.0, 6.0], [2.0, 3.0]), 0.5) == 100  # over-unlearned
    with pytest.raises(ValueError, match="reference: got 0"):
        priv_leak(0.5, 0)


def test_truth_ratio_takes_the_mean_inside_exp():
    right, wrong = 1.0, [0.5, 3.5]
    assert truth_ratio(right, wrong) == pytest.approx(math.exp(-2.0) / math.exp(-1.0))
    legacy = np.mean(np.exp([-0.5, -3.5])) / math.exp(-1.0)
    assert abs(truth_ratio(right, wrong) - legacy) > 0.4
    assert (forgotten(0.25), forgotten(4.0), forgotten(1.0), forgotten(0.0)) == (0.25, 0.25, 1.0, 0.0)
    assert (true_better(0.25), true_better(4.0)) == (0.75, 0.0)
    assert answer_probability(0.0) == 1
    p = [math.exp(-nll) for nll in (1.0, 0.5, 3.5)]
    assert option_probability(1.0, [0.5, 3.5]) == pytest.approx(p[0] / sum(p))
    assert option_probability(2000.0, [1.0]) == pytest.approx(0)
    assert truth_ratio(2000.0, [1.0]) < math.inf


def test_harmonic_mean():
    assert harmonic_mean([0.5, 0.25, 1.0]) == pytest.approx(3 / 7)
    assert harmonic_mean([0.9] * 8 + [0.0]) == 0
    with pytest.raises(ValueError, match="numbers from 0"):
        harmonic_mean([])


def distance(a, b):
    return max(abs(np.mean(np.array(a) <= x) - np.mean(np.array(b) <= x)) for x in [*a, *b])


@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 3), (4, 4), (5, 3)])
def test_ks_p_value_counts_the_orders_that_are_as_far_apart(m, n):
    rng = np.random.default_rng(m * 10 + n)
    for _ in range(5):
        a, b = rng.normal(size=m), rng.normal(size=n)
        seen = distance(a, b)
        orders = list(itertools.combinations(range(m + n), m))
        apart = [distance(c, [x for x in range(m + n) if x not in c]) >= seen - 1e-12 for c in orders]
        assert ks_p_value(a, b) == pytest.approx(sum(apart) / len(orders))


def test_ks_p_value_keeps_the_digits_of_tiny_values():
    m = 40
    assert ks_p_value(range(m), range(100, 100 + m)) == pytest.approx(2 / math.comb(2 * m, m), rel=1e-12)
    assert ks_p_value([1.0, 2.0], [1.0, 2.0]) == 1
    with pytest.raises(ValueError, match="without NaN"):
        ks_p_value([math.nan], [1.0])


def test_ks_p_value_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for m, n, shift in ((30, 50, 0.5), (400, 400, 0.2), (400, 300, 1.5)):
        a, b = rng.normal(size=m), rng.normal(shift, size=n).round(2)
        expected = stats.ks_2samp(a, b, method="exact").pvalue
        assert ks_p_value(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    a, b = rng.normal(size=12_000), rng.normal(0.02, size=12_000)
    assert ks_p_value(a, b) == pytest.approx(stats.ks_2samp(a, b, method="asymp").pvalue, rel=0.05)
