"""Calibration of weights: those nearest to uniform under which given frequencies match.

The problem, over the weights w of N tokens with hit bits a_t in {0, 1}^M:

    minimise    mean_t G(w_t) + ||mean_t(w_t a_t) - f||^2 / (2 ridge)
    subject to  mean_t(w_t) = 1,  0 <= w_t <= cap

with G(w) = w log w (entropy balancing, or raking: Hainmueller 2012) or G(w) = w^2 / 2 (the linear, or chi-square,
distance of Deville and Sarndal 1992, truncated). Its solution is w_t = F(lambda . a_t + mu), with F(x) =
min(exp(x), cap) or min(max(x, 0), cap), where lambda minimises the convex dual

    D(lambda) = mean_t psi(lambda . a_t + mu) - mu - lambda . f + ridge / 2 ||lambda||^2

with psi' = F and mu = mu(lambda) such that the mean weight is 1. The gradient is weighted frequency - f + ridge lambda:
the mismatch that remains is ridge * |lambda|. With ridge -> 0 the frequencies match exactly wherever some weights allow
it; with ridge -> infinity the weights become uniform. The chi-square distance grows with 1 / ESS, so its weights have
the largest ESS of all whose squared mismatch is as small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_CHUNK = 1 << 14  # rows of hit bits that are float64 at a time
_LARGEST_RIDGE = 1e8
_ESS_SLACK = 1e-5  # how close above its bound the search brings the effective sample size
_ROUGH, _EXACT = 1e-6, 1e-11  # the largest entry of the gradient, during the search and at its end


@dataclass(frozen=True)
class Patterns:
    """The distinct rows of hit bits, sorted, with how many tokens have each: what the solver sees of the tokens.

    That makes it exactly independent of the order of the tokens.
    """

    bits: npt.NDArray[np.uint8]  # [n, M]
    counts: Array  # [n]
    token_pattern: npt.NDArray[np.int64]  # [N]: the row of each token

    @classmethod
    def of(cls, packed: npt.NDArray[np.uint8], num_bits: int) -> Patterns:
        """From hit bits packed by numpy.packbits: [N, ceil(M / 8)]."""
        if num_bits == 0:  # all tokens are alike
            return cls(np.zeros((1, 0), np.uint8), np.array([float(len(packed))]), np.zeros(len(packed), np.int64))
        rows, inverse, counts = np.unique(packed, axis=0, return_inverse=True, return_counts=True)
        bits = np.unpackbits(rows, axis=1, count=num_bits)
        return cls(bits, counts.astype(np.float64), inverse.reshape(-1).astype(np.int64))

    @property
    def total(self) -> float:
        return float(self.counts.sum())

    def scores(self, coefficients: Array) -> Array:
        """[n]: coefficients . a."""
        parts = (self.bits[i : i + _CHUNK] @ coefficients for i in range(0, len(self.bits), _CHUNK))
        return np.concatenate([np.zeros(0), *parts])

    def frequencies(self, weights: Array) -> Array:
        """[M]: mean over tokens of w_t a_t."""
        mass = self.counts * weights / self.total
        total = np.zeros(self.bits.shape[1])
        for i in range(0, len(self.bits), _CHUNK):
            total += mass[i : i + _CHUNK] @ self.bits[i : i + _CHUNK]
        return total

    def second_moments(self, weights: Array) -> Array:
        """[M, M]: mean over tokens of w_t a_t a_t^T."""
        # In float32 products: Newton's direction may be inexact, its gradient is not.
        mass = (self.counts * weights / self.total).astype(np.float32)
        total = np.zeros((self.bits.shape[1],) * 2)
        for i in range(0, len(self.bits), _CHUNK):
            rows = self.bits[i : i + _CHUNK].astype(np.float32)
            total += (rows * mass[i : i + _CHUNK, None]).T @ rows
        return total

    def ess(self, weights: Array) -> float:
        """Effective sample size as a share: (sum w)^2 / (N sum w^2)."""
        return float((self.counts @ weights) ** 2 / (self.total * (self.counts @ weights**2)))


def log_scale(log_raw: Array, counts: Array, cap: float) -> float:
    """The mu with mean(min(exp(log_raw + mu), cap)) = 1 over tokens; unique for cap > 1 and raw values above 0."""
    order = np.argsort(-log_raw, kind="stable")
    values, sizes = log_raw[order], counts[order]
    # What the tokens from this one on must sum to, and what they do, when all before it are at the cap.
    left = sizes.sum() - cap * (np.cumsum(sizes) - sizes)
    tail = np.logaddexp.accumulate((np.log(sizes) + values)[::-1])[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        mu = np.log(left) - tail
    fits = (left > 0) & (values + mu <= np.log(cap))
    return float(mu[np.argmax(fits)])


def capped(log_raw: Array, mu: float, cap: float) -> Array:
    weights: Array = np.exp(np.minimum(log_raw + mu, np.log(cap)))
    return weights


class Distance(Protocol):
    """F, psi and mu of one distance from uniform weights; all but `scale` work on x = lambda . a + mu of the tokens."""

    largest: float  # of abs(x): beyond it float32 tables are not exact enough

    def scale(self, raw: Array, counts: Array, cap: float) -> float:
        """The mu with which the mean weight is 1."""
        ...

    def weights(self, x: Array, cap: float) -> Array: ...

    def psi(self, x: Array, weights: Array, cap: float) -> Array: ...

    def slope(self, x: Array, weights: Array, cap: float) -> Array:
        """The derivative of F: by how much weights move with x."""
        ...


class Entropy:
    largest = 80.0  # exp of it and of its negative are float32 numbers

    def scale(self, raw: Array, counts: Array, cap: float) -> float:
        return log_scale(raw, counts, cap)

    def weights(self, x: Array, cap: float) -> Array:
        return capped(x, 0.0, cap)

    def psi(self, x: Array, weights: Array, cap: float) -> Array:
        beyond: Array = np.maximum(x - np.log(cap), 0)
        return weights * (1 + beyond)

    def slope(self, x: Array, weights: Array, cap: float) -> Array:
        return np.where(x < np.log(cap), weights, 0.0)


class ChiSquare:
    largest = 1e3

    def scale(self, raw: Array, counts: Array, cap: float) -> float:
        # The mean weight is piecewise linear and rising in mu: Newton, halving the bracket where a step leaves it.
        total = counts.sum()
        low, high = 1 - float(raw.max()), 1 - float(raw.min())
        mu = min(max(1 - float(counts @ raw / total), low), high)
        for _ in range(200):
            x = raw + mu
            excess = float(counts @ self.weights(x, cap) / total) - 1
            if abs(excess) <= 1e-15 or high - low <= 1e-15 * (1 + abs(mu)):
                break
            low, high = (low, mu) if excess > 0 else (mu, high)
            rate = float(counts @ ((x > 0) & (x < cap)) / total)
            tried = mu - excess / rate if rate > 0 else low
            mu = tried if low < tried < high else (low + high) / 2
        return mu

    def weights(self, x: Array, cap: float) -> Array:
        within: Array = np.clip(x, 0.0, cap)
        return within

    def psi(self, x: Array, weights: Array, cap: float) -> Array:
        return weights * (x - weights / 2)

    def slope(self, x: Array, weights: Array, cap: float) -> Array:
        return ((x > 0) & (x < cap)).astype(np.float64)


DISTANCES: dict[str, Distance] = {"balance": Entropy(), "additive": ChiSquare()}  # by the rule that uses it


@dataclass(frozen=True)
class Balance:
    """A solution: the dual variables [M], and the ridge they belong to."""

    coefficients: Array
    ridge: float
    ess: float
    largest: float  # over tokens, abs(lambda . a + mu)


def balance(
    patterns: Patterns, target: Array, *, ridge: float, min_ess: float, cap: float, rule: str = "balance"
) -> Balance:
    """Solves the problem for the smallest ridge from `ridge` on whose weights keep an ESS of `min_ess`.

    The mismatch grows with the ridge, so of all ridges that keep the bound this one has the least. Between a ridge
    that keeps it and one that does not the search halves the interval, in logarithms. Targets that no weights meet
    send lambda to infinity as the ridge falls: numbers beyond float32 count as a bound not kept.
    """
    distance = DISTANCES[rule]

    def keeps(found: Balance) -> bool:
        return found.ess >= min_ess and found.largest <= distance.largest

    low, kept = ridge, Balance(np.zeros(patterns.bits.shape[1]), _LARGEST_RIDGE, 1.0, 0.0)
    # Down from a large ridge, where the solution is near uniform and each one starts the next.
    falling = max(1.0, ridge)
    while True:
        found = _solve(distance, patterns, target, falling, cap, kept.coefficients, _ROUGH)
        if not keeps(found):
            low = falling
            break
        kept = found
        if falling <= ridge:
            break
        falling = max(falling / 8, ridge)
    while low < kept.ridge * (1 - 1e-5) and kept.ess > min_ess + _ESS_SLACK:
        middle = float(np.sqrt(low * kept.ridge))
        found = _solve(distance, patterns, target, middle, cap, kept.coefficients, _ROUGH)
        if keeps(found):
            kept = found
        else:
            low = middle
    # The rough solutions placed the ridge; this one is exact, and may fall below the bound by as much as they were off.
    while not keeps(found := _solve(distance, patterns, target, kept.ridge, cap, kept.coefficients, _EXACT)):
        kept = replace(found, ridge=kept.ridge * (1 + 1e-4))
    return found


def _solve(
    distance: Distance, patterns: Patterns, target: Array, ridge: float, cap: float, start: Array, tolerance: float
) -> Balance:
    """Damped Newton on the dual, mu eliminated."""

    def dual(coefficients: Array) -> tuple[float, Array, Array]:
        """D, x and the weights."""
        scores = patterns.scores(coefficients)
        mu = distance.scale(scores, patterns.counts, cap)
        x = scores + mu
        weights = distance.weights(x, cap)
        value = float(patterns.counts @ distance.psi(x, weights, cap) / patterns.total) - mu
        return value - float(coefficients @ target) + ridge / 2 * float(coefficients @ coefficients), x, weights

    def gradient_at(coefficients: Array, weights: Array) -> Array:
        return patterns.frequencies(weights) - target + ridge * coefficients

    coefficients = start
    value, x, weights = dual(coefficients)
    gradient = gradient_at(coefficients, weights)
    for _ in range(500):
        if np.abs(gradient).max() <= tolerance:
            break
        step = -np.linalg.solve(_hessian(patterns, ridge, distance.slope(x, weights, cap)), gradient)
        slope = float(gradient @ step)
        length = 1.0
        while True:
            tried = coefficients + length * step
            new_value, new_x, new_weights = dual(tried)
            if new_value <= value + 1e-4 * length * slope or length < 1e-9:
                break
            if -slope < 1e-9:  # the value cannot show such progress, the gradient can
                break
            length /= 2
        new_gradient = gradient_at(tried, new_weights)
        if -slope < 1e-9 and np.abs(new_gradient).max() > 0.5 * np.abs(gradient).max():
            break
        coefficients, value, x, weights, gradient = tried, new_value, new_x, new_weights, new_gradient
    return Balance(coefficients, ridge, patterns.ess(weights), float(np.abs(x).max()))


def _hessian(patterns: Patterns, ridge: float, moving: Array) -> Array:
    """[M, M]. Only weights between their bounds move, and mu moves with them: their covariance is the curvature."""
    share = max(float(patterns.counts @ moving / patterns.total), 1e-300)
    mean = patterns.frequencies(moving)
    hessian = patterns.second_moments(moving) - np.outer(mean, mean) / share
    hessian[np.diag_indices_from(hessian)] += ridge + 1e-14
    return hessian
