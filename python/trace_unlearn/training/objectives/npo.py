"""Negative preference optimisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def npo(
    log_probs: torch.Tensor,
    mask: torch.Tensor,
    reference: torch.Tensor,
    num_documents: torch.Tensor | float,
    beta: float,
) -> torch.Tensor:
    r"""Pushes each forget document's log-probability below the original model's, less the further it is.

    .. math:: L = -\frac{2}{\beta D} \sum_d \log\sigma\left(-\beta\,(\log p_d - \log p^\text{ref}_d)\right), \qquad
        \log p_d = \sum_{t \in d} \log p_t

    At the original model L = 2 log(2) / beta, and its gradient is that of gradient ascent on the document sums; it
    fades as a document is forgotten, so that L is bounded below by 0. beta to 0 gives gradient ascent. Source: Zhang
    et al. 2024 (arXiv 2404.05868), sequence sums as there.

    Args:
        log_probs: [F, S] float.
        mask: [F, S] bool, the positions that count. A document without any is no document.
        reference: [F] float, the original model's sums.
        num_documents: D, the documents of the whole optimisation step; a step without any has loss 0.
        beta: > 0.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> log_probs, mask = torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])
        >>> round(npo(log_probs, mask, torch.tensor([-4.0]), num_documents=1, beta=0.1).item(), 4)
        13.8629
    """
    margin = log_probs.where(mask, 0.0).sum(-1) - reference
    losses = (-2.0 / beta) * F.logsigmoid(-beta * margin)
    documents = num_documents.clamp(min=1) if isinstance(num_documents, torch.Tensor) else max(num_documents, 1)
    return losses.where(mask.any(-1), 0.0).sum() / documents
