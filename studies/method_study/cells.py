"""Which arms the study compares, in the order in which they are worth having."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace

UNIFORM, TRACE, SHUFFLED, ORACLE = "uniform", "TRACE", "shuffled", "oracle"


@dataclass(frozen=True)
class Arm:
    """One way of unlearning one model; what is not named in it is the demo's recipe.

    Attributes:
        weights: of the retain tokens: "uniform", "TRACE", "shuffled", TRACE's on random tokens or documents (the
            control), or "oracle", which knows the documents about the domain to forget from.
        corpus: "facts" (generated) or "manuals" (text of the machine's own documentation).
        adjacent: the share of the retain set that is about the domain to forget from.
        objective: of the forget set.
        retain_weight: alpha of the total loss.
        pace: the learning rate as a multiple of the recipe's.
        rule, min_ess, experts, selection: how TRACE's weights are calibrated; `experts` a layer, None for all.
        routing: "reference" or "live".
        unit: whose routing a weight looks at: "token", "context" or "document".
        forget_from: whose forget frequencies the weights match: "own", or "other", another domain's (a control).
        as_heavy_as: the unit whose weight on A is to be met by raising `min_ess`; "" for none.
        trained: "all" parameters or those of the "experts".
    """

    weights: str = TRACE
    corpus: str = "facts"
    adjacent: float = 0.05
    objective: str = "grad_diff"
    retain_weight: float = 8.0
    pace: float = 1.0
    rule: str = "balance"
    min_ess: float = 0.5
    experts: int | None = 4
    selection: str = "log_ratio"
    routing: str = "reference"
    unit: str = "token"
    forget_from: str = "own"
    as_heavy_as: str = ""
    trained: str = "all"

    @property
    def name(self) -> str:
        """Unique, and a file name."""
        parts = [self.weights]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("weights", "corpus") and value != field.default:
                parts.append(f"{field.name}={'all' if value is None else value}")
        return " ".join(parts)

    @property
    def baseline(self) -> Arm:
        """The same with uniform weights."""
        same = ("corpus", "adjacent", "objective", "retain_weight", "pace", "trained")
        return Arm(weights=UNIFORM, **{name: getattr(self, name) for name in same})

    @property
    def control(self) -> Arm:
        """The same with the weights shuffled over the tokens."""
        return replace(self, weights=SHUFFLED)


def with_baseline(arm: Arm, *, control: bool = False) -> list[Arm]:
    return [arm.baseline, arm, *([arm.control] if control else [])]


_DEFAULT = Arm()
RETAIN_WEIGHTS = {"facts": (2.0, 4.0, 8.0, 16.0, 32.0, 64.0), "manuals": (4.0, 8.0, 16.0, 32.0)}
SECTIONS: dict[str, list[Arm]] = {
    "base": with_baseline(_DEFAULT, control=True),
    "strong_retain": with_baseline(Arm(retain_weight=32.0), control=True),
    "rule": [Arm(rule=rule) for rule in ("additive", "product", "ratio")],
    "min_ess": [Arm(min_ess=bound) for bound in (0.2, 0.8)],
    "experts": [Arm(experts=count) for count in (2, 8, None)],
    "routing": [Arm(routing="live")],
    "selection": [Arm(selection=rule) for rule in ("difference", "ratio", "z_score")],
    "retain_weight": [
        arm
        for weight in (16.0, 64.0, 4.0, 2.0)
        for arm in with_baseline(Arm(retain_weight=weight), control=weight >= 16)
    ],
    "pace": [arm for pace in (0.5, 2.0) for arm in with_baseline(Arm(pace=pace))],
    "adjacent": [arm for share in (0.0, 0.02, 0.1) for arm in with_baseline(Arm(adjacent=share), control=True)],
    "manuals": with_baseline(Arm(corpus="manuals"), control=True),
    "strong_manuals": with_baseline(Arm(corpus="manuals", retain_weight=32.0), control=True),
    "manuals_pace": [Arm(UNIFORM, corpus="manuals", pace=0.5)],
    "manuals_retain_weight": [
        arm for weight in (16.0, 4.0) for arm in with_baseline(Arm(corpus="manuals", retain_weight=weight))
    ],
    "npo": with_baseline(Arm(objective="npo"), control=True),
}
QUICK = ("base", "min_ess")


def ordered(sections: list[str], models: int) -> Iterator[tuple[int, Arm]]:
    """(model, arm), each once: section by section, model by model, so that wherever it stops, pairs are complete."""
    seen: set[tuple[int, Arm]] = set()
    for section in sections:
        for model in range(models):
            for arm in SECTIONS[section]:
                if (model, arm) not in seen:
                    seen.add((model, arm))
                    yield model, arm
