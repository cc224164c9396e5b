"""Unlearning objectives: pure functions from per-token log-probabilities to a loss, one file each.

The totals that a loss divides by belong to the whole optimisation step: a micro-batch gives its share of the loss, and
the shares of all micro-batches and processes add up to the loss of the step, however it was split.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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

__all__ = [
    "OBJECTIVES",
    "ForgetBatch",
    "Knobs",
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
class Knobs:
    """The strengths that objectives take; `trace_unlearn.training.config.TraceConfig` says which takes which."""

    beta: float = 1.0
    beta2: float = 1.0
    delta: float = 0.0


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is done to the forget set.

    Attributes:
        forget_loss: (batch, knobs) -> this micro-batch's share of the step's loss; None: there is no forget set.
        beta: the published strength.
        uses_retain: there is a retain loss.
        needs_reference: of the original model, each document's log-probability.
        needs_alternate: answers to give instead.
        needs_divergence: of the original model, all there is to say about each forget token.
        on_hidden_states: the loss is on a layer's output, and no output layer is computed.
        knobs: the options that it takes, for the model card.
        formula: the forget loss in one line, for the model card.
        is_mean: the forget loss, if any, is minus the mean NLL of the forget tokens, so its gradient by each is known.
    """

    forget_loss: Callable[[ForgetBatch, Knobs], torch.Tensor] | None
    beta: float = 1.0
    uses_retain: bool = True
    needs_reference: bool = False
    needs_alternate: bool = False
    needs_divergence: bool = False
    on_hidden_states: bool = False
    is_mean: bool = False
    knobs: tuple[str, ...] = ()
    formula: str = ""


def _grad_diff(batch: ForgetBatch, knobs: Knobs) -> torch.Tensor:
    return grad_diff(batch.log_probs, batch.mask, batch.num_tokens)


def _npo(batch: ForgetBatch, knobs: Knobs) -> torch.Tensor:
    assert batch.reference is not None
    return npo(batch.log_probs, batch.mask, batch.reference, batch.num_documents, knobs.beta)


def _simnpo(batch: ForgetBatch, knobs: Knobs) -> torch.Tensor:
    return simnpo(batch.log_probs, batch.mask, batch.num_documents, knobs.beta, knobs.delta)


def _dpo(batch: ForgetBatch, knobs: Knobs) -> torch.Tensor:
    assert batch.reference is not None
    assert batch.alternate is not None
    assert batch.alternate_reference is not None
    preference = batch.alternate - batch.alternate_reference
    return dpo(batch.log_probs, batch.mask, batch.reference, preference, batch.num_documents, knobs.beta)


def _undial(batch: ForgetBatch, knobs: Knobs) -> torch.Tensor:
    assert batch.divergence is not None
    assert batch.reference_log_probs is not None
    reference = batch.reference_log_probs
    return undial(batch.log_probs, batch.divergence, reference, batch.mask, batch.num_tokens, knobs.beta)


def _rmu(batch: ForgetBatch, knobs: Knobs) -> torch.Tensor:
    assert batch.hidden is not None
    assert batch.steering is not None
    return rmu(batch.hidden, batch.mask, batch.steering, batch.num_tokens)


OBJECTIVES = {
    "grad_diff": Objective(
        _grad_diff,
        is_mean=True,
        formula="minus the mean negative log-likelihood of the forget tokens (gradient difference)",
    ),
    "npo": Objective(
        _npo,
        0.1,
        needs_reference=True,
        knobs=("beta",),
        formula="NPO, -(2/beta) log sigmoid(-beta log(p / p_ref)), the mean over forget documents",
    ),
    "simnpo": Objective(
        _simnpo,
        4.5,
        knobs=("beta", "delta"),
        formula="SimNPO, -(2/beta) log sigmoid(beta (mean token NLL - delta)), the mean over forget documents",
    ),
    "grad_ascent": Objective(
        _grad_diff,
        uses_retain=False,
        is_mean=True,
        formula="minus the mean negative log-likelihood of the forget tokens (gradient ascent), and no retain loss",
    ),
    "wga": Objective(
        lambda batch, knobs: wga(batch.log_probs, batch.mask, batch.num_tokens, knobs.beta),
        knobs=("beta",),
        formula="WGA, minus the token NLL weighted by p^beta",
    ),
    "satimp": Objective(
        lambda batch, knobs: satimp(batch.log_probs, batch.mask, batch.num_tokens, knobs.beta, knobs.beta2),
        5.0,
        knobs=("beta", "beta2"),
        formula="SatImp, minus the token NLL weighted by p^beta (1 - p)^beta2",
    ),
    "ce_u": Objective(
        lambda batch, knobs: ce_u(batch.log_probs, batch.mask, batch.num_tokens),
        formula="CE-U, the cross-entropy to the model's own distribution without the true token",
    ),
    "dpo": Objective(
        _dpo,
        0.1,
        needs_reference=True,
        needs_alternate=True,
        knobs=("beta",),
        formula="DPO, which prefers the alternate answer to the forgotten one",
    ),
    "undial": Objective(
        _undial,
        10.0,
        needs_divergence=True,
        knobs=("beta",),
        formula="UNDIAL, the KL divergence from the original model's distribution with the true logit lowered by beta",
    ),
    "rmu": Objective(
        _rmu,
        on_hidden_states=True,
        knobs=("layer", "steering"),
        formula="RMU, the distance of a layer's hidden states from a fixed random direction",
    ),
    "finetune": Objective(None, is_mean=True),
}
