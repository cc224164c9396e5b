"""Which arms are compared with which, as the protocol lists them."""

from __future__ import annotations

from dataclasses import dataclass

from studies.method_study.cells import Arm
from studies.units.cells import (
    DOCUMENT,
    EXPERTS,
    FACTS,
    MANUALS,
    NPO,
    STRONG,
    at,
    by,
    mild,
    oracle,
    other_domain,
    shuffled,
    uniform,
)

A, N, ACCURACY = ("A_accuracy", "A_nll"), ("N_accuracy", "N_nll"), ("A_accuracy", "N_accuracy", "R_accuracy")


@dataclass(frozen=True)
class Contrast:
    """One arm against another; `families`: by family, the measures that it tests."""

    arm: Arm
    against: Arm
    families: tuple[tuple[str, tuple[str, ...]], ...] = ()


def _tested(arm: Arm, against: Arm) -> Contrast:
    return Contrast(arm, against, (("primary", A), ("secondary", N)))


def _confirmed(arm: Arm, against: Arm) -> Contrast:
    return Contrast(arm, against, (("confirmations", ACCURACY),))


_MANUAL = by("document", MANUALS)
TESTED = [
    *(_tested(DOCUMENT, other) for other in (uniform(FACTS), shuffled(FACTS), by("token", FACTS), other_domain(FACTS))),
    _tested(by("context", FACTS), uniform(FACTS)),
    *(_tested(by("document", NPO), other) for other in (uniform(NPO), shuffled(NPO))),
    _tested(by("document", STRONG), uniform(STRONG)),
    *(_tested(_MANUAL, other) for other in (uniform(MANUALS), shuffled(MANUALS), by("token", MANUALS))),
]
CONFIRMED = [
    _confirmed(arm, uniform(at(weight, MANUALS))) for arm in (by("token", MANUALS), _MANUAL) for weight in (16.0, 32.0)
]
DESCRIBED = [
    Contrast(arm, against)
    for arm, against in (
        (by("token", FACTS), uniform(FACTS)),
        (by("context", FACTS), DOCUMENT),
        (shuffled(FACTS), uniform(FACTS)),
        (other_domain(FACTS), uniform(FACTS)),
        (oracle(FACTS), uniform(FACTS)),
        (oracle(FACTS), DOCUMENT),
        (mild(FACTS), uniform(FACTS)),
        (mild(FACTS), by("token", FACTS)),
        (mild(FACTS), DOCUMENT),
        (uniform(STRONG), uniform(FACTS)),
        (by("token", STRONG), uniform(STRONG)),
        (DOCUMENT, uniform(STRONG)),
        *((at(weight, DOCUMENT), uniform(at(weight, FACTS))) for weight in (2.0, 16.0, 64.0)),
        (by("document", EXPERTS), uniform(EXPERTS)),
        (by("token", NPO), uniform(NPO)),
        (by("context", NPO), uniform(NPO)),
        (by("document", NPO), by("token", NPO)),
        (shuffled(NPO), uniform(NPO)),
        (by("document", at(32.0, NPO)), uniform(at(32.0, NPO))),
        (uniform(at(32.0, NPO)), uniform(NPO)),
        (by("token", MANUALS), uniform(MANUALS)),
        (by("context", MANUALS), uniform(MANUALS)),
        (by("context", MANUALS), _MANUAL),
        (shuffled(MANUALS), uniform(MANUALS)),
        (other_domain(MANUALS), uniform(MANUALS)),
        (_MANUAL, other_domain(MANUALS)),
        *((at(weight, _MANUAL), uniform(at(weight, MANUALS))) for weight in (4.0, 16.0, 32.0)),
        *((uniform(at(weight, MANUALS)), uniform(MANUALS)) for weight in (4.0, 16.0, 32.0)),
        (at(4.0, _MANUAL), uniform(MANUALS)),
        (at(16.0, _MANUAL), uniform(at(32.0, MANUALS))),
    )
]
CONTRASTS = [*TESTED, *CONFIRMED, *DESCRIBED]
# The frontier: arms over retain weights, by name of the panel.
FRONTIER: dict[str, dict[str, list[Arm]]] = {
    "facts, GradDiff": {
        "uniform": [uniform(at(w, FACTS)) for w in (2.0, 8.0, 16.0, 32.0, 64.0)],
        "document": [at(w, DOCUMENT) for w in (2.0, 8.0, 16.0, 32.0, 64.0)],
        "token": [by("token", at(w, FACTS)) for w in (8.0, 32.0)],
    },
    "facts, NPO": {
        "uniform": [uniform(at(w, NPO)) for w in (8.0, 32.0)],
        "document": [by("document", at(w, NPO)) for w in (8.0, 32.0)],
    },
    "manuals, GradDiff": {
        "uniform": [uniform(at(w, MANUALS)) for w in (4.0, 8.0, 16.0, 32.0)],
        "document": [at(w, _MANUAL) for w in (4.0, 8.0, 16.0, 32.0)],
        "token": [by("token", MANUALS)],
    },
}
