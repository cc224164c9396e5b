"""The router anchor of SEUF."""

from __future__ import annotations

import torch


def anchor(probabilities: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    r"""How far the router is from sending a token to the target experts.

    .. math:: L_t = \|g_t - a\|^2, \qquad a_e = 1 \text{ for target experts, else } 0

    Unlearning else moves the router: forget tokens go to other experts, and knowledge stays in the ones that held it.
    Source: Zhuang et al. 2024, SEUF (arXiv 2411.18797), equation 3; of theirs no code is public.

    Args:
        probabilities: [..., E] float, the router's softmax.
        target: [E] bool.

    Returns:
        [...]: a loss per token.

    Example:
        >>> anchor(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([True, False, False])).item()
        0.5
    """
    return (probabilities.float() - target.float()).square().sum(-1)
