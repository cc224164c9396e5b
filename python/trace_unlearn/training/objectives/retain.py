"""The retain loss: a token-weighted sum over the number of tokens."""

from __future__ import annotations

import torch


def weighted_mean(losses: torch.Tensor, weight: torch.Tensor, normalizer: torch.Tensor | float) -> torch.Tensor:
    r"""The mean of w l over tokens, l the loss of one: its NLL, its KL divergence, the distance of its hidden state.

    .. math:: L = \frac{1}{N} \sum_t w_t \,\ell_t

    Args:
        losses: [R, S] float.
        weight: [R, S] float, 0 where a position does not count.
        normalizer: N, the counted tokens of the whole optimisation step; when it is 0 the loss is 0. Weights whose mean
            over the data is 1 need no sum of their own: divided by it, a step of few documents would bring all of them
            to the same weight.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> weighted_mean(torch.tensor([[1.0, 4.0]]), torch.tensor([[3.0, 1.0]]), normalizer=2).item()
        3.5
    """
    total = (losses.where(weight != 0, 0.0) * weight).sum()
    if isinstance(normalizer, torch.Tensor):
        return total / torch.where(normalizer == 0, torch.ones_like(normalizer), normalizer)
    return total / (normalizer or 1.0)


def weighted_nll(log_probs: torch.Tensor, weight: torch.Tensor, normalizer: torch.Tensor | float) -> torch.Tensor:
    """`weighted_mean` of the negative log-likelihoods.

    Example:
        >>> weighted_nll(torch.tensor([[-1.0, -4.0]]), torch.tensor([[3.0, 1.0]]), normalizer=2).item()
        3.5
    """
    return weighted_mean(-log_probs, weight, normalizer)
