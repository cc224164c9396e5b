"""Weighted gradient ascent."""

from __future__ import annotations

import torch

from trace_unlearn.training.objectives._totals import share


def wga(
    log_probs: torch.Tensor, mask: torch.Tensor, num_tokens: torch.Tensor | float, beta: float = 1.0
) -> torch.Tensor:
    r"""Gradient ascent that weighs each token by its own probability: what is forgotten already is let go.

    .. math:: L = \frac{1}{N} \sum_t \text{sg}(p_t)^\beta \log p_t

    sg stops the gradient. Source: Wang et al. 2025 (arXiv 2502.19301).

    Args:
        log_probs: [F, S] float.
        mask: [F, S] bool, the positions that count.
        num_tokens: N, the counted positions of the whole optimisation step; a step without any has loss 0.
        beta: > 0; the larger, the sooner a token is let go.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> log_probs = torch.tensor([[0.5, 0.25]]).log()
        >>> round(wga(log_probs, torch.tensor([[True, True]]), num_tokens=2).item(), 4)
        -0.3466
    """
    weight = (beta * log_probs.detach()).exp()
    return share(weight * log_probs.where(mask, 0.0), mask, num_tokens)
