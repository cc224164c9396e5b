"""Which experts are forget-critical: rank rules, limits, and how sure the frequencies are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from trace_unlearn.errors import UserError
from trace_unlearn.routing.statistics import RoutingStatistics

RANKS = ("log_ratio", "difference", "ratio", "z_score")
_Z = 1.959963984540054  # of a two-sided 95 % interval


@dataclass(frozen=True)
class Selection:
    """The rule by which (MoE layer, expert) pairs become forget-critical.

    A pair qualifies when f > r, f >= tau * k / E, at least `min_count` forget tokens activate it, and its rank value
    reaches `threshold`. Of those, the highest-ranked of each layer are taken, then the highest-ranked of all layers.

    Attributes:
        experts_per_layer: at most so many a layer; None for all that qualify.
        tau: 1 asks for at least the activation of a perfectly even routing.
        rank: the rank value of a pair:

            - "log_ratio": f log(f / r), its term of the Kullback-Leibler divergence of forget from retain routing;
            - "difference": f - r; prefers experts that are busy anyway;
            - "ratio": f / r; prefers rare experts, and has the most noise;
            - "z_score": (f - r) over its standard error, the two-proportion test with pooled frequency, corrected
              for tokens of one document being alike where the statistics hold design effects.
        threshold: the least rank value; None for any above 0 (1 for "ratio"), which f > r implies.
        max_experts: at most so many over all layers; None for no such limit.
        min_count: the fewest forget tokens that activate the pair. A frequency from fewer says little.
    """

    experts_per_layer: int | None = 4
    tau: float = 1.0
    rank: str = "log_ratio"
    threshold: float | None = None
    max_experts: int | None = None
    min_count: int = 5

    def __post_init__(self) -> None:
        for name in ("experts_per_layer", "max_experts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}: got {value}, allowed is 1 or more (or null for all)")
        if not 0 <= self.tau < math.inf:
            raise UserError(f"tau: got {self.tau}, allowed are finite numbers from 0")
        if self.rank not in RANKS:
            raise UserError(f"rank: got {self.rank!r}, allowed: {', '.join(map(repr, RANKS))}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UserError(f"threshold: got {self.threshold}, allowed are finite numbers (or null for none)")
        if self.min_count < 0:
            raise UserError(f"min_count: got {self.min_count}, allowed is 0 or more")

    def take(self, stats: RoutingStatistics) -> torch.Tensor:
        """[M, 2] int64 (MoE layer, expert), by layer and then by expert; M may be 0."""
        value, qualifies = rank_values(stats, self.rank), self._qualifies(stats)
        if self.threshold is not None:
            qualifies &= value >= self.threshold
        value = torch.where(qualifies, value, -torch.inf)
        best = value.sort(dim=1, descending=True, stable=True).indices[:, : self.experts_per_layer]
        kept = torch.zeros_like(qualifies).scatter(1, best, True) & qualifies
        if self.max_experts is not None:
            value = torch.where(kept, value, -torch.inf).flatten()
            best = value.sort(descending=True, stable=True).indices[: self.max_experts]
            kept &= torch.zeros_like(value, dtype=torch.bool).scatter(0, best, True).view_as(kept)
        return kept.nonzero()

    def _qualifies(self, stats: RoutingStatistics) -> torch.Tensor:
        f, r = frequencies(stats)
        even = stats.top_k / f.shape[1]
        return (f > r) & (f >= self.tau * even) & (stats.forget_counts >= self.min_count)

    def why_empty(self, stats: RoutingStatistics) -> str:
        """Which limit to lower, and how far, when nothing is selected."""
        f, r = frequencies(stats)
        above = f > r
        if not bool(above.any()):
            return "no expert is forget-critical: forget and retain data activate every expert equally often"
        enough = above & (stats.forget_counts >= self.min_count)
        if not bool(enough.any()):
            most = int(stats.forget_counts[above].max())
            return (
                f"no expert is forget-critical: the forget set is small, the busiest expert with f > r has {most} of "
                f"its tokens. Use more forget data, or lower min_count (now {self.min_count}) to {most} or less"
            )
        if not bool(self._qualifies(stats).any()):
            highest = float((f[enough] * f.shape[1] / stats.top_k).max())
            return (
                f"no expert is forget-critical: the highest f of those with f > r is {highest:.3f} k / E. Lower tau "
                f"(now {self.tau}) to {math.floor(1000 * highest) / 1000} or less"
            )
        highest = float(rank_values(stats, self.rank)[self._qualifies(stats)].max())
        return (
            f"no expert is forget-critical: the highest {self.rank} is {highest:.4g}. Lower threshold (now "
            f"{self.threshold})"
        )


def select_experts(
    stats: RoutingStatistics,
    *,
    experts_per_layer: int | None = 4,
    tau: float = 1.0,
    rank: str = "log_ratio",
    threshold: float | None = None,
    max_experts: int | None = None,
    min_count: int = 5,
) -> torch.Tensor:
    """The forget-critical pairs; see `Selection` for what the settings mean.

    Returns:
        [M, 2] int64 (MoE layer, expert), by layer and then by expert; M may be 0.

    Raises:
        UserError: a setting out of range, or statistics without tokens.

    Example:
        >>> stats = RoutingStatistics(torch.tensor([[30, 10, 0]]), torch.tensor([[2, 2, 4]]), 40, 8, 1,
        ...                           torch.zeros(8, 1, 1, dtype=torch.uint8), torch.tensor([0, 8]))
        >>> select_experts(stats).tolist()
        [[0, 0]]
    """
    return Selection(experts_per_layer, tau, rank, threshold, max_experts, min_count).take(stats)


def rank_values(stats: RoutingStatistics, rank: str) -> torch.Tensor:
    """[L, E] float64: the rank value of every pair; infinite for "log_ratio" and "ratio" where only r is 0."""
    f, r = frequencies(stats)
    if rank == "difference":
        return f - r
    if rank == "z_score":
        pooled = (stats.forget_counts + stats.retain_counts).double() / (stats.forget_tokens + stats.retain_tokens)
        spread = 1 / effective_tokens(stats, "forget") + 1 / effective_tokens(stats, "retain")
        error = (pooled * (1 - pooled) * spread).sqrt()
        return torch.where(f == r, 0.0, (f - r) / error)
    ratio = torch.where(f == 0, 0.0, f / r)
    if rank == "ratio":
        return ratio
    return torch.where(f == 0, 0.0, f * ratio.log())


def frequencies(stats: RoutingStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, E] float64 f and r."""
    if stats.forget_tokens < 1 or stats.retain_tokens < 1:
        raise UserError("statistics: hold no forget or no retain tokens; profile data that bears loss")
    return stats.forget_frequency, stats.retain_frequency


def effective_tokens(stats: RoutingStatistics, side: str) -> torch.Tensor:
    """[L, E] float64: as many independent tokens would show each frequency of `side` as surely as its tokens do."""
    tokens = stats.forget_tokens if side == "forget" else stats.retain_tokens
    effect = stats.forget_design_effect if side == "forget" else stats.retain_design_effect
    if effect is None:
        return torch.full(stats.forget_counts.shape, float(tokens), dtype=torch.float64)
    return tokens / effect.double()


def wilson_interval(frequency: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    r"""[..., 2] float64: the 95 % interval of Wilson (1927) for a frequency observed in `tokens` independent tokens.

    .. math:: \frac{n p + z^2 / 2 \pm z \sqrt{n p (1 - p) + z^2 / 4}}{n + z^2}

    It stays within [0, 1] and is right near its ends, also for few tokens; for none it is [0, 1].

    Example:
        >>> wilson_interval(torch.tensor([0.0, 0.5]), torch.tensor([100.0, 100.0])).tolist()
        [[0.0, 0.03699...], [0.40383..., 0.59616...]]
    """
    p, n = frequency.double(), tokens.double()
    middle = n * p + _Z**2 / 2
    half = _Z * (n * p * (1 - p) + _Z**2 / 4).sqrt()
    return (torch.stack([middle - half, middle + half], dim=-1) / (n + _Z**2)[..., None]).clamp(0, 1)
