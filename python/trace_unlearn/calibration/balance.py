"""Calibration of weights: those nearest to uniform under which given frequencies match.

The problem, over the weights w of N tokens with features a_t in [0, 1]^M, their hit bits or averages of such bits (see
`patterns` and `averages`), where tokens of the same row of features share a weight:

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

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from trace_unlearn.calibration.patterns import Features

_LARGEST_RIDGE = 1e8
_ESS_SLACK = 1e-5  # how close above its bound the search brings the effective sample size
_ROUGH, _EXACT = 1e-6, 1e-11  # the largest entry of the gradient, during the search and at its end


class Distance(Protocol):
    """F, psi and mu of one distance from uniform weights; all but `scale` work on x = lambda . a + mu of the tokens."""

    largest: float  # of abs(x), abs(mu) and abs(lambda): beyond it float32 tables are not exact enough

    def scale(self, raw: torch.Tensor, counts: torch.Tensor, cap: float) -> float:
        """The mu with which the mean weight is 1."""
        ...

    def weights(self, x: torch.Tensor, cap: float) -> torch.Tensor: ...

    def psi(self, x: torch.Tensor, weights: torch.Tensor, cap: float) -> torch.Tensor: ...

    def slope(self, x: torch.Tensor, weights: torch.Tensor, cap: float) -> torch.Tensor:
        """The derivative of F: by how much weights move with x."""
        ...


class Entropy:
    largest = 80.0  # exp of it and of its negative are float32 numbers

    def scale(self, raw: torch.Tensor, counts: torch.Tensor, cap: float) -> float:
        # Without the cap mu is lowest; what is at the cap then stays there, so the set at the cap only grows.
        log_mass = raw + counts.log()
        total, log_cap = float(counts.sum()), math.log(cap)
        capped = torch.zeros(len(raw), dtype=torch.bool)
        at_cap = 0.0
        while True:
            free = torch.where(capped, -torch.inf, log_mass) if at_cap else log_mass
            left = total - cap * at_cap
            mu = (math.log(left) if left > 0 else -math.inf) - float(free.logsumexp(0))
            if not math.isfinite(mu):  # all the weight is at the cap
                return log_cap - float(raw[capped].min())
            capped = raw + mu > log_cap
            grown = float((counts * capped).sum())
            if grown <= at_cap:
                return mu
            at_cap = grown

    def weights(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return x.clamp(max=math.log(cap)).exp()

    def psi(self, x: torch.Tensor, weights: torch.Tensor, cap: float) -> torch.Tensor:
        return weights * (1 + (x - math.log(cap)).clamp(min=0))

    def slope(self, x: torch.Tensor, weights: torch.Tensor, cap: float) -> torch.Tensor:
        below = x < math.log(cap)
        return weights if bool(below.all()) else torch.where(below, weights, 0.0)


class ChiSquare:
    largest = 1e3

    def scale(self, raw: torch.Tensor, counts: torch.Tensor, cap: float) -> float:
        # The mean weight is piecewise linear and rising in mu: Newton, halving the bracket where a step leaves it.
        total = float(counts.sum())
        low, high = 1 - float(raw.max()), 1 - float(raw.min())
        mu = min(max(1 - float((counts * raw).sum()) / total, low), high)
        for _ in range(200):
            x = raw + mu
            excess = float((counts * self.weights(x, cap)).sum()) / total - 1
            if abs(excess) <= 1e-15 or high - low <= 1e-15 * (1 + abs(mu)):
                break
            low, high = (low, mu) if excess > 0 else (mu, high)
            rate = float((counts * ((x > 0) & (x < cap))).sum()) / total
            tried = mu - excess / rate if rate > 0 else low
            mu = tried if low < tried < high else (low + high) / 2
        return mu

    def weights(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return x.clamp(0.0, cap)

    def psi(self, x: torch.Tensor, weights: torch.Tensor, cap: float) -> torch.Tensor:
        return weights * (x - weights / 2)

    def slope(self, x: torch.Tensor, weights: torch.Tensor, cap: float) -> torch.Tensor:
        return ((x > 0) & (x < cap)).double()


DISTANCES: dict[str, Distance] = {"balance": Entropy(), "additive": ChiSquare()}  # by the rule that uses it


@dataclass(frozen=True)
class Balance:
    """A solution: the dual variables [M], and the ridge they belong to."""

    coefficients: torch.Tensor
    ridge: float
    ess: float
    largest: float  # of abs(lambda . a + mu) over tokens, abs(mu) and abs(lambda)


@dataclass(frozen=True)
class _Problem:
    """What is solved, apart from the ridge."""

    features: Features
    sample: Features  # a part of them, or the same
    target: torch.Tensor
    distance: Distance
    cap: float
    min_ess: float

    def keeps(self, found: Balance) -> bool:
        return found.ess >= self.min_ess and self.representable(found)

    def representable(self, found: Balance) -> bool:
        return found.largest <= self.distance.largest * self.features.reach


def balance(
    features: Features, target: torch.Tensor, *, ridge: float, min_ess: float, cap: float, rule: str = "balance"
) -> Balance:
    """Solves the problem for the smallest ridge from `ridge` on whose weights keep an ESS of `min_ess`.

    The mismatch grows with the ridge, so of all ridges that keep the bound this one has the least. Targets that no
    weights meet send lambda to infinity as the ridge falls: numbers beyond float32 count as a bound not kept.

    With many rows the search first runs on a sample of them; the rest of it, on all, starts there.
    """
    sample = features.thinned()
    problem = _Problem(features, sample, target, DISTANCES[rule], cap, min_ess)
    even = Balance(torch.zeros(features.num_bits, dtype=torch.float64), _LARGEST_RIDGE, 1.0, 0.0)
    # Down from a large ridge, where the solution is near uniform and each one starts the next.
    start, factor = replace(even, ridge=max(1.0, ridge)), 8.0
    if sample is not features:
        start, factor = _search(replace(problem, features=sample), even, start, ridge, factor), 1.01
    kept = _search(problem, even, start, ridge, factor)
    # The rough solutions placed the ridge; this one is exact, and may fall below the bound by as much as they were off.
    while not problem.keeps(found := _solve(problem, kept.ridge, kept.coefficients, _EXACT)):
        kept = replace(found, ridge=kept.ridge * (1 + 1e-4))
    return found


def _search(problem: _Problem, even: Balance, start: Balance, ridge: float, factor: float) -> Balance:
    """The rough solution at the smallest ridge that keeps the bounds, as far as it can tell.

    From the ridge and coefficients of `start` it walks, in steps of `factor` that grow if that is small, until one
    ridge keeps the bounds and a lower one does not. Then it interpolates the ESS over the ridge's logarithm.
    """
    found = _solve(problem, max(start.ridge, ridge), start.coefficients, _ROUGH)
    low, kept = (None, found) if problem.keeps(found) else (found, even)
    while low is None and kept.ridge > ridge:
        found = _solve(problem, max(kept.ridge / factor, ridge), kept.coefficients, _ROUGH)
        low, kept = (None, found) if problem.keeps(found) else (found, kept)
        factor = min(factor**2, 8.0)
    while low is not None and kept is even and low.ridge * factor < _LARGEST_RIDGE:
        coefficients = start.coefficients if not problem.representable(low) else low.coefficients
        found = _solve(problem, low.ridge * factor, coefficients, _ROUGH)
        low, kept = (low, found) if problem.keeps(found) else (found, kept)
        factor = min(factor**2, 8.0)
    aim = problem.min_ess + _ESS_SLACK / 2
    slow = 0
    while low is not None and low.ridge < kept.ridge * (1 - 1e-5) and kept.ess > problem.min_ess + _ESS_SLACK:
        share = (aim - low.ess) / (kept.ess - low.ess) if low.ess < problem.min_ess and slow < 3 else 0.5
        middle = low.ridge * (kept.ridge / low.ridge) ** min(max(share, 0.01), 0.99)
        found = _solve(problem, middle, kept.coefficients, _ROUGH)
        before = kept.ridge / low.ridge
        low, kept = (low, found) if problem.keeps(found) else (found, kept)
        # An interpolation that keeps one end fixed approaches slowly: every now and then halve instead.
        slow = slow + 1 if math.log(kept.ridge / low.ridge) > 0.5 * math.log(before) else 0
        slow = 0 if share == 0.5 else slow
    return kept


def _solve(problem: _Problem, ridge: float, start: torch.Tensor, tolerance: float) -> Balance:
    """Damped Newton on the dual, mu eliminated."""
    features, distance, cap, target = problem.features, problem.distance, problem.cap, problem.target

    def dual(coefficients: torch.Tensor) -> tuple[float, float, torch.Tensor, torch.Tensor]:
        """D, mu, x and the weights."""
        x = features.scores(coefficients)
        mu = distance.scale(x, features.counts, cap)
        x += mu
        weights = distance.weights(x, cap)
        value = features.mean(distance.psi(x, weights, cap)) - mu - float(coefficients @ target)
        return value + ridge / 2 * float(coefficients @ coefficients), mu, x, weights

    coefficients = start
    value, mu, x, weights = dual(coefficients)
    frequency = features.frequencies(weights)
    gradient = frequency - target + ridge * coefficients
    for _ in range(500):
        if not len(gradient) or float(gradient.abs().max()) <= tolerance:
            break
        hessian = _hessian(problem, coefficients, mu, x, weights, frequency)
        hessian.diagonal().add_(ridge + 1e-14)
        step = -torch.linalg.solve(hessian, gradient)
        slope = float(gradient @ step)
        length = 1.0
        while True:
            tried = coefficients + length * step
            new_value, new_mu, new_x, new_weights = dual(tried)
            if new_value <= value + 1e-4 * length * slope or length < 1e-9:
                break
            if -slope < 1e-9:  # the value cannot show such progress, the gradient can
                break
            length /= 2
        new_frequency = features.frequencies(new_weights)
        new_gradient = new_frequency - target + ridge * tried
        if -slope < 1e-9 and float(new_gradient.abs().max()) > 0.5 * float(gradient.abs().max()):
            finer = features.finer(problem.sample)
            if finer is problem.sample:
                break  # as exact as the arithmetic allows
            problem = replace(problem, sample=finer)  # the sample's direction is too inexact
            continue
        coefficients, value, mu, x, weights = tried, new_value, new_mu, new_x, new_weights
        frequency, gradient = new_frequency, new_gradient
    # Where targets contradict each other lambda and mu may grow in opposite directions, and x does not show it.
    largest = max(float(values.abs().max()) for values in (x, coefficients, x.new_tensor([mu])) if len(values))
    return Balance(coefficients, ridge, features.ess(weights), largest)


def _hessian(
    problem: _Problem,
    coefficients: torch.Tensor,
    mu: float,
    x: torch.Tensor,
    weights: torch.Tensor,
    frequency: torch.Tensor,
) -> torch.Tensor:
    """[M, M]. Only weights between their bounds move, and mu moves with them: their covariance is the curvature."""
    features, sample, distance, cap = problem.features, problem.sample, problem.distance, problem.cap
    moving = distance.slope(x, weights, cap)
    if features is sample:
        return features.covariance(moving)
    mean = frequency if moving is weights else features.frequencies(moving)
    sample_x = sample.scores(coefficients) + mu
    covariance = sample.covariance(distance.slope(sample_x, distance.weights(sample_x, cap), cap))
    return features.completed(covariance, mean, features.mean(moving))
