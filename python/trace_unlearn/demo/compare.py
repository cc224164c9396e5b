"""Utility at equal forgetting: arms compared over independent models, with standard errors and a plain verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Point = Mapping[str, float]  # step, F_accuracy, F_nll, N_accuracy, …
Curve = Sequence[Point]

FORGET_NLL = (1.5, 5.0)  # the range of forgetting over which utility is averaged, in nats
GRID = 29
MEASURES = {
    "N_accuracy": "N accuracy",
    "A_accuracy": "A accuracy",
    "R_accuracy": "R accuracy",
    "N_nll": "N NLL",
    "A_nll": "A NLL",
    "R_nll": "R NLL",
}
WHOM = {
    "A_accuracy": "adjacent facts (A, the retain set has a little of them)",
    "N_accuracy": "neighbours (N, the retain set has nothing of them)",
}
BASELINE = "uniform"
# Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom; beyond, the last one errs on the careful side.
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def at_equal_forgetting(curve: Curve, measure: str, forget_nll: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """`measure` where the curve first reaches each of the given forget NLLs, linear between its points.

    NaN where the curve never gets there.

    Example:
        >>> curve = [{"F_nll": 0.0, "N_accuracy": 1.0}, {"F_nll": 2.0, "N_accuracy": 0.8}]
        >>> at_equal_forgetting(curve, "N_accuracy", [1.0, 3.0]).tolist()
        [0.9, nan]
    """
    x = np.array([point["F_nll"] for point in curve])
    y = np.array([point[measure] for point in curve])
    values = np.full(np.shape(forget_nll), np.nan)
    for i, level in enumerate(np.asarray(forget_nll, dtype=float)):
        reached = np.flatnonzero(x >= level)
        if len(reached) == 0:
            continue
        after = int(reached[0])
        if after == 0:
            values[i] = y[0]
        else:
            share = (level - x[after - 1]) / (x[after] - x[after - 1])
            values[i] = y[after - 1] + share * (y[after] - y[after - 1])
    return values


@dataclass(frozen=True)
class Difference:
    """A paired difference to uniform weights over the models."""

    mean: float
    standard_error: float | None  # None with one model
    models: int

    @property
    def beyond_noise(self) -> bool:
        """Whether the 95 % confidence interval (Student's t) leaves out 0."""
        if self.standard_error is None:
            return False
        return abs(self.mean) > T_95[min(self.models - 1, len(T_95)) - 1] * self.standard_error

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} ± {self.standard_error:.3f}"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        arms: their names, uniform first.
        utility: by measure and arm, the mean over models of the measure averaged over equal forgetting.
        differences: by measure and arm, paired to uniform.
        models: how many models were compared.
        ranges: the range of forget NLL that every arm of a model reached, for each model.
        left_out: models where some arm forgot too little to be compared.
    """

    arms: tuple[str, ...]
    utility: dict[str, dict[str, float]]
    differences: dict[str, dict[str, Difference]]
    models: int
    ranges: tuple[tuple[float, float], ...]
    left_out: tuple[int, ...]


def compare(models: Sequence[Mapping[str, Curve]]) -> Comparison:
    """Compare the arms of each model at equal forgetting.

    Within a model every arm is averaged over the same forget NLLs: `FORGET_NLL`, cut where an arm stopped earlier.
    A model of which an arm did not even get through half of that range is left out, and named.
    """
    arms = tuple(models[0])
    utility: dict[str, dict[str, list[float]]] = {measure: {arm: [] for arm in arms} for measure in MEASURES}
    ranges, left_out = [], []
    low, high = FORGET_NLL
    for number, curves in enumerate(models):
        reached = min(max(point["F_nll"] for point in curve) for curve in curves.values())
        top = min(high, reached)
        if top < (low + high) / 2:
            left_out.append(number)
            continue
        ranges.append((low, top))
        grid = np.linspace(low, top, GRID)
        for measure, by_arm in utility.items():
            for arm in arms:
                by_arm[arm].append(float(at_equal_forgetting(curves[arm], measure, grid).mean()))
    differences = {
        measure: {arm: _paired(by_arm[arm], by_arm[BASELINE]) for arm in arms if arm != BASELINE}
        for measure, by_arm in utility.items()
        if ranges
    }
    means = {
        m: {arm: float(np.mean(values)) for arm, values in by_arm.items()} for m, by_arm in utility.items() if ranges
    }
    return Comparison(arms, means, differences, len(ranges), tuple(ranges), tuple(left_out))


def _paired(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    difference = np.subtract(values, baseline)
    n = len(difference)
    return Difference(float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(n)) if n > 1 else None, n)


def verdict(comparison: Comparison, arm: str, control: str) -> list[str]:
    """Plain sentences: whether `arm` kept more than uniform weights at equal forgetting, or the noise is larger."""
    if comparison.models == 0:
        return ["No model forgot enough in every arm to compare them."]
    sentences = []
    for measure, who in WHOM.items():
        difference = comparison.differences[measure][arm]
        line = f"On {who}, {arm} against {BASELINE}: accuracy {difference}"
        if comparison.models > 1:
            if not difference.beyond_noise:
                found = "the noise is larger than the difference, so no claim either way"
            else:
                found = f"{arm} {'helped' if difference.mean > 0 else 'hurt'}, beyond the noise (95 %)"
            line += f" over {comparison.models} models: {found}"
        sentences.append(f"{line}. The control ({control}): {comparison.differences[measure][control]}.")
    if comparison.models == 1:
        sentences.append("One model cannot tell a gain from noise; --models 3 or more can begin to.")
    return sentences
