"""Whether a model has forgotten and whether it has kept the rest, in one sentence, from measures before and after.

The rules are few and fixed, so that they can be stated: `docs/evaluation.md` repeats them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trace_unlearn.evaluation.scores import NAMES

KNOWN = 0.1  # facts count where the base model knows at least this share of them
FEW, MANY = 0.1, 0.5  # shares of the known facts that are lost
SMALL, LARGE = 0.1, 1.0  # rises of the NLL in nats per token
RECITED = 0.5  # a text of which more tokens are recited is not forgotten

MORE_FORGETTING = "raise the learning rate or the number of steps"
MORE_KEEPING = "raise alpha, the weight of the retain loss, or stop earlier (stop_retain_increase)"
BOTH = "raise alpha, the weight of the retain loss, and try another objective, such as npo"
DIVERGED = "lower the learning rate"


@dataclass(frozen=True)
class Verdict:
    """What an unlearned model amounts to.

    Attributes:
        forgotten: "yes", "partly" or "no".
        kept: likewise.
        sentence: both with the measures that decided, and what to change where one of them is not "yes".
    """

    forgotten: str
    kept: str
    sentence: str


def verdict(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Compares what a base model and the model made from it know.

    Of data with answers of which the base model knows at least a tenth, the share of facts decides: forgotten is "yes"
    where at most half of what it knew is left, "no" where more than nine tenths are; kept is "yes" where at least nine
    tenths are left, "no" where at most half are. Of other data the mean NLL decides: forgotten is "yes" where it has
    risen by at least 1 nat per token and at most half of the tokens are recited (exact memorization), "no" where it has
    risen by less than 0.1; kept is "yes" where it has risen by at most 0.1, "no" by 1 or more. Between lies "partly".

    Args:
        before: what `evaluate` measured of the base model: at least "forget" and "retain", each with its nll.
        after: likewise of the unlearned model.

    >>> base = {"forget": {"nll": 0.1, "fact_accuracy": 1.0}, "retain": {"nll": 0.1, "fact_accuracy": 1.0}}
    >>> found = verdict(base, {**base, "forget": {"nll": 0.1, "fact_accuracy": 1.0}})
    >>> found.forgotten, found.kept
    ('no', 'yes')
    >>> print(found.sentence)
    NOT FORGOTTEN (forget set: fact accuracy 1.000 -> 1.000), kept (retain set: fact accuracy 1.000 -> 1.000); to \
forget more, raise the learning rate or the number of steps.
    """
    losses = [after[name].get("nll") for name in ("forget", "retain")]
    if any(nll is None or not math.isfinite(nll) for nll in losses):
        return Verdict("no", "no", f"The model has DIVERGED: it gives no numbers; {DIVERGED}.")
    forgotten, shown = _forgotten(before["forget"], after["forget"])
    kept, shown_kept = _kept(before["retain"], after["retain"])
    words = {"yes": "Forgotten", "partly": "PARTLY FORGOTTEN", "no": "NOT FORGOTTEN"}
    words_kept = {"yes": "kept", "partly": "PARTLY KEPT", "no": "NOT KEPT"}
    sentence = f"{words[forgotten]} (forget set: {shown}), {words_kept[kept]} (retain set: {shown_kept})"
    if forgotten != "yes" and kept != "yes":
        sentence += f"; {BOTH}"
    elif forgotten != "yes":
        sentence += f"; to forget more, {MORE_FORGETTING}"
    elif kept != "yes":
        sentence += f"; to keep more, {MORE_KEEPING}"
    return Verdict(forgotten, kept, f"{sentence}.")


def verdicts(checkpoints: Mapping[str, Mapping[str, Any]], base: str | None) -> dict[str, Verdict]:
    """The verdict on each checkpoint but the base, where the base was measured."""
    if base is None or base not in checkpoints:
        return {}
    return {name: verdict(checkpoints[base], found) for name, found in checkpoints.items() if name != base}


def _forgotten(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str]:
    if _has_facts(before, after):
        left, shown = _facts(before, after)
        return ("yes" if left <= 1 - MANY else "no" if left > 1 - FEW else "partly"), shown
    rise, shown = _rise(before, after)
    recited = after.get("exact_memorization")
    if recited is not None:
        shown += f", {NAMES['exact_memorization']} {before.get('exact_memorization') or 0:.3f} -> {recited:.3f}"
    gone = rise >= LARGE and (recited is None or recited <= RECITED)
    return ("yes" if gone else "no" if rise < SMALL else "partly"), shown


def _kept(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, str]:
    if _has_facts(before, after):
        left, shown = _facts(before, after)
        return ("yes" if left >= 1 - FEW else "no" if left <= 1 - MANY else "partly"), shown
    rise, shown = _rise(before, after)
    return ("yes" if rise <= SMALL else "no" if rise >= LARGE else "partly"), shown


def _has_facts(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return (before.get("fact_accuracy") or 0.0) >= KNOWN and after.get("fact_accuracy") is not None


def _facts(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, str]:
    """The share of the known facts that is left; rounded, since both are counts over the same number."""
    had, has = before["fact_accuracy"], after["fact_accuracy"]
    return round(has / had, 9), f"{NAMES['fact_accuracy']} {had:.3f} -> {has:.3f}"


def _rise(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, str]:
    rise = round(after["nll"] - before["nll"], 9)
    return rise, f"{NAMES['nll']} {before['nll']:.3f} -> {after['nll']:.3f}"
