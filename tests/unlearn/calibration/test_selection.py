"""Which experts are selected, and how sure their frequencies are."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from made_statistics import statistics

from trace_unlearn.calibration.calibrate import calibrate, select_experts
from trace_unlearn.calibration.selection import RANKS, rank_values
from trace_unlearn.errors import UserError
from trace_unlearn.reporting import plots
from trace_unlearn.routing.profile import RoutingStatistics


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
