"""Two statistics that benchmarks aggregate with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

EXACT = 10_000  # samples up to this size get the exact p-value


def harmonic_mean(values: Sequence[float]) -> float:
    """The number of values over the sum of their inverses, of numbers from 0; 0 when one of them is, NaN with a NaN.

    >>> round(harmonic_mean([1.0, 0.5]), 4)
    0.6667
    """
    if not len(values) or min(values) < 0:
        raise ValueError(f"values: got {list(values)}, allowed are numbers from 0, at least one")
    if any(math.isnan(value) for value in values):
        return math.nan
    return 0.0 if min(values) == 0 else len(values) / sum(1 / value for value in values)


def ks_p_value(some: Sequence[float], others: Sequence[float]) -> float:
    r"""The p-value of the two-sided two-sample Kolmogorov-Smirnov test: how likely such a distance is by chance.

    With D the largest distance of the two empirical distributions, p = P(a random merging of m and n samples comes to
    a distance of D somewhere). Exact up to 10,000 samples a side, by a recursion over the merged positions without
    cancellation, so that tiny values have all their digits; Kolmogorov's asymptotic series beyond. Ties make the exact
    value conservative.

    >>> ks_p_value([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])  # 2 of the 20 orders keep the samples apart
    0.1
    """
    a, b = (np.sort(np.asarray(values, dtype=np.float64)) for values in (some, others))
    m, n = len(a), len(b)
    if not m or not n or np.isnan(a).any() or np.isnan(b).any():
        raise ValueError(f"ks_p_value: got {m} and {n} values, allowed is at least one of each, without NaN")
    merged = np.concatenate([a, b])
    # The distance in units of 1 / (m n), exact integers.
    counts = np.searchsorted(a, merged, side="right") * n - np.searchsorted(b, merged, side="right") * m
    distance = int(np.abs(counts).max())
    if distance == 0:
        return 1.0
    return _exact(m, n, distance) if max(m, n) <= EXACT else _asymptotic(m, n, distance / (m * n))


def _exact(m: int, n: int, distance: int) -> float:
    """P(|i n - j m| >= distance somewhere on a uniformly drawn path from (0, 0) to (m, n)), by the diagonals i + j."""
    every = np.arange(m + 1)
    reached = np.zeros(m + 1)  # of the paths to (i, diagonal - i), the share that came to the distance
    for diagonal in range(1, m + n + 1):
        i = every[max(0, diagonal - n) : min(m, diagonal) + 1]
        j = diagonal - i
        # Of these paths, i / (i + j) come from (i - 1, j) and the others from (i, j - 1).
        found = j / diagonal * reached[i]
        found[i > 0] += (i / diagonal)[i > 0] * reached[i[i > 0] - 1]
        found[np.abs(i * n - j * m) >= distance] = 1.0
        reached[i] = found
    return float(reached[m])


def _asymptotic(m: int, n: int, distance: float) -> float:
    """Kolmogorov's series, 2 sum (-1)^(k-1) exp(-2 k^2 z^2)."""
    z = distance * math.sqrt(m * n / (m + n))
    if z < 0.2:  # 1 to a dozen digits, and the series converges slowly
        return 1.0
    terms = (math.exp(-2 * (k * z) ** 2) for k in range(1, 101))
    return min(1.0, 2 * sum(term if k % 2 == 0 else -term for k, term in enumerate(terms)))
