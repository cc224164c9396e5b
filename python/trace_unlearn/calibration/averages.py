"""Mean hits over documents or contexts: the features of weights that look at more than one token.

A unit averages the hit bits of consecutive positions of its document: a document those of its counted tokens, a context
those of the positions that one token's loss reads. Its score is the mean of the positions' scores; a moment of averages
is one of the bits, where a position's weight is the sum of w / length over the units that average over it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

import trace_kernels as tk
from trace_unlearn.calibration.patterns import Features

_SAMPLE = 1 << 16  # units whose features are held as numbers, at most
_ENTRIES = 1 << 25  # numbers of those features, at most
_FINER = 4  # times as many, where that sample proves too small
_CHUNK = 1 << 22  # numbers of the features of all units that exist at a time


@dataclass(frozen=True)
class Dense(Features):
    """Averages as numbers.

    Attributes:
        rows: [n, M] float64.
    """

    rows: torch.Tensor

    reach = 6.0

    def scores(self, coefficients: torch.Tensor) -> torch.Tensor:
        return self.rows @ coefficients

    def frequencies(self, weights: torch.Tensor) -> torch.Tensor:
        return (self.counts * weights) @ self.rows / self.total

    def covariance(self, weights: torch.Tensor) -> torch.Tensor:
        mass = self.counts * weights / self.total
        # Centred first: averages of many tokens differ by little.
        rows = self.rows - mass @ self.rows / max(float(mass.sum()), 1e-300)
        return (rows * mass[:, None]).T @ rows

    def thinned(self) -> Dense:
        return self

    def finer(self, sample: Features) -> Dense:
        return self

    def completed(self, covariance: torch.Tensor, frequency: torch.Tensor, mean: float) -> torch.Tensor:
        return covariance


@dataclass(frozen=True)
class Averages(Features):
    """Averages that stay bits, where there are too many to hold as numbers.

    Attributes:
        bits: [P, ceil(M / 8)] uint8, of the positions; the documents in order of their length.
        groups: (documents, length) of those documents that have so many positions each, in order.
        first, last: [n] int64, the positions that a unit averages over, both included.
        whole: [n] bool, whether `first` is where the document begins.
    """

    bits: torch.Tensor
    groups: list[tuple[int, int]]
    first: torch.Tensor
    last: torch.Tensor
    whole: torch.Tensor

    reach = Dense.reach

    def _running(self, values: torch.Tensor, backwards: bool = False) -> torch.Tensor:
        """[P] float64: sums from the document's beginning to each position, or from its end back to each.

        Document by document, so that a sum does not depend on what other documents hold.
        """
        sums = torch.empty_like(values)
        at = 0
        for documents, length in self.groups:
            part = values[at : at + documents * length].view(documents, length)
            summed = part.flip(1).cumsum(1).flip(1) if backwards else part.cumsum(1)
            sums[at : at + documents * length] = summed.flatten()
            at += documents * length
        return sums

    def scores(self, coefficients: torch.Tensor) -> torch.Tensor:
        sums = self._running(tk.hit_scores(self.bits, coefficients))
        found = sums[self.last]
        cut = ~self.whole
        found[cut] -= sums[self.first[cut] - 1]
        return found / (self.last - self.first + 1)

    def frequencies(self, weights: torch.Tensor) -> torch.Tensor:
        share = self.counts * weights / (self.last - self.first + 1)
        position = torch.zeros(len(self.bits), dtype=torch.float64)
        position[self.last] = share  # no two units of a document end, nor begin within it, at the same position
        cut = ~self.whole
        position[self.first[cut] - 1] -= share[cut]
        return tk.hit_moments(self.bits, self._running(position, backwards=True), self.num_bits) / self.total

    def covariance(self, weights: torch.Tensor) -> torch.Tensor:
        """Document by document in float32, added up in float64: slow, for when no sample of the units is enough."""
        mass = self.counts * weights / self.total
        center = (self.frequencies(weights) / max(float(mass.sum()), 1e-300)).float()
        unit = torch.full((len(self.bits),), -1, dtype=torch.int64)
        unit[self.last] = torch.arange(len(self.last))
        found = torch.zeros(self.num_bits, self.num_bits, dtype=torch.float64)
        at = 0
        for documents, length in self.groups:
            step = max(1, _CHUNK // max(1, length * self.num_bits))
            for begin in range(at, at + documents * length, step * length):
                end = min(begin + step * length, at + documents * length)
                units = unit[begin:end]
                units = units[units >= 0]
                rows = self._averages(begin, end, length, units) - center
                found += ((rows * mass[units, None].float()).T @ rows).double()
            at += documents * length
        return found

    def _averages(self, begin: int, end: int, length: int, units: torch.Tensor) -> torch.Tensor:
        """[u, M] float32 of units that lie in positions [begin, end), whole documents of one length."""
        bits = np.unpackbits(self.bits[begin:end].numpy(), axis=1, count=self.num_bits)
        sums = torch.from_numpy(bits).view(-1, length, self.num_bits).cumsum(1, dtype=torch.float32).flatten(0, 1)
        rows = sums[self.last[units] - begin]
        cut = ~self.whole[units]
        rows[cut] -= sums[self.first[units][cut] - 1 - begin]
        return rows / (self.last - self.first + 1)[units, None]

    def thinned(self) -> Dense:
        return self._drawn(min(_SAMPLE, _ENTRIES // max(1, self.num_bits)))

    def finer(self, sample: Features) -> Features:
        if sample is self:
            return self
        size = _FINER * min(_SAMPLE, _ENTRIES // max(1, self.num_bits))
        return self if len(sample.counts) >= size or size >= len(self.counts) else self._drawn(size)

    def completed(self, covariance: torch.Tensor, frequency: torch.Tensor, mean: float) -> torch.Tensor:
        """A pair that the sample does not see has the variance of bits, the largest that averages can have."""
        bound = (frequency - frequency**2 / max(mean, 1e-300)).clamp(min=0)
        unseen = covariance.diagonal() <= 1e-12
        covariance.diagonal()[unseen] = bound[unseen]
        return covariance

    def _drawn(self, size: int) -> Dense:
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(self.counts), generator=generator)[:size].sort().values
        return self.dense(chosen)

    def dense(self, chosen: torch.Tensor) -> Dense:
        """The features of some units as numbers."""
        first = self.first[chosen]
        length = self.last[chosen] - first + 1
        ends = length.cumsum(0)
        rows = torch.empty(len(chosen), self.num_bits, dtype=torch.float64)
        begin = 0
        while begin < len(chosen):
            before = int(ends[begin - 1]) if begin else 0
            most = before + _CHUNK // max(1, self.num_bits)
            end = max(begin + 1, int(torch.searchsorted(ends, most, right=True)))
            part = length[begin:end]
            starts = part.cumsum(0) - part
            positions = torch.arange(int(part.sum())) + torch.repeat_interleave(first[begin:end] - starts, part)
            bits = np.unpackbits(self.bits[positions].numpy(), axis=1, count=self.num_bits)
            rows[begin:end] = torch.from_numpy(np.add.reduceat(bits, starts.numpy(), axis=0, dtype=np.int32))
            begin = end
        rows /= length[:, None]
        return Dense(self.counts[chosen], torch.empty(0, dtype=torch.int32), self.num_bits, rows)


def _by_length(bits: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """The bits with the documents of [D] `sizes` in order of length, that order, and the groups."""
    order = sizes.sort(stable=True).indices
    ordered = sizes[order]
    lengths, documents = torch.unique_consecutive(ordered, return_counts=True)
    if not torch.equal(ordered, sizes):
        # Where a document begins minus where it will begin, at each of its positions.
        shift = torch.repeat_interleave((sizes.cumsum(0) - sizes)[order] - (ordered.cumsum(0) - ordered), ordered)
        bits = bits[torch.arange(len(bits)) + shift]
    return bits, order, list(zip(documents.tolist(), lengths.tolist(), strict=True))


def of_documents(hits: torch.Tensor, offsets: torch.Tensor, num_bits: int) -> Features:
    """One unit a document with counted tokens: the mean hits of these tokens.

    Args:
        hits: [N, ceil(M / 8)] uint8, of the counted tokens, document by document.
        offsets: [D + 1] int64, where each document's begin.
        num_bits: M.
    """
    sizes = offsets.diff()
    sizes = sizes[sizes > 0]
    bits, order, groups = _by_length(hits, sizes)
    ordered = sizes[order]
    last = ordered.cumsum(0) - 1
    place = torch.empty(len(order), dtype=torch.int32)
    place[order] = torch.arange(len(order), dtype=torch.int32)
    found = Averages(
        ordered.double(),
        torch.repeat_interleave(place, sizes),
        num_bits,
        bits,
        groups,
        last - ordered + 1,
        last,
        torch.ones(len(sizes), dtype=torch.bool),
    )
    return _as_numbers(found)


def of_contexts(
    hits: torch.Tensor, counted: torch.Tensor, offsets: torch.Tensor, window: int | None, num_bits: int
) -> Features:
    """One unit a counted token: the mean hits of the positions that its loss reads, it and those before it.

    Args:
        hits: [P, ceil(M / 8)] uint8, of all positions that some counted token's loss reads, document by document.
        counted: [P] bool; the last position of each document is a counted one.
        offsets: [D + 1] int64, where each document's counted tokens begin among all counted ones.
        window: the positions that attention reads at most, the token's own among them; None for all.
        num_bits: M.
    """
    tokens = offsets.diff()
    tokens = tokens[tokens > 0]
    place = counted.nonzero().flatten()
    sizes = torch.diff(place[tokens.cumsum(0) - 1], prepend=torch.tensor([-1]))  # a document ends with a counted token
    bits, order, groups = _by_length(hits, sizes)
    begin = torch.empty_like(sizes)
    begin[order] = sizes[order].cumsum(0) - sizes[order]
    last = place + torch.repeat_interleave(begin - (sizes.cumsum(0) - sizes), tokens)
    begin = torch.repeat_interleave(begin, tokens)
    first = begin if window is None else torch.maximum(begin, last - window + 1)
    found = Averages(
        torch.ones(len(last), dtype=torch.float64),
        torch.arange(len(last), dtype=torch.int32),
        num_bits,
        bits,
        groups,
        first,
        last,
        first == begin,
    )
    return _as_numbers(found)


def _as_numbers(found: Averages) -> Features:
    """As numbers where there are few enough."""
    if len(found.counts) > min(_SAMPLE, _ENTRIES // max(1, found.num_bits)):
        return found
    dense = found.dense(torch.arange(len(found.counts)))
    return Dense(dense.counts, found.token_row, dense.num_bits, dense.rows)


def unit_means(
    values: torch.Tensor, unit: str, counted: torch.Tensor, attended: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """[B, S]: of values [B, S] of positions, the mean over each position's unit; what is not counted does not matter.

    Args:
        values: [B, S] float.
        unit: "token": the position alone; "document": the counted positions of its row; "context": the attended ones up
            to it.
        counted: [B, S] bool, where loss is borne.
        attended: [B, S] bool, where there is no padding.
        window: the positions that attention reads at most, its own among them; None for all.

    Example:
        >>> values, some = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[False, True, True]])
        >>> unit_means(values, "document", some, some | True).tolist()
        [[4.0, 4.0, 4.0]]
        >>> unit_means(values, "context", some, some | True).tolist()
        [[1.0, 1.5, 3.0]]
    """
    if unit == "token":
        return values
    values = values.double()
    if unit == "document":
        mean = values.where(counted, 0.0).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp(min=1)
        return mean.expand_as(values).float()
    sums, number = values.where(attended, 0.0).cumsum(1), attended.cumsum(1)
    if window is not None and window < values.shape[1]:
        sums[:, window:] -= sums[:, :-window].clone()
        number[:, window:] -= number[:, :-window].clone()
    return (sums / number.clamp(min=1)).float()
