"""The distinct rows of hit bits: what the solver sees of the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

import trace_kernels as tk

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Patterns:
    """The distinct rows of hit bits, sorted, with how many tokens have each.

    That makes what follows exactly independent of the order of the tokens, and small where tokens are alike.

    Attributes:
        rows: [n, ceil(M / 8)] uint8, packed as by numpy.packbits.
        counts: [n] float64.
        token_pattern: [N] int32, the row of each token.
        num_bits: M.
    """

    rows: torch.Tensor
    counts: torch.Tensor
    token_pattern: torch.Tensor
    num_bits: int

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
        token_pattern = torch.empty(len(rows), dtype=torch.int32)
        token_pattern[order] = first.cumsum(0, dtype=torch.int32) - 1
        counts = torch.diff(starts, append=torch.tensor([len(rows)])).double()
        return cls(rows if len(starts) == len(rows) else rows[starts], counts, token_pattern, num_bits)

    @cached_property
    def total(self) -> float:
        return float(self.counts.sum())

    def thinned(self, size: int) -> Patterns:
        """About `size` tokens at equal distances in sorted order, so every kind of token keeps its share; or self."""
        if len(self.rows) <= size:
            return self
        places = (torch.arange(size, dtype=torch.float64) + 0.5) * (self.total / size)
        chosen = torch.searchsorted(self.counts.cumsum(0), places).clamp(max=len(self.rows) - 1)
        chosen, counts = torch.unique(chosen, return_counts=True)
        return Patterns(self.rows[chosen], counts.double(), torch.empty(0, dtype=torch.int32), self.num_bits)

    def scores(self, coefficients: torch.Tensor) -> torch.Tensor:
        """[n]: coefficients . a."""
        return tk.hit_scores(self.rows, coefficients)

    def frequencies(self, weights: torch.Tensor) -> torch.Tensor:
        """[M]: mean over tokens of w_t a_t."""
        return tk.hit_moments(self.rows, self.counts * weights, self.num_bits) / self.total

    def second_moments(self, weights: torch.Tensor) -> torch.Tensor:
        """[M, M]: mean over tokens of w_t a_t a_t^T."""
        return tk.hit_moments(self.rows, self.counts * weights, self.num_bits, 2) / self.total

    def mean(self, values: torch.Tensor) -> float:
        """Over tokens."""
        return float((self.counts * values).sum()) / self.total

    def ess(self, weights: torch.Tensor) -> float:
        """Effective sample size as a share: (sum w)^2 / (N sum w^2)."""
        return self.mean(weights) ** 2 / self.mean(weights**2)
