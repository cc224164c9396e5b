"""From the files of finished arms to one small results record: every comparison with its values by model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from studies.method_study.cells import RETAIN_WEIGHTS, SECTIONS, SHUFFLED, TRACE, UNIFORM, Arm
from studies.method_study.statistics import Curve, Difference, View, holm, tuned
from studies.method_study.work import arm_file
from studies.method_study.worlds import FORGET_RISE
from trace_unlearn.files import read_json

UTILITIES = ("A_accuracy", "N_accuracy", "R_accuracy")
TESTED = ("A_accuracy", "N_accuracy")
VARIANTS = ("rule", "min_ess", "experts", "selection", "routing")
Runs = Mapping[tuple[int, Arm], Mapping[str, Any]]


def views(corpus: str) -> dict[str, View]:
    return {
        "forgetting": View("F_nll", *FORGET_RISE[corpus]),
        "steps": View("step", 0.0, math.inf),
        "damage": View("R_nll", 0.0, math.inf),
    }


@dataclass(frozen=True)
class Comparison:
    """One arm against another, paired over models.

    Attributes:
        family: the comparisons that are corrected together: "uniform", "control", "default", …
        view: what is held equal, one of `views`.
        differences: by measure; "F_nll" is how much more is forgotten, "steps" how many more are needed.
    """

    family: str
    section: str
    arm: str
    against: str
    view: str
    differences: dict[str, Difference]


def read_runs(output: Path, models: int) -> dict[tuple[int, Arm], dict[str, Any]]:
    """What has finished."""
    runs = {}
    for arms in SECTIONS.values():
        for arm in arms:
            for seed in range(models):
                if (path := arm_file(output, seed, arm)).is_file():
                    runs[seed, arm] = read_json(path)
    return runs


def collect(runs: Runs, models: int, machine: Mapping[str, str]) -> dict[str, Any]:
    """The results record, in what JSON can hold: None for what does not exist."""
    comparisons = [c for c in _comparisons(runs, models) if next(iter(c.differences.values())).n]
    levels = [_level(arm, runs, models) for arm in dict.fromkeys(arm for _, arm in runs)]
    record = {
        "machines": [dict(machine)],
        "models": models,
        "comparisons": [{**dataclasses.asdict(c), "machine": 0} for c in comparisons],
        "levels": [{**level, "machine": 0} for level in levels],
        "diverged": sorted(f"{arm.corpus} {seed}: {arm.name}" for (seed, arm), run in runs.items() if run["diverged"]),
    }
    return corrected(cast("dict[str, Any]", plain(record)))


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _comparisons(runs: Runs, models: int) -> Iterator[Comparison]:
    def compare(family: str, section: str, arm: Arm, against: Arm, view: str = "forgetting") -> Comparison:
        return Comparison(
            family, section, label(arm), label(against), view, _differences(runs, models, arm, against, view)
        )

    for section, arms in SECTIONS.items():
        for arm in arms:
            if arm.weights == TRACE:
                yield compare("uniform", section, arm, arm.baseline)
                yield compare("uniform, equal steps", section, arm, arm.baseline, "steps")
                yield compare("uniform, equal damage", section, arm, arm.baseline, "damage")
                if arm.control in arms:
                    yield compare("control", section, arm, arm.control)
                if section in VARIANTS:
                    yield compare("default", section, arm, Arm())
            elif arm.weights == SHUFFLED:
                yield compare("shuffled", section, arm, arm.baseline)
    for corpus, weights in RETAIN_WEIGHTS.items():
        uniform, section = Arm(UNIFORM, corpus), "" if corpus == "facts" else f"{corpus}_"
        for pace in (0.5, 2.0):
            yield compare("pace", f"{section}pace", replace(uniform, pace=pace), uniform)
        yield compare("pace", f"{section}pace", Arm(corpus=corpus), replace(uniform, pace=0.5))
        for weight in weights:
            if weight != Arm.retain_weight:
                yield compare("weight", f"{section}retain_weight", replace(uniform, retain_weight=weight), uniform)
        names = [label(Arm(who, corpus)) + ", retain weight tuned" for who in (TRACE, UNIFORM)]
        differences = {measure: _tuned_difference(runs, models, corpus, measure) for measure in TESTED}
        yield Comparison("tuned", f"{section}retain_weight", *names, "forgetting", differences)


def _differences(runs: Runs, models: int, arm: Arm, against: Arm, view: str) -> dict[str, Difference]:
    held = views(arm.corpus)[view]
    measures = [*UTILITIES, *(["F_nll"] if view != "forgetting" else [])]

    def by_model(difference: Callable[[Curve, Curve], float]) -> Difference:
        values = []
        for seed in range(models):
            pair = [runs.get((seed, a)) for a in (arm, against)]
            known = [run["curve"] for run in pair if run is not None]
            values.append(difference(*known) if len(known) == 2 else math.nan)
        return Difference.of([round(value, 5) for value in values])

    found = {measure: by_model(lambda a, b, m=measure: held.difference(a, b, m)) for measure in measures}
    if view == "forgetting":
        found["steps"] = by_model(lambda a, b: held.difference(a, b, "step"))
    return found


def _tuned_difference(runs: Runs, models: int, corpus: str, measure: str) -> Difference:
    """TRACE − uniform, each at the retain weight that is best for it on the other models."""
    view = views(corpus)["forgetting"]
    best = []
    for weights in (TRACE, UNIFORM):
        values = {}
        for weight in RETAIN_WEIGHTS[corpus]:
            arm = Arm(weights, corpus, retain_weight=weight)
            known = [runs.get((seed, arm)) for seed in range(models)]
            values[weight] = [math.nan if run is None else view.value(run["curve"], measure) for run in known]
        best.append(np.array(tuned(values)))
    return Difference.of((best[0] - best[1]).tolist())


def _level(arm: Arm, runs: Runs, models: int) -> dict[str, Any]:
    """What an arm kept at equal forgetting, on average, and its calibration."""
    known = [runs[seed, arm] for seed in range(models) if (seed, arm) in runs]
    view = views(arm.corpus)["forgetting"]
    level: dict[str, Any] = {"arm": dataclasses.asdict(arm), "label": label(arm), "n": len(known)}
    middle = View("F_nll", sum(FORGET_RISE[arm.corpus]) / 2, math.inf)
    for measure in UTILITIES:
        level[measure] = _mean([view.value(run["curve"], measure) for run in known])
        level[f"{measure}_before"] = _mean([run["curve"][0][measure] for run in known])
    level["compared"] = sum(not math.isnan(view.value(run["curve"], "step")) for run in known)
    level["steps"] = _mean([_steps_to(run["curve"], middle.low) for run in known])
    calibrations = [run["calibration"] for run in known if "calibration" in run]
    if calibrations:
        level["calibration"] = {
            key: _mean([math.nan if c[key] is None else c[key] for c in calibrations]) for key in calibrations[0]
        }
    return level


def _steps_to(curve: Curve, rise: float) -> float:
    from studies.method_study.statistics import at_equal

    return float(at_equal(curve, "F_nll", np.array([curve[0]["F_nll"] + rise]), "step")[0])


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return round(float(np.mean(known)), 4) if known else None


def corrected(record: dict[str, Any]) -> dict[str, Any]:
    """With Holm's p of each tested measure, over the comparisons of its family."""
    families: dict[str, list[tuple[int, str]]] = {}
    comparisons = record["comparisons"]
    for i, comparison in enumerate(comparisons):
        for measure in TESTED:
            families.setdefault(comparison["family"], []).append((i, measure))
    adjusted: list[dict[str, float | None]] = [{} for _ in comparisons]
    for members in families.values():
        known = [comparisons[i]["differences"][measure]["p"] for i, measure in members]
        values = plain(holm([math.nan if p is None else p for p in known]))
        for (i, measure), value in zip(members, values, strict=True):
            adjusted[i][measure] = value
    pairs = zip(comparisons, adjusted, strict=True)
    return {**record, "comparisons": [{**comparison, "adjusted": found} for comparison, found in pairs]}


def label(arm: Arm) -> str:
    """In words."""
    words = {
        "adjacent": f"adjacent {arm.adjacent:.0%}",
        "objective": {"npo": "NPO"}.get(arm.objective, arm.objective),
        "retain_weight": f"retain weight {arm.retain_weight:g}",
        "pace": f"learning rate x {arm.pace:g}",
        "rule": f"rule {arm.rule}",
        "min_ess": f"ESS ≥ {arm.min_ess:g}",
        "experts": "all experts" if arm.experts is None else f"{arm.experts} experts per layer",
        "selection": f"selected by {arm.selection}",
        "routing": f"{arm.routing} routing",
        "corpus": arm.corpus,
    }
    changed = [words[f.name] for f in dataclasses.fields(arm) if f.name in words and getattr(arm, f.name) != f.default]
    return ", ".join([arm.weights, *changed])
