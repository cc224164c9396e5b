"""What the backends of `cross_entropy` get beside the logits [T, V]."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """The targets [T] int64, contiguous, and the constants of a call."""

    target: torch.Tensor
    ignore_index: int
    softcap: float | None
    logit_scale: float

    @property
    def numbers(self) -> tuple[int, float, float]:
        """As kernels get them: a softcap of 0 is none."""
        return self.ignore_index, self.softcap or 0.0, self.logit_scale


class LogitGradient(NamedTuple):
    """D loss / dz of rows: ``constant * p + uniform`` (None: 0), at the target `target`; [T] each, contiguous.

    At the target it is a sum of small numbers, where the formula would be a difference of nearly equal ones.
    """

    constant: torch.Tensor
    uniform: torch.Tensor | None
    target: torch.Tensor

    def is_zero(self) -> torch.Tensor:
        zero = (self.constant == 0) & (self.target == 0)
        return zero if self.uniform is None else zero & (self.uniform == 0)
