"""Which targets no weights can meet, and why, in words."""

from __future__ import annotations

import logging

import torch

from trace_unlearn.calibration.patterns import Features
from trace_unlearn.errors import UserError

_TOGETHER = 1e-9  # of a share of tokens: two pairs that differ on less do not differ
_ALIKE = 1e-12  # of a variance: below it units do not differ
_GAP = 1e-3  # of a frequency: contradictions below it are not worth words
_NAMED = 5  # at most so many of a kind

logger = logging.getLogger(__name__)


def checked_pairs(selected: torch.Tensor, L: int, E: int) -> torch.Tensor:
    """As int64; UserError unless they are distinct (MoE layer, expert) pairs of the model."""
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


def reachable(selected: torch.Tensor, f: torch.Tensor, r: torch.Tensor, rule: str, notes: list[str]) -> torch.Tensor:
    """Without the pairs whose retain frequency no weights can change: r is 0, or 1. f and r are [L, E]."""
    if rule == "uniform":
        return selected
    if len(selected) == 0:
        raise UserError("selected: names no (layer, expert) pair; use rule 'uniform' for uniform weights")
    own_f, own_r = (frequency[selected[:, 0], selected[:, 1]] for frequency in (f, r))
    if bool((own_f == 0).any()):
        raise UserError(
            f"selected: no forget token activates (layer, expert) {selected[own_f == 0][0].tolist()}: it cannot be "
            "forget-critical"
        )
    never, always = own_r == 0, own_r == 1
    if bool((never | always).all()):
        which = f"no retain token ever activates {_pairs(selected[never])}" if bool(never.any()) else ""
        which += " and " if bool(never.any()) and bool(always.any()) else ""
        which += f"every retain token activates {_pairs(selected[always])}" if bool(always.any()) else ""
        raise UserError(
            f"selected: {which} (layer, expert): weights cannot change that. Use retain data nearer to the forget "
            "data, or more of it"
        )
    if bool(never.any()):
        notes.append(
            f"no retain token activates {_pairs(selected[never])} (layer, expert): dropped, no weight can reach them"
        )
    if bool(always.any()):
        notes.append(
            f"every retain token activates {_pairs(selected[always])} (layer, expert): dropped, no weight changes that"
        )
    for note in notes:
        logger.warning(note)
    return selected[~(never | always)]


def constant(features: Features, selected: torch.Tensor, unit: str, notes: list[str]) -> torch.Tensor:
    """[M] bool: the pairs that every unit activates equally often: no weights change their frequency."""
    found = features.covariance(torch.ones_like(features.counts)).diagonal() < _ALIKE
    if bool(found.any()):
        named = f"every retain {unit} activates {_pairs(selected[found])} (layer, expert) equally often"
        if bool(found.all()):
            raise UserError(
                f"selected: {named}: weights of unit {unit!r} cannot change that. Use unit 'token', or retain data "
                "that is more varied"
            )
        notes.append(f"{named}: dropped, no weight changes that")
        logger.warning(notes[-1])
    return found


def dependencies(features: Features, selected: torch.Tensor, f: torch.Tensor, unit: str) -> list[str]:
    """What contradicts or repeats what among the targets f [M] of `selected` [M, 2].

    Of all linear dependencies between features the usual ones are named: a target of 1, pairs that the same units hit,
    and whole layers of whose selected experts all units hit equally many.
    """
    notes: list[str] = []
    full = f == 1
    if bool(full.any()):
        notes.append(
            f"every forget token activates {_pairs(selected[full])} (layer, expert): only weights of 0 on all other "
            f"retain {unit}s would match that"
        )
    even = torch.ones_like(features.counts)
    mean, joint = features.frequencies(even), features.covariance(even)
    own = joint.diagonal()
    # E(a_i - a_j)^2 is 0.
    apart = own[:, None] + own[None, :] - 2 * joint + (mean[:, None] - mean[None, :]) ** 2
    for one, other in (apart < 2 * _TOGETHER).triu(1).nonzero()[:_NAMED].tolist():
        gap = abs(float(f[one] - f[other]))
        ask = (
            f"whose forget frequencies differ by {gap:.3f}: no weights match both"
            if gap > _GAP
            else "one of them says it"
        )
        notes.append(f"the same retain {unit}s activate {_pairs(selected[[one, other]])} (layer, expert), {ask}")
    for layer in torch.unique(selected[:, 0]).tolist():
        members = selected[:, 0] == layer
        hits = float(mean[members].sum())
        # Var(sum of the layer's hits) = 0: every unit hits equally many.
        if members.sum() > 2 and abs(float(joint[members][:, members].sum())) < _TOGETHER:
            gap = float(f[members].sum()) - hits
            tail = (
                f"and forget tokens {hits + gap:.3f}: no weights match all"
                if abs(gap) > _GAP
                else "one follows from the rest"
            )
            notes.append(
                f"every retain {unit} hits {hits:.4g} of the selected experts of layer {layer}"
                f"{'' if unit == 'token' else ' a token'}, {tail}"
            )
    return notes


def _pairs(selected: torch.Tensor) -> str:
    named = ", ".join(f"({layer}, {expert})" for layer, expert in selected[:_NAMED].tolist())
    return named if len(selected) <= _NAMED else f"{named} and {len(selected) - _NAMED} more"
