"""Unlearning objectives: pure functions from per-token log-probabilities to a loss, one file each.

The totals that a loss divides by belong to the whole optimisation step: a micro-batch gives its share of the loss, and
the shares of all micro-batches and processes add up to the loss of the step, however it was split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from trace_unlearn.objectives.grad_diff import grad_diff
from trace_unlearn.objectives.npo import npo
from trace_unlearn.objectives.retain import weighted_nll

__all__ = ["OBJECTIVES", "ForgetBatch", "Objective", "grad_diff", "npo", "weighted_nll"]


@dataclasses.dataclass(frozen=True)
class ForgetBatch:
    """The forget documents of one micro-batch, as the model sees them now."""

    log_probs: torch.Tensor  # [F, S] float32: position t holds log p(token t + 1)
    mask: torch.Tensor  # [F, S] bool: which positions bear loss
    reference: torch.Tensor | None  # [F] float32: the original model's log-probability of each document
    num_tokens: torch.Tensor  # 0-d, loss-bearing forget tokens in the whole step
    num_documents: torch.Tensor  # 0-d, forget documents with such a token in the whole step


@dataclasses.dataclass(frozen=True)
class Objective:
    """What pushes the forget data out: `forget_loss(batch, beta)` is this micro-batch's share of the step's loss."""

    forget_loss: Callable[[ForgetBatch, float], torch.Tensor]
    needs_reference: bool


def _npo(batch: ForgetBatch, beta: float) -> torch.Tensor:
    assert batch.reference is not None
    return npo(batch.log_probs, batch.mask, batch.reference, batch.num_documents, beta)


OBJECTIVES = {
    "grad_diff": Objective(lambda batch, beta: grad_diff(batch.log_probs, batch.mask, batch.num_tokens), False),
    "npo": Objective(_npo, True),
}
