"""Simple negative preference optimisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trace_unlearn.training.objectives._totals import share


def simnpo(
    log_probs: torch.Tensor,
    mask: torch.Tensor,
    num_documents: torch.Tensor | float,
    beta: float,
    delta: float = 0.0,
) -> torch.Tensor:
    r"""NPO without a reference model: each document's mean log-probability is pushed below -delta.

    .. math:: L = -\frac{2}{\beta D} \sum_d \log\sigma\left(\beta\,(\overline{\text{nll}}_d - \delta)\right), \qquad
        \overline{\text{nll}}_d = -\frac{1}{n_d} \sum_{t \in d} \log p_t

    Bounded below by 0; a document's pull fades once its mean NLL exceeds delta. Source: Fan et al. 2024 (arXiv
    2410.07163); its margin gamma is -beta * delta here, as in the open-unlearning code.

    Args:
        log_probs: [F, S] float.
        mask: [F, S] bool, the positions that count. A document without any is no document.
        num_documents: D, the documents of the whole optimisation step; a step without any has loss 0.
        beta: > 0.
        delta: nats per token.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> log_probs, mask = torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])
        >>> round(simnpo(log_probs, mask, num_documents=1, beta=2.0).item(), 4)
        0.0181
    """
    nll = -log_probs.where(mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    return share((-2.0 / beta) * F.logsigmoid(beta * (nll - delta)), mask.any(-1), num_documents)
