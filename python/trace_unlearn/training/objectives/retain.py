"""The retain loss: a token-weighted mean."""

from __future__ import annotations

import torch


def weighted_mean(losses: torch.Tensor, weight: torch.Tensor, normalizer: torch.Tensor | float) -> torch.Tensor:
    r"""The weighted mean of a loss a token: its NLL, its KL divergence, the distance of its hidden state.

    .. math:: L = \frac{\sum_t w_t \,\ell_t}{\sum_t w_t}

    Args:
        losses: [R, S] float.
        weight: [R, S] float, 0 where a position does not count.
        normalizer: the sum of the weights of the whole optimisation step; when it is 0 the loss is 0.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> weighted_mean(torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, 1.0]]), normalizer=4.0).item()
        1.75
    """
    total = (losses.where(weight != 0, 0.0) * weight).sum()
    if isinstance(normalizer, torch.Tensor):
        return total / torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)
    return total / (normalizer or 1.0)


def weighted_nll(log_probs: torch.Tensor, weight: torch.Tensor, normalizer: torch.Tensor | float) -> torch.Tensor:
    """`weighted_mean` of the negative log-likelihood.

    Example:
        >>> weighted_nll(torch.tensor([[-1.0, -4.0]]), torch.tensor([[3.0, 1.0]]), normalizer=4.0).item()
        1.75
    """
    return weighted_mean(-log_probs, weight, normalizer)
