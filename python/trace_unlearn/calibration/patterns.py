"""What the solver sees of the tokens: rows of features, and how many tokens share each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch

import trace_kernels as tk

_CHUNK = 1 << 20
_SAMPLE = 1 << 18  # rows from which Newton's direction and the first guess are computed, where there are more


@dataclass(frozen=True)
class Features(ABC):
    """Rows of M features, each the row of one or more tokens.

    Attributes:
        counts: [n] float64, how many tokens have each row.
        token_row: [N] int32, the row of each token.
        num_bits: M.
    """

    counts: torch.Tensor
    token_row: torch.Tensor
    num_bits: int

    #: By how much coefficients may exceed what those of single tokens may: averages vary less than bits do.
    reach = 1.0

    @cached_property
    def total(self) -> float:
        return float(self.counts.sum())

    def mean(self, values: torch.Tensor) -> float:
        """Over tokens."""
        return float((self.counts * values).sum()) / self.total

    def ess(self, weights: torch.Tensor) -> float:
        """Effective sample size as a share of the tokens: (sum w)^2 / (N sum w^2)."""
        return self.mean(weights) ** 2 / self.mean(weights**2)

    @abstractmethod
    def scores(self, coefficients: torch.Tensor) -> torch.Tensor:
        """[n]: coefficients . a."""

    @abstractmethod
    def frequencies(self, weights: torch.Tensor) -> torch.Tensor:
        """[M]: mean over tokens of w_t a_t."""

    @abstractmethod
    def covariance(self, weights: torch.Tensor) -> torch.Tensor:
        """[M, M]: mean over tokens of w_t (a_t - m) (a_t - m)^T, m the weighted mean of the rows."""

    @abstractmethod
    def thinned(self) -> Features:
        """A sample of the rows that a Newton direction can be computed from, or self where there are few."""

    @abstractmethod
    def finer(self, sample: Features) -> Features:
        """A larger sample than `sample`; or it again, when there is none."""

    @abstractmethod
    def completed(self, covariance: torch.Tensor, frequency: torch.Tensor, mean: float) -> torch.Tensor:
        """A sample's covariance, corrected by the weighted frequencies and the mean weight of all tokens."""


@dataclass(frozen=True)
class Patterns(Features):
    """The distinct rows of hit bits, sorted: the features of single tokens.

    That makes what follows exactly independent of the order of the tokens, and small where tokens are alike.

    Attributes:
        rows: [n, ceil(M / 8)] uint8, packed as by numpy.packbits.
    """

    rows: torch.Tensor

    @classmethod
    def of(cls, hits: torch.Tensor, num_bits: int) -> Patterns:
        """From the packed hit bits of all tokens, [N, ceil(M / 8)]."""
        order = tk.hit_order(hits)
        rows = hits[order]
        first = torch.ones(len(rows), dtype=torch.bool)
        for begin in range(1, len(rows), _CHUNK):
            end = min(begin + _CHUNK, len(rows))
            first[begin:end] = (rows[begin:end] != rows[begin - 1 : end - 1]).any(dim=1)
        starts = first.nonzero().flatten()
        token_row = torch.empty(len(rows), dtype=torch.int32)
        token_row[order] = first.cumsum(0, dtype=torch.int32) - 1
        counts = torch.diff(starts, append=torch.tensor([len(rows)])).double()
        return cls(counts, token_row, num_bits, rows if len(starts) == len(rows) else rows[starts])

    def thinned(self) -> Patterns:
        """At equal distances in sorted order, so every kind of token keeps its share."""
        if len(self.rows) <= _SAMPLE:
            return self
        places = (torch.arange(_SAMPLE, dtype=torch.float64) + 0.5) * (self.total / _SAMPLE)
        chosen = torch.searchsorted(self.counts.cumsum(0), places).clamp(max=len(self.rows) - 1)
        chosen, counts = torch.unique(chosen, return_counts=True)
        return Patterns(counts.double(), torch.empty(0, dtype=torch.int32), self.num_bits, self.rows[chosen])

    def finer(self, sample: Features) -> Patterns:
        return self

    def scores(self, coefficients: torch.Tensor) -> torch.Tensor:
        return tk.hit_scores(self.rows, coefficients)

    def frequencies(self, weights: torch.Tensor) -> torch.Tensor:
        return tk.hit_moments(self.rows, self.counts * weights, self.num_bits) / self.total

    def covariance(self, weights: torch.Tensor) -> torch.Tensor:
        second = tk.hit_moments(self.rows, self.counts * weights, self.num_bits, 2) / self.total
        mean = second.diagonal()
        return second - torch.outer(mean, mean) / max(self.mean(weights), 1e-300)

    def completed(self, covariance: torch.Tensor, frequency: torch.Tensor, mean: float) -> torch.Tensor:
        """Correlations come from the sample, variances from all rows: a pair too rare for the sample keeps its own."""
        variance = (frequency - frequency**2 / max(mean, 1e-300)).clamp(min=0)
        seen = covariance.diagonal() > 1e-12
        factor = torch.where(seen, (variance / covariance.diagonal().clamp(min=1e-12)).sqrt(), 0.0)
        covariance = covariance * torch.outer(factor, factor)
        covariance.diagonal().copy_(variance)
        return covariance
