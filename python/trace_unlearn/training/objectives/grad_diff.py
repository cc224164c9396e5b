"""Gradient difference: ascend on the forget data."""

from __future__ import annotations

import torch


def grad_diff(log_probs: torch.Tensor, mask: torch.Tensor, num_tokens: torch.Tensor | float) -> torch.Tensor:
    r"""The mean log-probability of the forget tokens, which descent lowers.

    .. math:: L = -\frac{1}{N} \sum_t \text{nll}_t = \frac{1}{N} \sum_t \log p_t

    It has no lower bound: stop by the forget loss, and clip the gradient. Source: Yao et al. 2023 (arXiv 2310.10683),
    Liu et al. 2022 (arXiv 2203.12817).

    Args:
        log_probs: [F, S] float.
        mask: [F, S] bool, the positions that count.
        num_tokens: N, the counted positions of the whole optimisation step; a step without any has loss 0.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> log_probs = torch.tensor([[-1.0, -3.0, -9.0]])
        >>> grad_diff(log_probs, torch.tensor([[True, True, False]]), num_tokens=2).item()
        -2.0
    """
    tokens = num_tokens.clamp(min=1) if isinstance(num_tokens, torch.Tensor) else max(num_tokens, 1)
    return log_probs.where(mask, 0.0).sum() / tokens
