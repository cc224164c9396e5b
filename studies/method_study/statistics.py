"""Paired comparisons of arms over models: at equal forgetting, at equal steps, at equal damage; exact tests."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trace_unlearn.demo.compare import T_800, T_975, student

Point = Mapping[str, float]
Curve = Sequence[Point]
Array = npt.NDArray[np.float64]

GRID = 29
MOST_EXACT = 14  # models up to which all sign changes are tried
DRAWS = 20000
LEAST_COMMON = 0.5  # of the range: a pair that has less of it in common is not compared


def at_equal(curve: Curve, x: str, levels: Array, measure: str) -> Array:
    """`measure` where the curve's `x` first reaches each level, linear between its points; NaN where it never does.

    >>> curve = [{"F_nll": 0.0, "A": 1.0}, {"F_nll": 2.0, "A": 0.8}]
    >>> at_equal(curve, "F_nll", np.array([1.0, 3.0]), "A").tolist()
    [0.9, nan]
    """
    along = np.array([point[x] for point in curve])
    values = np.array([point[measure] for point in curve])
    found = np.full(len(levels), np.nan)
    for i, level in enumerate(levels):
        reached = np.flatnonzero(along >= level)
        if len(reached):
            after = int(reached[0])
            before = max(after - 1, 0)
            gap = along[after] - along[before]
            share = (level - along[before]) / gap if gap else 1.0
            found[i] = values[before] + share * (values[after] - values[before])
    return found


@dataclass(frozen=True)
class View:
    """What is held equal between two curves of one model that start at the same point.

    Attributes:
        x: the quantity held equal: "F_nll", "R_nll" or "step".
        low, high: its range, above the start; `high` may be infinite: as far as both curves go.
    """

    x: str
    low: float
    high: float

    def levels(self, curves: Sequence[Curve]) -> Array | None:
        """The grid that all curves reach, or None when it is less than LEAST_COMMON of the range."""
        start = curves[0][0][self.x]
        top = min(start + self.high, *(max(point[self.x] for point in curve) for curve in curves))
        low = start + self.low
        enough = LEAST_COMMON * (self.high - self.low) if math.isfinite(self.high) else 0.0
        if top - low < enough or top <= low:
            return None
        return np.linspace(low, top, GRID)

    def difference(self, curve: Curve, other: Curve, measure: str) -> float:
        """The mean over the grid of `measure` on `curve` minus on `other`; NaN where they cannot be compared."""
        levels = self.levels([curve, other])
        if levels is None:
            return math.nan
        ours, theirs = (at_equal(c, self.x, levels, measure).mean() for c in (curve, other))
        return float(ours - theirs)

    def value(self, curve: Curve, measure: str) -> float:
        """The mean over the grid that this curve reaches."""
        levels = self.levels([curve, curve])
        return math.nan if levels is None else float(at_equal(curve, self.x, levels, measure).mean())


@dataclass(frozen=True)
class Difference:
    """A paired difference over models.

    Attributes:
        values: by model; None where there is nothing to compare.
        p: two-sided, of the sign-flip test: the share of all sign changes whose mean is at least as far from 0.
    """

    values: tuple[float | None, ...]
    mean: float
    standard_error: float
    p: float

    @property
    def n(self) -> int:
        return sum(value is not None for value in self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean (Student's t); NaN for fewer than two models.

        >>> [round(bound, 3) for bound in Difference.of([1.0, 2.0, 3.0]).interval]  # 2 ± 4.303 / sqrt 3
        [-0.484, 4.484]
        """
        half = student(T_975, self.n) * self.standard_error
        return self.mean - half, self.mean + half

    @property
    def smallest(self) -> float:
        """The mean difference whose interval would leave out 0 with a probability of 0.8."""
        return (student(T_975, self.n) + student(T_800, self.n)) * self.standard_error

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        """NaN stands for a model without a comparison.

        >>> Difference.of([1.0, 2.0, 3.0]).p  # 2 of the 8 sign changes
        0.25
        """
        known = np.array([value for value in values if not math.isnan(value)])
        mean = float(known.mean()) if len(known) else math.nan
        error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan
        return cls(tuple(None if math.isnan(value) else value for value in values), mean, error, sign_flip(known))


def sign_flip(values: Array) -> float:
    """Two-sided p that differences are symmetric around 0; exact for few models, else by random sign changes."""
    n = len(values)
    if n == 0:
        return math.nan
    if n <= MOST_EXACT:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(0).choice((1.0, -1.0), size=(DRAWS, n))
        signs[0] = 1.0
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) * (1 - 1e-12)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's p-values, adjusted for their number; NaN is left out and stays.

    >>> [round(value, 3) for value in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    known = sorted((value, i) for i, value in enumerate(p) if not math.isnan(value))
    adjusted = [math.nan] * len(p)
    highest = 0.0
    for rank, (value, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        adjusted[i] = highest
    return adjusted


def tuned(values: Mapping[float, Sequence[float]]) -> list[float]:
    """For each model the value at the setting that is best on average over the other models.

    Only models with a value at every setting take part; the others get NaN. So that the choice does not flatter itself.

    >>> tuned({8.0: [0.5, 0.5, 0.9], 32.0: [0.6, 0.6, 0.0]})
    [0.5, 0.5, 0.0]
    """
    settings = list(values)
    table = np.array([values[setting] for setting in settings], dtype=float)  # [settings, models]
    complete = ~np.isnan(table).any(axis=0)
    found = np.full(table.shape[1], np.nan)
    for model in np.flatnonzero(complete):
        others = complete.copy()
        others[model] = False
        if others.any():
            best = int(table[:, others].mean(axis=1).argmax())
            found[model] = table[best, model]
    return found.tolist()
