"""Unlearning objectives: pure functions from per-token log-probabilities to a loss, one file each.

The totals that a loss divides by belong to the whole optimisation step: a micro-batch gives its share of the loss, and
the shares of all micro-batches and processes add up to the loss of the step, however it was split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from trace_unlearn.training.objectives.anchor import anchor
from trace_unlearn.training.objectives.ce_u import ce_u
from trace_unlearn.training.objectives.dpo import dpo
from trace_unlearn.training.objectives.grad_diff import grad_diff
from trace_unlearn.training.objectives.npo import npo
from trace_unlearn.training.objectives.retain import weighted_mean, weighted_nll
from trace_unlearn.training.objectives.rmu import distance, rmu, steering_vector
from trace_unlearn.training.objectives.satimp import satimp
from trace_unlearn.training.objectives.simnpo import simnpo
from trace_unlearn.training.objectives.undial import undial
from trace_unlearn.training.objectives.wga import wga

if TYPE_CHECKING:
    from trace_unlearn.training.config import TraceConfig

__all__ = [
    "OBJECTIVES",
    "ForgetBatch",
    "Objective",
    "anchor",
    "ce_u",
    "distance",
    "dpo",
    "grad_diff",
    "npo",
    "rmu",
    "satimp",
    "simnpo",
    "steering_vector",
    "undial",
    "weighted_mean",
    "weighted_nll",
    "wga",
]


@dataclasses.dataclass(frozen=True)
class ForgetBatch:
    """The forget documents of one micro-batch, as the model sees them now; what an objective does not use is absent."""

    log_probs: torch.Tensor  # [F, S] float32: position t holds log p(token t + 1)
    mask: torch.Tensor  # [F, S] bool: which positions bear loss
    reference: torch.Tensor | None  # [F] float32: the original model's log-probability of each document
    num_tokens: torch.Tensor  # 0-d, loss-bearing forget tokens in the whole step
    num_documents: torch.Tensor  # 0-d, forget documents with such a token in the whole step
    alternate: torch.Tensor | None = None  # [F] float32: log-probability of the answer to give instead
    alternate_reference: torch.Tensor | None = None  # [F] float32: by the original model
    divergence: torch.Tensor | None = None  # [F, S] float32: KL(original model || model) of each position
    reference_log_probs: torch.Tensor | None = None  # [F, S] float32: as log_probs, by the original model
    hidden: torch.Tensor | None = None  # [F, S, H]: a layer's output
    steering: torch.Tensor | None = None  # [H]: where it is steered


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is done to the forget set.

    Attributes:
        forget_loss: (batch, config) -> this micro-batch's share of the step's loss; None: there is no forget set.
        beta: the published strength.
        uses_retain: there is a retain loss.
        needs_reference: of the original model, each document's log-probability.
        needs_alternate: answers to give instead.
        needs_divergence: of the original model, all there is to say about each forget token.
        on_hidden_states: the loss is on a layer's output, and no output layer is computed.
        is_mean: the forget loss, if any, is minus the mean NLL of the forget tokens, so its gradient by each is known.
    """

    forget_loss: Callable[[ForgetBatch, TraceConfig], torch.Tensor] | None
    beta: float = 1.0
    uses_retain: bool = True
    needs_reference: bool = False
    needs_alternate: bool = False
    needs_divergence: bool = False
    on_hidden_states: bool = False
    is_mean: bool = False


def _beta(config: TraceConfig) -> float:
    assert config.beta is not None
    return config.beta


def _grad_diff(batch: ForgetBatch, config: TraceConfig) -> torch.Tensor:
    return grad_diff(batch.log_probs, batch.mask, batch.num_tokens)


def _npo(batch: ForgetBatch, config: TraceConfig) -> torch.Tensor:
    assert batch.reference is not None
    return npo(batch.log_probs, batch.mask, batch.reference, batch.num_documents, _beta(config))


def _simnpo(batch: ForgetBatch, config: TraceConfig) -> torch.Tensor:
    return simnpo(batch.log_probs, batch.mask, batch.num_documents, _beta(config), config.delta)


def _dpo(batch: ForgetBatch, config: TraceConfig) -> torch.Tensor:
    assert batch.reference is not None
    assert batch.alternate is not None
    assert batch.alternate_reference is not None
    preference = batch.alternate - batch.alternate_reference
    return dpo(batch.log_probs, batch.mask, batch.reference, preference, batch.num_documents, _beta(config))


def _undial(batch: ForgetBatch, config: TraceConfig) -> torch.Tensor:
    assert batch.divergence is not None
    assert batch.reference_log_probs is not None
    reference = batch.reference_log_probs
    return undial(batch.log_probs, batch.divergence, reference, batch.mask, batch.num_tokens, _beta(config))


def _rmu(batch: ForgetBatch, config: TraceConfig) -> torch.Tensor:
    assert batch.hidden is not None
    assert batch.steering is not None
    return rmu(batch.hidden, batch.mask, batch.steering, batch.num_tokens)


OBJECTIVES = {
    "grad_diff": Objective(_grad_diff, is_mean=True),
    "npo": Objective(_npo, 0.1, needs_reference=True),
    "simnpo": Objective(_simnpo, 4.5),
    "grad_ascent": Objective(_grad_diff, uses_retain=False, is_mean=True),
    "wga": Objective(lambda batch, config: wga(batch.log_probs, batch.mask, batch.num_tokens, _beta(config))),
    "satimp": Objective(
        lambda batch, config: satimp(batch.log_probs, batch.mask, batch.num_tokens, _beta(config), config.beta2), 5.0
    ),
    "ce_u": Objective(lambda batch, config: ce_u(batch.log_probs, batch.mask, batch.num_tokens)),
    "dpo": Objective(_dpo, 0.1, needs_reference=True, needs_alternate=True),
    "undial": Objective(_undial, 10.0, needs_divergence=True),
    "rmu": Objective(_rmu, on_hidden_states=True),
    "finetune": Objective(None, is_mean=True),
}
