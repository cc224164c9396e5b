"""Entropy balancing: the weights nearest to uniform under which given frequencies match.

The problem, over the weights w of N tokens with hit bits a_t in {0, 1}^M:

    minimise    mean_t(w_t log w_t) + ||mean_t(w_t a_t) - f||^2 / (2 ridge)
    subject to  mean_t(w_t) = 1,  0 <= w_t <= cap

Its solution is w_t = min(exp(lambda . a_t + mu), cap), where lambda minimises the convex dual

    D(lambda) = mean_t psi(lambda . a_t + mu) - mu - lambda . f + ridge / 2 ||lambda||^2

with psi' = min(exp, cap), so psi is linear beyond log cap, and mu = mu(lambda) such that the mean weight is 1. The
gradient is weighted frequency - f + ridge * lambda: the mismatch that remains is ridge * |lambda|. With ridge -> 0 the
frequencies match exactly wherever some weights allow it; with ridge -> infinity the weights become uniform. (Entropy
balancing: Hainmueller 2012.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_CHUNK = 1 << 14  # rows of hit bits that are float64 at a time
_LARGEST_RIDGE = 1e8
_ESS_SLACK = 1e-5  # how close above its bound the search brings the effective sample size
_ROUGH, _EXACT = 1e-6, 1e-11  # the largest entry of the gradient, during the search and at its end
_LARGEST_EXPONENT = 80.0  # of a weight: exp of it and of its negative are float32 numbers


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
    return np.exp(np.minimum(log_raw + mu, np.log(cap)))


@dataclass(frozen=True)
class Balance:
    """A solution: the dual variables [M], and the ridge they belong to."""

    coefficients: Array
    ridge: float
    ess: float
    largest_exponent: float  # over tokens, abs(lambda . a + mu)


def balance(patterns: Patterns, target: Array, *, ridge: float, min_ess: float, cap: float) -> Balance:
    """Solves the problem for the smallest ridge from `ridge` on whose weights keep an ESS of `min_ess`.

    The mismatch grows with the ridge, so of all ridges that keep the bound this one has the least. Between a ridge
    that keeps it and one that does not the search halves the interval, in logarithms. Targets that no weights meet
    send lambda to infinity as the ridge falls: exponents beyond float32 count as a bound not kept.
    """

    def keeps(found: Balance) -> bool:
        return found.ess >= min_ess and found.largest_exponent <= _LARGEST_EXPONENT

    low, kept = ridge, Balance(np.zeros(patterns.bits.shape[1]), _LARGEST_RIDGE, 1.0, 0.0)
    # Down from a large ridge, where the solution is near uniform and each one starts the next.
    falling = max(1.0, ridge)
    while True:
        found = _solve(patterns, target, falling, cap, kept.coefficients, _ROUGH)
        if not keeps(found):
            low = falling
            break
        kept = found
        if falling <= ridge:
            break
        falling = max(falling / 8, ridge)
    while low < kept.ridge * (1 - 1e-5) and kept.ess > min_ess + _ESS_SLACK:
        middle = float(np.sqrt(low * kept.ridge))
        found = _solve(patterns, target, middle, cap, kept.coefficients, _ROUGH)
        if keeps(found):
            kept = found
        else:
            low = middle
    # The rough solutions placed the ridge; this one is exact, and may fall below the bound by as much as they were off.
    while not keeps(found := _solve(patterns, target, kept.ridge, cap, kept.coefficients, _EXACT)):
        kept = replace(found, ridge=kept.ridge * (1 + 1e-4))
    return found


def _solve(patterns: Patterns, target: Array, ridge: float, cap: float, start: Array, tolerance: float) -> Balance:
    """Damped Newton on the dual, mu eliminated."""

    def gradient_at(coefficients: Array, weights: Array) -> Array:
        return patterns.frequencies(weights) - target + ridge * coefficients

    coefficients = start
    value, mu, weights = _dual(patterns, target, ridge, cap, coefficients)
    gradient = gradient_at(coefficients, weights)
    for _ in range(500):
        if np.abs(gradient).max() <= tolerance:
            break
        step = -np.linalg.solve(_hessian(patterns, ridge, cap, coefficients, mu, weights), gradient)
        slope = float(gradient @ step)
        length = 1.0
        while True:
            tried = coefficients + length * step
            new_value, new_mu, new_weights = _dual(patterns, target, ridge, cap, tried)
            if new_value <= value + 1e-4 * length * slope or length < 1e-9:
                break
            if -slope < 1e-9:  # the value cannot show such progress, the gradient can
                break
            length /= 2
        new_gradient = gradient_at(tried, new_weights)
        if -slope < 1e-9 and np.abs(new_gradient).max() > 0.5 * np.abs(gradient).max():
            break
        coefficients, value, mu, weights, gradient = tried, new_value, new_mu, new_weights, new_gradient
    exponents = patterns.scores(coefficients) + mu
    return Balance(coefficients, ridge, patterns.ess(weights), float(np.abs(exponents).max()))


def _hessian(patterns: Patterns, ridge: float, cap: float, coefficients: Array, mu: float, weights: Array) -> Array:
    """[M, M]. Only weights below the cap move, and mu moves with them: their covariance is the curvature."""
    moving = np.where(patterns.scores(coefficients) + mu < np.log(cap), weights, 0.0)
    share = max(float(patterns.counts @ moving / patterns.total), 1e-300)
    mean = patterns.frequencies(moving)
    hessian = patterns.second_moments(moving) - np.outer(mean, mean) / share
    hessian[np.diag_indices_from(hessian)] += ridge + 1e-14
    return hessian


def _dual(
    patterns: Patterns, target: Array, ridge: float, cap: float, coefficients: Array
) -> tuple[float, float, Array]:
    """D, mu and the weights."""
    scores = patterns.scores(coefficients)
    mu = log_scale(scores, patterns.counts, cap)
    weights = capped(scores, mu, cap)
    psi = weights * (1 + np.maximum(scores + mu - np.log(cap), 0))
    value = float(patterns.counts @ psi / patterns.total) - mu - float(coefficients @ target)
    return value + ridge / 2 * float(coefficients @ coefficients), mu, weights
