"""How a router turns logits into weights: the constants of a call, as every backend gets them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_topk")
GROUP_SCORES = ("max", "sum_top2", "sum_topk")


def in_float32(value: float) -> float:
    """The float32 nearest to a finite number of 0 or more, in arithmetic that torch.compile traces.

    Neither ctypes nor struct can be traced, and what makes a function a constant to torch.compile imports all of it.

    >>> in_float32(0.1), in_float32(1e-46), in_float32(1e39)
    (0.10000000149011612, 0.0, inf)
    """
    unit = math.ldexp(1.0, max(math.frexp(value)[1] - 24, -149))
    rounded = round(value / unit) * unit
    return rounded if rounded < 2.0**128 else math.inf


@dataclass(frozen=True)
class Rule:
    """The arguments of `router_topk` of the same names."""

    k: int
    score_function: str
    renormalize: bool
    scale: float
    eps: float
    num_groups: int
    topk_groups: int
    group_score: str
    masked_group_value: float

    @classmethod
    def of(
        cls, dtype: torch.dtype, k: int, score_function: str, renormalize: bool, scale: float, eps: float, *rest: Any
    ) -> Rule:
        """The rule for logits of `dtype`, with eps as its arithmetic sees it: what is 0 to a kernel is 0 here too."""
        if eps != 0.0 and dtype != torch.float64:
            eps = in_float32(eps)
        return cls(k, score_function, renormalize, scale, eps, *rest)

    @property
    def group_best(self) -> int:
        """The sum of how many of a group's best is its score."""
        return {"max": 1, "sum_top2": 2, "sum_topk": self.k // self.topk_groups}[self.group_score]

    @functools.cached_property
    def compiled(self) -> tuple[int, int, bool, float, float, int, int, int, float]:
        """As the compiled kernels take it (csrc/ops/router_topk/rule.h)."""
        function = SCORE_FUNCTIONS.index(self.score_function)
        of_groups = (self.num_groups, self.topk_groups, self.group_best, self.masked_group_value)
        return (self.k, function, self.renormalize, self.scale, self.eps, *of_groups)

    @property
    def dense_gradient(self) -> bool:
        """Whether experts that were not chosen get a gradient.

        They do not where the chosen scores decide the weights alone: element-wise scores, and a softmax whose
        denominator the renormalisation cancels.
        """
        return self.score_function == "softmax" and (not self.renormalize or self.eps != 0.0)
