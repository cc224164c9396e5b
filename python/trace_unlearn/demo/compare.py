"""Utility at equal forgetting: arms compared in pairs over independent models, with intervals and a plain verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Point = Mapping[str, float]  # step, F_accuracy, F_nll, N_accuracy, …
Curve = Sequence[Point]
Pair = tuple[str, str]

UNIFORM, TRACE, CONTROL, STRONG = "uniform", "TRACE", "shuffled", "uniform x 4"
PAIRS: tuple[Pair, ...] = ((TRACE, UNIFORM), (TRACE, CONTROL), (CONTROL, UNIFORM), (STRONG, UNIFORM))
FORGET_NLL = (0.5, 2.5)  # the range of forgetting over which arms are compared, in nats; chance is ln 12 = 2.48
GRID = 29
MEASURES = {
    "A_accuracy": "A accuracy",
    "A_nll": "A NLL",
    "N_accuracy": "N accuracy",
    "N_nll": "N NLL",
    "R_accuracy": "R accuracy",
    "R_nll": "R NLL",
}
# Quantiles of Student's t for 1 to 11 degrees of freedom; beyond, the last ones err on the careful side.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)
T_800 = (1.376, 1.061, 0.978, 0.941, 0.920, 0.906, 0.896, 0.889, 0.883, 0.879, 0.876)


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
    """A paired difference between two arms, one value a model."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def standard_error(self) -> float | None:
        """None with one model."""
        n = len(self.values)
        return float(np.std(self.values, ddof=1) / math.sqrt(n)) if n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean (Student's t); None with one model.

        >>> [round(bound, 3) for bound in Difference((1.0, 2.0, 3.0)).interval]  # 2 ± 4.303 / sqrt 3
        [-0.484, 4.484]
        """
        if self.standard_error is None:
            return None
        half = student(T_975, len(self.values)) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    @property
    def smallest_seen(self) -> float | None:
        """The mean difference whose interval would leave out 0 in 8 of 10 such runs; None with one model.

        >>> round(Difference((1.0, 2.0, 3.0)).smallest_seen, 3)  # (4.303 + 1.061) / sqrt 3
        3.097
        """
        if self.standard_error is None:
            return None
        n = len(self.values)
        return (student(T_975, n) + student(T_800, n)) * self.standard_error

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} [{self.interval[0]:+.3f}, {self.interval[1]:+.3f}]"


def student(table: Sequence[float], models: int) -> float:
    """The quantile of Student's t that belongs to a mean over so many models."""
    return table[min(models - 1, len(table)) - 1]


@dataclass(frozen=True)
class Comparison:
    """What `compare` found, at equal forgetting.

    Attributes:
        arms: their names, uniform first.
        utility: by measure ("step" too) and arm, the mean over the models in which it forgot enough.
        differences: by measure and pair of arms, the first minus the second, over the models in which both did.
        models: how many models compare TRACE with uniform weights.
        left_out: by arm, the numbers of the models in which it forgot too little to be compared.
    """

    arms: tuple[str, ...]
    utility: dict[str, dict[str, float]]
    differences: dict[str, dict[Pair, Difference]]
    models: int
    left_out: dict[str, tuple[int, ...]]


def compare(models: Mapping[int, Mapping[str, Curve]]) -> Comparison:
    """Compare the arms of each model, by its number, in `PAIRS`; the first model has all arms.

    Both arms of a pair are averaged over the same forget NLLs: `FORGET_NLL`, cut where one of them stopped earlier. An
    arm that did not get through half of that range is left out of its model, and named.
    """
    arms = tuple(next(iter(models.values())))
    middle = sum(FORGET_NLL) / 2
    enough = {
        number: {arm: curve for arm, curve in curves.items() if _reached(curve) >= middle}
        for number, curves in models.items()
    }
    utility: dict[str, dict[str, float]] = {}
    differences: dict[str, dict[Pair, Difference]] = {}
    for measure in (*MEASURES, "step"):
        levels = {arm: [_mean(c[arm], c[arm], measure) for c in enough.values() if arm in c] for arm in arms}
        utility[measure] = {arm: float(np.mean(row)) for arm, row in levels.items() if row}
        found = {
            (arm, other): tuple(
                _mean(c[arm], c[other], measure) - _mean(c[other], c[arm], measure)
                for c in enough.values()
                if arm in c and other in c
            )
            for arm, other in PAIRS
        }
        differences[measure] = {pair: Difference(values) for pair, values in found.items() if values}
    return Comparison(
        arms,
        utility,
        differences,
        sum(TRACE in curves and UNIFORM in curves for curves in enough.values()),
        {
            arm: missing
            for arm in arms
            if (missing := tuple(n for n, c in models.items() if arm in c and arm not in enough[n]))
        },
    )


def _reached(curve: Curve) -> float:
    return max(point["F_nll"] for point in curve)


def _mean(curve: Curve, other: Curve, measure: str) -> float:
    """Of the first curve, over the forget NLLs that both reach."""
    low, high = FORGET_NLL
    grid = np.linspace(low, min(high, _reached(curve), _reached(other)), GRID)
    return float(at_equal_forgetting(curve, measure, grid).mean())
