"""Direct preference optimisation towards another answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trace_unlearn.training.objectives._totals import share


def dpo(
    log_probs: torch.Tensor,
    mask: torch.Tensor,
    reference: torch.Tensor,
    preference: torch.Tensor,
    num_documents: torch.Tensor | float,
    beta: float,
) -> torch.Tensor:
    r"""Prefers an alternate answer to the one to forget. With refusals as alternates it is IdkDPO.

    .. math:: L = -\frac{2}{\beta D} \sum_d \log\sigma\left(\beta \left[
        (\log p - \log p^\text{ref})_\text{alternate} - (\log p - \log p^\text{ref})_\text{forget} \right]\right)

    over the sums of the documents' log-probabilities. At the original model L = 2 log(2) / beta. Source: Rafailov et
    al. 2023 (arXiv 2305.18290); for unlearning Maini et al. 2024 (arXiv 2401.06121).

    Args:
        log_probs: [F, S] float, of the answers to forget.
        mask: [F, S] bool, the positions that count. A document without any is no document.
        reference: [F] float, the original model's sums.
        preference: [F] float, by how much the alternate answer has become likelier: log p - log p_ref.
        num_documents: D, the documents of the whole optimisation step; a step without any has loss 0.
        beta: > 0.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> log_probs, mask = torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])
        >>> round(dpo(log_probs, mask, torch.tensor([-4.0]), torch.tensor([0.0]), num_documents=1, beta=0.1).item(), 4)
        13.8629
    """
    margin = preference - (log_probs.where(mask, 0.0).sum(-1) - reference)
    return share((-2.0 / beta) * F.logsigmoid(beta * margin), mask.any(-1), num_documents)
