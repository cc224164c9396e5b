"""The arms of the study in the order of its protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from studies.method_study.cells import ORACLE, SHUFFLED, Arm

SEEDS = range(12, 24)
RANGES = {"facts": (0.5, 2.5), "manuals": (0.5, 2.0)}  # of forget NLL above the start, to compare over
FEW = 6  # models of the cells that only describe

FACTS, MANUALS = Arm(), Arm(corpus="manuals")
DOCUMENT = replace(FACTS, unit="document")


def uniform(like: Arm) -> Arm:
    return like.baseline


def by(unit: str, like: Arm) -> Arm:
    return replace(like, unit=unit)


def shuffled(like: Arm) -> Arm:
    """Document weights, each on a random document."""
    return replace(like, unit="document", weights=SHUFFLED)


def other_domain(like: Arm) -> Arm:
    return replace(like, unit="document", forget_from="other")


def oracle(like: Arm) -> Arm:
    return replace(like, unit="document", weights=ORACLE)


def mild(like: Arm) -> Arm:
    """Document weights that put on A what token weights put there."""
    return replace(like, unit="document", as_heavy_as="token")


NPO = replace(FACTS, objective="npo")
STRONG = replace(FACTS, retain_weight=32.0)
EXPERTS = replace(FACTS, trained="experts")


def at(weight: float, like: Arm) -> Arm:
    return replace(like, retain_weight=weight)


# Models and arms of each block.
BLOCKS: list[tuple[int, list[Arm]]] = [
    (12, [uniform(FACTS), by("document", FACTS), shuffled(FACTS), by("token", FACTS), by("context", FACTS)]),
    (12, [uniform(NPO), by("document", NPO), shuffled(NPO)]),
    (12, [uniform(STRONG), by("document", STRONG), other_domain(FACTS)]),
    (12, [uniform(MANUALS), by("document", MANUALS), shuffled(MANUALS), by("token", MANUALS)]),
    (12, [oracle(FACTS), mild(FACTS), by("token", NPO)]),
    (12, [uniform(at(weight, MANUALS)) for weight in (16.0, 32.0)]),
    (FEW, [by("document", at(weight, MANUALS)) for weight in (16.0, 32.0)]),
    (FEW, [arm for weight in (2.0, 16.0, 64.0) for arm in (uniform(at(weight, FACTS)), at(weight, DOCUMENT))]),
    (FEW, [other_domain(MANUALS), by("context", MANUALS)]),
    (FEW, [uniform(EXPERTS), by("document", EXPERTS), by("context", NPO), by("token", STRONG)]),
    (FEW, [uniform(at(4.0, MANUALS)), by("document", at(4.0, MANUALS))]),
    (FEW, [uniform(at(32.0, NPO)), by("document", at(32.0, NPO))]),
]


def ordered() -> Iterator[tuple[int, Arm]]:
    """(seed, arm), block by block and inside it model by model, so that wherever it stops, pairs are complete."""
    for models, arms in BLOCKS:
        for seed in SEEDS[:models]:
            for arm in arms:
                yield seed, arm
