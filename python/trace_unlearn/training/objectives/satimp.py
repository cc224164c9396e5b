"""Gradient ascent weighted by saturation and importance."""

from __future__ import annotations

import torch

from trace_unlearn.training.objectives._totals import share


def satimp(
    log_probs: torch.Tensor,
    mask: torch.Tensor,
    num_tokens: torch.Tensor | float,
    beta: float = 5.0,
    beta2: float = 1.0,
) -> torch.Tensor:
    r"""Gradient ascent that spares tokens forgotten already and, unlike WGA, also those that are certain.

    .. math:: L = \frac{1}{N} \sum_t \text{sg}\left(p_t^{\beta} (1 - p_t)^{\beta_2}\right) \log p_t

    sg stops the gradient. Source: Yang et al. 2025 (arXiv 2505.11953).

    Args:
        log_probs: [F, S] float.
        mask: [F, S] bool, the positions that count.
        num_tokens: N, the counted positions of the whole optimisation step; a step without any has loss 0.
        beta: > 0, the power of p.
        beta2: >= 0, the power of 1 - p.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> log_probs = torch.tensor([[0.5, 0.25]]).log()
        >>> round(satimp(log_probs, torch.tensor([[True, True]]), num_tokens=2, beta=1.0).item(), 4)
        -0.2166
    """
    constant = log_probs.detach().where(mask, 0.0)
    weight = (beta * constant).exp() * (-torch.expm1(constant)).clamp(min=0) ** beta2
    return share(weight * log_probs.where(mask, 0.0), mask, num_tokens)
