"""The verb `calibrate`: forget-critical experts, and retain weights that make them as active as on forget data."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trace_unlearn import files
from trace_unlearn.balance import Array, Patterns, balance, capped, log_scale
from trace_unlearn.errors import UserError
from trace_unlearn.profile import RoutingStatistics
from trace_unlearn.weights import Calibration, lookup, matching

__all__ = ["RULES", "CalibrateOptions", "Calibration", "calibrate", "main", "select_experts"]

RULES = ("balance", "product", "ratio", "uniform")
_MARGIN = 1e-6  # kept from the bounds, for the rounding of float32 weights

logger = logging.getLogger(__name__)


def select_experts(stats: RoutingStatistics, *, experts_per_layer: int | None = 4, tau: float = 1.0) -> torch.Tensor:
    """The forget-critical pairs: f > r and f >= tau * k / E, the highest f * log(f / r) of each layer.

    Args:
        stats: what `profile` saw.
        experts_per_layer: at most so many a layer; None for all that qualify.
        tau: 1 asks for at least the activation of a perfectly even routing.

    Returns:
        [M, 2] int64 (MoE layer, expert), by layer and then by expert; M may be 0.

    Example:
        >>> stats = RoutingStatistics(torch.tensor([[3, 1, 0]]), torch.tensor([[2, 2, 4]]), 4, 8, 1,
        ...                           torch.zeros(8, 1, 1, dtype=torch.uint8), torch.tensor([0, 8]))
        >>> select_experts(stats).tolist()
        [[0, 0]]
    """
    _check_selection(experts_per_layer, tau)
    f, r = _frequencies(stats)
    E = f.shape[1]
    qualifies = (f > r) & (f >= tau * stats.top_k / E)
    rank = torch.where(qualifies, f * torch.log(f / r), -torch.inf)  # infinite where r is 0
    best = rank.sort(dim=1, descending=True, stable=True).indices[:, :experts_per_layer]
    kept = torch.zeros_like(qualifies).scatter(1, best, True) & qualifies
    return kept.nonzero()


def calibrate(
    stats: RoutingStatistics,
    selected: torch.Tensor | None = None,
    *,
    rule: str = "balance",
    min_ess: float = 0.5,
    max_weight: float = 20.0,
    experts_per_layer: int | None = 4,
    tau: float = 1.0,
    ridge: float = 1e-6,
) -> Calibration:
    r"""Weights of the retain tokens, of mean 1, that bring the selected experts' frequencies nearer to the forget ones.

    - "balance": minimise mean(w log w) + ||weighted r - f||^2 / (2 ridge), subject to mean(w) = 1 and w <= max_weight,
      with the smallest ridge from `ridge` on for which the ESS is at least `min_ess` (see `trace_unlearn.balance`). Its
      weights are min(exp(mu + sum of lambda over the token's hits), max_weight).
    - "product": w proportional to the product of f / r over the token's hits.
    - "ratio": w proportional to the mean of f / r over the token's hits, 1 without hits.
    - "uniform": 1.

    "product" and "ratio" are cut at max_weight or at the lower cap that keeps `min_ess`, the mean brought back to 1.
    Deterministic, and the order of the tokens does not matter.

    Args:
        stats: what `profile` saw.
        selected: [M, 2] (MoE layer, expert); by default what `select_experts` takes with `experts_per_layer` and `tau`.
        rule: one of the above.
        min_ess: the least effective sample size, (sum w)^2 / (N sum w^2), in [0, 1). Exact matching costs most of it:
            this is the setting that matters.
        max_weight: the largest weight, above 1.
        experts_per_layer: see `select_experts`.
        tau: see `select_experts`.
        ridge: how much mismatch "balance" trades for even weights when the bounds allow everything.

    Raises:
        UserError: nothing selected, nothing of it reachable by retain data, a setting out of range; with advice.
    """
    _check_settings(rule, min_ess, max_weight, ridge)
    f_all, r_all = _frequencies(stats)
    L, E = f_all.shape
    notes: list[str] = []
    if selected is None:
        selected = select_experts(stats, experts_per_layer=experts_per_layer, tau=tau)
        if len(selected) == 0 and rule != "uniform":
            raise UserError(_nothing_selected(f_all, r_all, tau, stats.top_k))
    selected = _reachable(_checked_pairs(selected, L, E), f_all, r_all, rule, notes)
    f, r = (frequency[selected[:, 0], selected[:, 1]] for frequency in (f_all, r_all))
    hits = _hits(stats.retain_routes, selected)
    patterns = Patterns.of(hits, len(selected))

    # The table is rounded to float32 first and the scale found after it, so that a live lookup gives the same weights.
    values, ridge_used = _values(rule, patterns, f.numpy(), r.numpy(), ridge, min_ess, max_weight)
    phi, reduce = ("identity", "mean") if rule == "ratio" else ("exp", "sum")
    score = torch.from_numpy(patterns.scores(values))
    count = torch.from_numpy(patterns.bits.sum(axis=1).astype(np.float64))
    log_raw = lookup(score, count, phi, reduce, 1.0, math.inf).log().numpy() if phi == "identity" else score.numpy()
    cap = _float32_below(max_weight)
    if rule in ("product", "ratio"):
        cap = _cap_for_ess(patterns, log_raw, cap, min_ess)
    scale = math.exp(log_scale(log_raw, patterns.counts, cap))
    weight_of_pattern = lookup(score, count, phi, reduce, scale, cap).float()
    weights = weight_of_pattern[torch.from_numpy(patterns.token_pattern)]

    table, hit_table = torch.zeros(L, E), torch.zeros(L, E)
    table[selected[:, 0], selected[:, 1]] = torch.from_numpy(values).float()
    hit_table[selected[:, 0], selected[:, 1]] = 1.0
    packed = torch.from_numpy(hits)
    outcome = matching(weights, packed, f)
    _check_outcome(weights, outcome, min_ess, max_weight)
    notes += _diagnose(rule, outcome, f, r, weights, stats.retain_offsets, ridge_used, ridge, min_ess)
    return Calibration(
        rule=rule,
        phi=phi,
        reduce=reduce,
        table=table,
        hit_table=hit_table,
        clip=cap,
        scale=scale,
        selected=selected,
        f=f,
        r=r,
        token_weight=weights,
        retain_offsets=stats.retain_offsets.clone(),
        hits=packed,
        retain_fingerprint=str(stats.meta.get("retain_fingerprint", "")),
        choices={
            "min_ess": min_ess,
            "max_weight": max_weight,
            "experts_per_layer": experts_per_layer,
            "tau": tau,
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


def _values(
    rule: str, patterns: Patterns, f: Array, r: Array, ridge: float, min_ess: float, max_weight: float
) -> tuple[Array, float | None]:
    """The table's entries at the selected pairs, as float32 can hold them, and the ridge that gave them."""
    ridge_used = None
    if rule == "balance":
        bound = min_ess + _MARGIN if min_ess > 0 else 0.0
        found = balance(patterns, f, ridge=ridge, min_ess=bound, cap=_float32_below(max_weight))
        values, ridge_used = found.coefficients, found.ridge
    elif rule == "product":
        values = np.log(f / r)
    elif rule == "ratio":
        values = f / r
    else:
        values = np.zeros(len(f))
    return values.astype(np.float32).astype(np.float64), ridge_used


def _cap_for_ess(patterns: Patterns, log_raw: Array, cap: float, min_ess: float) -> float:
    """The largest cap up to `cap` that keeps the ESS: the lower the cap, the more even the weights."""

    def ess(tried: float) -> float:
        return patterns.ess(capped(log_raw, log_scale(log_raw, patterns.counts, tried), tried))

    if ess(cap) >= min_ess + _MARGIN:
        return cap
    low, high = 1.0, cap
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ess(middle) >= min_ess + _MARGIN else (low, middle)
    return _float32_below(low)


def _hits(routes: torch.Tensor, selected: torch.Tensor) -> npt.NDArray[np.uint8]:
    """[N, ceil(M / 8)]: which selected pairs each token activates, packed."""
    array = routes.numpy()
    columns = [(array[:, layer, :] == expert).any(axis=1) for layer, expert in selected.tolist()]
    bits = np.stack(columns, axis=1) if columns else np.zeros((len(array), 0), dtype=bool)
    return np.packbits(bits, axis=1)


def _frequencies(stats: RoutingStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    if stats.forget_tokens < 1 or stats.retain_tokens < 1:
        raise UserError("statistics: hold no forget or no retain tokens; profile data that bears loss")
    return stats.forget_frequency, stats.retain_frequency


def _check_selection(experts_per_layer: int | None, tau: float) -> None:
    if experts_per_layer is not None and experts_per_layer < 1:
        raise UserError(f"experts_per_layer: got {experts_per_layer}, allowed is 1 or more (or null for all)")
    if not 0 <= tau < math.inf:
        raise UserError(f"tau: got {tau}, allowed are finite numbers from 0")


def _check_settings(rule: str, min_ess: float, max_weight: float, ridge: float) -> None:
    if rule not in RULES:
        raise UserError(f"rule: got {rule!r}, allowed: {', '.join(map(repr, RULES))}")
    if not 0 <= min_ess < 1:
        raise UserError(
            f"min_ess: got {min_ess}, allowed is 0 <= min_ess < 1 (a share of the retain tokens); only uniform weights "
            "reach 1, use rule 'uniform' for them"
        )
    if not 1.0001 <= max_weight < math.inf:
        raise UserError(f"max_weight: got {max_weight}, allowed are finite numbers above 1: the mean weight is 1")
    if not 0 < ridge < 1e6:
        raise UserError(f"ridge: got {ridge}, allowed is above 0 and below 1e6")


def _checked_pairs(selected: torch.Tensor, L: int, E: int) -> torch.Tensor:
    if selected.dim() != 2 or selected.shape[1] != 2 or selected.is_floating_point():
        raise UserError(f"selected: got {selected.dtype} {list(selected.shape)}, allowed is integer [M, 2]")
    selected = selected.long()
    inside = (selected >= 0) & (selected < torch.tensor([L, E]))
    if not bool(inside.all()):
        pair = selected[~inside.all(dim=1)][0].tolist()
        raise UserError(f"selected: got (layer, expert) {pair}, allowed are layers below {L} and experts below {E}")
    if len(torch.unique(selected, dim=0)) != len(selected):
        raise UserError("selected: has a (layer, expert) pair more than once")
    return selected


def _reachable(selected: torch.Tensor, f: torch.Tensor, r: torch.Tensor, rule: str, notes: list[str]) -> torch.Tensor:
    """Without the pairs that no retain token activates: no weight can bring retain data to them."""
    if rule == "uniform":
        return selected
    if len(selected) == 0:
        raise UserError("selected: names no (layer, expert) pair; use rule 'uniform' for uniform weights")
    unused = [pair for pair in selected.tolist() if f[pair[0], pair[1]] == 0]
    if unused:
        raise UserError(
            f"selected: no forget token activates (layer, expert) {unused[0]}: it cannot be forget-critical"
        )
    reached = r[selected[:, 0], selected[:, 1]] > 0
    lost = ", ".join(f"({layer}, {expert})" for layer, expert in selected[~reached].tolist())
    if not bool(reached.any()):
        raise UserError(
            f"selected: no retain token ever activates {lost} (layer, expert): weights cannot change that. Use retain "
            "data nearer to the forget data, or more of it"
        )
    if lost:
        notes.append(f"no retain token activates {lost} (layer, expert): dropped, no weight can reach them")
        logger.warning(notes[-1])
    return selected[reached]


def _nothing_selected(f: torch.Tensor, r: torch.Tensor, tau: float, top_k: int) -> str:
    E = f.shape[1]
    if not bool((f > r).any()):
        return "no expert is forget-critical: forget and retain data activate every expert equally often"
    highest = float(torch.where(f > r, f, 0).max()) * E / top_k
    return (
        f"no expert is forget-critical: none has f > r and f >= tau * k / E = {tau * top_k / E:.4f}. Lower tau (now "
        f"{tau}) to {math.floor(1000 * highest) / 1000} or less"
    )


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
    elif rule == "balance" and outcome["max_error"] > 0.01:
        notes.append("no weights up to max_weight match all frequencies together; these come nearest")
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
    groups = len(np.unique(positions))
    if variance < 1e-12 or len(w) < 2 * groups:
        return 0.0
    sizes = np.bincount(positions)
    means = np.bincount(positions, w) / np.maximum(sizes, 1)
    between = float((sizes * (means - w.mean()) ** 2).sum() / (len(w) * variance))
    chance = (groups - 1) / (len(w) - 1)
    return max(0.0, (between - chance) / (1 - chance))


@dataclass
class CalibrateOptions:
    """Finds the forget-critical experts and weights the retain tokens so that these experts are kept in use.

    Args:
        profile: the folder that `profile` wrote.
        output: the folder to write; must not exist.
        rule: how weights follow from frequencies: "balance", "product", "ratio" or "uniform".
        experts_per_layer: at most so many forget-critical experts a layer; null for all that qualify.
        tau: an expert qualifies from tau times the activation of a perfectly even routing on.
        min_ess: the least effective sample size of the weights, as a share of the retain tokens.
        max_weight: the largest weight; the mean is 1.
        ridge: how much mismatch "balance" trades for even weights when the bounds allow everything.
    """

    profile: str = "profile"
    output: str = "calibration"
    rule: str = "balance"
    experts_per_layer: int | None = 4
    tau: float = 1.0
    min_ess: float = 0.5
    max_weight: float = 20.0
    ridge: float = 1e-6


def check(options: CalibrateOptions) -> None:
    """UserError for what can be told from the options alone."""
    _check_settings(options.rule, options.min_ess, options.max_weight, options.ridge)
    _check_selection(options.experts_per_layer, options.tau)


def main(options: CalibrateOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb: reads the statistics, calibrates, prints the outcome, writes the folder `options.output`."""
    check(options)
    files.refuse_existing(options.output)
    say(f"calibrate: {options.profile}, rule {options.rule} -> {options.output}")
    stats = RoutingStatistics.load(options.profile)
    found = calibrate(
        stats,
        rule=options.rule,
        min_ess=options.min_ess,
        max_weight=options.max_weight,
        experts_per_layer=options.experts_per_layer,
        tau=options.tau,
        ridge=options.ridge,
    )
    say(found.summary())
    found.save(options.output)
    say(f"written to {options.output}")
