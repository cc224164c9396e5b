"""Forget-critical experts, and retain weights that make them as active as on forget data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

import trace_kernels as tk
from trace_unlearn.calibration.averages import of_contexts, of_documents
from trace_unlearn.calibration.balance import DISTANCES, balance
from trace_unlearn.calibration.feasible import checked_pairs, constant, dependencies, reachable
from trace_unlearn.calibration.patterns import Features, Patterns
from trace_unlearn.calibration.selection import (
    Selection,
    effective_tokens,
    frequencies,
    select_experts,
    wilson_interval,
)
from trace_unlearn.calibration.weights import Calibration, Made, lookup, matching
from trace_unlearn.errors import UserError
from trace_unlearn.routing.statistics import DEFAULT_UNIT, UNITS, RoutingStatistics

__all__ = ["RULES", "Calibration", "calibrate", "check_settings", "select_experts"]

RULES = ("balance", "additive", "product", "ratio", "uniform", "shuffled")
FORMS = {"additive": ("linear", "sum"), "ratio": ("identity", "mean")}  # phi and reduce, where not ("exp", "sum")
_MARGIN = 1e-6  # kept from the bounds, for the rounding of float32 weights


def calibrate(
    stats: RoutingStatistics,
    selected: torch.Tensor | None = None,
    *,
    rule: str = "balance",
    unit: str = DEFAULT_UNIT,
    min_ess: float = 0.5,
    max_weight: float = 20.0,
    experts_per_layer: int | None = 4,
    tau: float = 1.0,
    rank: str = "log_ratio",
    threshold: float | None = None,
    max_experts: int | None = None,
    min_count: int = 5,
    ridge: float = 1e-6,
) -> Calibration:
    r"""Weights of the retain tokens, of mean 1, that bring the selected experts' frequencies nearer to the forget ones.

    - "balance": minimise mean(w log w) + ||weighted r - f||^2 / (2 ridge), subject to mean(w) = 1 and w <= max_weight,
      with the smallest ridge from `ridge` on for which the ESS is at least `min_ess` (see
      `trace_unlearn.calibration.balance`).
      Its weights are min(exp(mu + sum of lambda over the token's hits), max_weight).
    - "additive": likewise with mean(w^2) / 2 in place of mean(w log w). Its weights are linear in the hits,
      min(max(mu + sum of lambda over the token's hits, 0), max_weight): no weights of the same ESS have a smaller
      squared mismatch, but a token may lose all its weight.
    - "product": w proportional to the product of f / r over the token's hits.
    - "ratio": w proportional to the mean of f / r over the token's hits, 1 without hits.
    - "uniform": 1.
    - "shuffled": the control: the weights of "balance", each given to a random token (of unit "document": document).

    The `unit` says whose routing a weight looks at. A token's loss back-propagates through the experts of all the
    positions that its attention reads, so its own routing is one of many that it touches.

    - "token": the hits of the token itself.
    - "context": the mean hits of the positions that its loss reads, itself and those before it: of the prompt, too, and
      of a sliding window where no layer reads more. Every token has a weight of its own. The frequencies that are to
      match, f and r, are then the means of these means over the counted tokens of either side. It needs a profile that
      was made for it.
    - "document": the mean hits of its document's counted tokens, which all have the same weight; a window of a long
      text is a document. What is minimised is the same, a mean over tokens, under that restriction. "balance" is then
      exp of, and "additive" linear in, the mean of the tokens' scores; "product" is the geometric mean of the tokens'
      products; "ratio" is the mean of f / r over all hits of the document, 1 without hits.

    "product" and "ratio" are cut at max_weight or at the lower cap that keeps `min_ess`, the mean brought back to 1.
    Deterministic, and the order of the tokens does not matter.

    Args:
        stats: what `profile` saw.
        selected: [M, 2] (MoE layer, expert); by default what `select_experts` takes with the settings below.
        rule: one of the above.
        unit: "token", "context" or "document".
        min_ess: the least effective sample size, (sum w)^2 / (N sum w^2), in [0, 1). Exact matching costs most of it:
            this is the setting that matters. It is that of the tokens for every unit, so that the same bound allows
            every unit the same contrast, the mean of w^2; what it is in documents is reported beside it.
        max_weight: the largest weight, above 1.
        experts_per_layer: this and the next five: see `trace_unlearn.calibration.selection.Selection`.
        tau: least activation.
        rank: the rule.
        threshold: least rank value.
        max_experts: at most so many in all.
        min_count: fewest forget tokens.
        ridge: how much mismatch "balance" trades for even weights when the bounds allow everything.

    Raises:
        UserError: nothing selected, nothing of it reachable by retain data, a setting out of range; with advice.
    """
    check_settings(rule, unit, min_ess, max_weight, ridge)
    _check_unit(rule, unit, stats)
    shuffle = rule == "shuffled"
    rule = "balance" if shuffle else rule
    selection = Selection(experts_per_layer, tau, rank, threshold, max_experts, min_count)
    f_all, r_all = frequencies(stats)
    f_tokens_all, r_tokens_all = (effective_tokens(stats, side) for side in ("forget", "retain"))
    contexts = stats.contexts if unit == "context" else None
    if contexts is not None:
        f_all, r_all = contexts.forget_sums / stats.forget_tokens, contexts.retain_sums / stats.retain_tokens
        f_tokens_all, r_tokens_all = (
            torch.full_like(sums, tokens) if effect is None else tokens / effect.double()
            for sums, tokens, effect in (
                (f_all, stats.forget_tokens, contexts.forget_design_effect),
                (r_all, stats.retain_tokens, contexts.retain_design_effect),
            )
        )
    L, E = f_all.shape
    notes: list[str] = []
    if selected is None:
        selected = selection.take(stats)
        if len(selected) == 0 and rule != "uniform":
            raise UserError(selection.why_empty(stats))
    selected = reachable(checked_pairs(selected, L, E), f_all, r_all, rule, notes)
    hits, features = _features(stats, selected, unit)
    if rule in DISTANCES and unit != "token":
        alike = constant(features.thinned(), selected, unit, notes)
        if bool(alike.any()):
            selected = selected[~alike]
            hits, features = _features(stats, selected, unit)
    f, r, f_tokens, r_tokens = (
        values[selected[:, 0], selected[:, 1]] for values in (f_all, r_all, f_tokens_all, r_tokens_all)
    )
    if rule in DISTANCES:
        notes += dependencies(features if unit == "token" else features.thinned(), selected, f, unit)

    # The table is rounded to float32 first and the scale found after it, so that a live lookup gives the same weights.
    values, ridge_used = _values(rule, features, f, r, ridge, min_ess, max_weight)
    phi, reduce = FORMS.get(rule, ("exp", "sum"))
    score = features.scores(values)
    count = features.scores(torch.ones_like(values))
    cap = _float32_below(max_weight)
    if phi == "linear":
        scale = DISTANCES[rule].scale(score, features.counts, cap)
    else:
        log_raw = lookup(score, count, phi, reduce, 1.0, math.inf).log() if phi == "identity" else score
        if rule in ("product", "ratio"):
            cap = _cap_for_ess(features, log_raw, cap, min_ess)
        scale = math.exp(DISTANCES["balance"].scale(log_raw, features.counts, cap))
    weights = lookup(score, count, phi, reduce, scale, cap).float()[features.token_row]

    table, hit_table = (torch.zeros(L, E, dtype=torch.float32) for _ in range(2))
    table[selected[:, 0], selected[:, 1]] = values.float()
    hit_table[selected[:, 0], selected[:, 1]] = 1.0
    counted, window = (None, None) if contexts is None else (contexts.counted, contexts.window)
    made = Made(unit, hits, stats.retain_offsets, counted, window)
    outcome = matching(weights, f, made)
    _check_outcome(weights, outcome, min_ess, max_weight)
    notes += _diagnose(rule, outcome, f, r, weights, stats.retain_offsets, ridge_used, ridge, min_ess)
    found = Calibration(
        rule=rule,
        unit=unit,
        phi=phi,
        reduce=reduce,
        table=table,
        hit_table=hit_table,
        clip=cap,
        scale=scale,
        selected=selected,
        f=f,
        r=r,
        f_interval=wilson_interval(f, f_tokens),
        r_interval=wilson_interval(r, r_tokens),
        token_weight=weights,
        retain_offsets=stats.retain_offsets.clone(),
        hits=hits,
        counted=counted,
        retain_fingerprint=str(stats.meta.get("retain_fingerprint", "")),
        choices={
            **({} if contexts is None else {"attention_window": window}),
            "min_ess": min_ess,
            "max_weight": max_weight,
            **dataclasses.asdict(selection),
            "intervals_by_document": stats.retain_design_effect is not None,
            "ridge": ridge,
            "ridge_used": ridge_used,
            "layer_indices": stats.meta.get("layer_indices"),
            "model": stats.meta.get("model"),
            "model_type": stats.meta.get("model_type"),
            "forget_fingerprint": stats.meta.get("forget_fingerprint"),
        },
        notes=notes,
        **outcome,
    )
    return found.shuffled(0) if shuffle else found


def _features(stats: RoutingStatistics, selected: torch.Tensor, unit: str) -> tuple[torch.Tensor, Features]:
    """The hits [N, ceil(M / 8)] of the retain tokens (of contexts: [P, ...]), and what the solver sees of them."""
    E = stats.retain_counts.shape[1]
    _, hits = tk.route_hits(stats.retain_routes, selected, E)
    if unit == "context":
        assert stats.contexts is not None
        counted, prompts = stats.contexts.counted, stats.contexts.prompt_routes
        if len(prompts):
            own, hits = hits, torch.empty(len(counted), hits.shape[1], dtype=torch.uint8)
            hits[counted] = own
            hits[~counted] = tk.route_hits(prompts, selected, E)[1]
        return hits, of_contexts(hits, counted, stats.retain_offsets, stats.contexts.window, len(selected))
    if unit == "document":
        return hits, of_documents(hits, stats.retain_offsets, len(selected))
    return hits, Patterns.of(hits, len(selected))


def _values(
    rule: str,
    features: Features,
    f: torch.Tensor,
    r: torch.Tensor,
    ridge: float,
    min_ess: float,
    max_weight: float,
) -> tuple[torch.Tensor, float | None]:
    """The table's entries at the selected pairs, as float32 can hold them, and the ridge that gave them."""
    ridge_used = None
    if rule in DISTANCES:
        bound = min_ess + _MARGIN if min_ess > 0 else 0.0
        found = balance(features, f, ridge=ridge, min_ess=bound, cap=_float32_below(max_weight), rule=rule)
        values, ridge_used = found.coefficients, found.ridge
    elif rule == "product":
        values = (f / r).log()
    elif rule == "ratio":
        values = f / r
    else:  # "uniform"
        values = torch.zeros_like(f)
    return values.float().double(), ridge_used


def _cap_for_ess(features: Features, log_raw: torch.Tensor, cap: float, min_ess: float) -> float:
    """The largest cap up to `cap` that keeps the ESS: the lower the cap, the more even the weights."""
    exponential = DISTANCES["balance"]

    def keeps(tried: float) -> bool:
        mu = exponential.scale(log_raw, features.counts, tried)
        return features.ess(exponential.weights(log_raw + mu, tried)) >= min_ess + _MARGIN

    if keeps(cap):
        return cap
    low, high = 1.0, cap
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return _float32_below(low)


def _check_unit(rule: str, unit: str, stats: RoutingStatistics) -> None:
    """UserError where the statistics do not hold what the unit needs."""
    if unit == "context" and stats.contexts is None:
        raise UserError(
            "unit: got 'context', but the profile does not hold what the contexts of tokens activate; profile again "
            "with unit 'context'"
        )
    if unit == "document" and rule != "uniform":
        bearing = int((stats.retain_offsets.diff() > 0).sum())
        if bearing == 1:
            raise UserError(
                "unit: got 'document', but the retain set has one document with counted tokens: all its tokens share "
                "one weight, which is 1. Use more documents, a smaller max_length (a window of a long text is a "
                "document), or unit 'token'"
            )


def check_settings(rule: str, unit: str, min_ess: float, max_weight: float, ridge: float) -> None:
    if rule not in RULES:
        raise UserError(f"rule: got {rule!r}, allowed: {', '.join(map(repr, RULES))}")
    if unit not in UNITS:
        raise UserError(f"unit: got {unit!r}, allowed: {', '.join(map(repr, UNITS))}")
    if not 0 <= min_ess <= 0.9999:
        raise UserError(
            f"min_ess: got {min_ess}, allowed is 0 <= min_ess <= 0.9999 (a share of the retain tokens); only uniform "
            "weights reach 1, use rule 'uniform' for them"
        )
    if not 1.0001 <= max_weight < math.inf:
        raise UserError(f"max_weight: got {max_weight}, allowed are finite numbers above 1: the mean weight is 1")
    if not 0 < ridge < 1e6:
        raise UserError(f"ridge: got {ridge}, allowed is above 0 and below 1e6")


def _float32_below(value: float) -> float:
    """The largest float32 that is not above `value`."""
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(0)))


def _check_outcome(weights: torch.Tensor, outcome: dict[str, Any], min_ess: float, max_weight: float) -> None:
    mean = float(weights.double().mean())
    if not (abs(mean - 1) < 1e-5 and outcome["ess"] >= min_ess and outcome["largest_weight"] <= max_weight):
        raise UserError(
            f"the bounds cannot be kept together: mean weight {mean:.6f}, effective sample size {outcome['ess']:.4f} "
            f"(min_ess {min_ess}), largest weight {outcome['largest_weight']:.4f} (max_weight {max_weight}); lower "
            "min_ess or raise max_weight"
        )


def _diagnose(
    rule: str,
    outcome: dict[str, Any],
    f: torch.Tensor,
    r: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    ridge_used: float | None,
    ridge: float,
    min_ess: float,
) -> list[str]:
    notes = []
    bound_active = ridge_used is not None and ridge_used > ridge and outcome["ess"] < min_ess + 1e-3
    if bound_active:
        notes.append("the bound on the effective sample size is active: a lower min_ess would match more closely")
    elif rule in DISTANCES and outcome["max_error"] > 0.01:
        notes.append(
            f"no weights up to max_weight match all frequencies together (largest error {outcome['max_error']:.3f}); "
            "these come nearest in the sum of squares"
        )
    if rule != "uniform" and outcome["mean_error"] > float((f - r).abs().mean()):
        notes.append(f"rule {rule!r} matches worse than uniform weights do; try rule 'balance'")
    if outcome["ess"] < 0.3:
        notes.append(f"few tokens carry the retain loss (effective sample size {outcome['ess']:.2f}); raise min_ess")
    share = _share_of_position(weights, offsets)
    if share > 0.5:
        notes.append(
            f"the position in its document explains {share:.0%} of the variance of a token's weight: the routing seems "
            "to tell document formats apart, not content; give forget and retain data the same format"
        )
    return notes


def _share_of_position(weights: torch.Tensor, offsets: torch.Tensor) -> float:
    """How much of the weights' variance the position among its document's tokens explains, beyond chance."""
    w = weights.double().numpy()
    starts = offsets.numpy()
    positions = np.arange(len(w)) - np.repeat(starts[:-1], np.diff(starts))
    variance = w.var()
    sizes = np.bincount(positions)
    groups = np.count_nonzero(sizes)
    if variance < 1e-12 or len(w) < 2 * groups:
        return 0.0
    means = np.bincount(positions, w) / np.maximum(sizes, 1)
    between = float((sizes * (means - w.mean()) ** 2).sum() / (len(w) * variance))
    chance = (groups - 1) / (len(w) - 1)
    return max(0.0, (between - chance) / (1 - chance))
