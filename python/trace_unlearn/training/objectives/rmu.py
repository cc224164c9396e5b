"""RMU: representation misdirection for unlearning."""

from __future__ import annotations

import torch

from trace_unlearn.training.objectives._totals import share


def steering_vector(size: int, length: float, seed: int) -> torch.Tensor:
    r"""[size] float32: :math:`c\,u / \|u\|` with u uniform in [0, 1), the same for a seed on every machine.

    Example:
        >>> round(steering_vector(64, length=3.0, seed=0).norm().item(), 4)
        3.0
    """
    direction = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return direction * (length / float(direction.norm()))


def distance(hidden: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    r"""[...] float32: the mean over the last dimension of the squared differences."""
    return (hidden.float() - other.float()).square().mean(-1)


def rmu(
    hidden: torch.Tensor, mask: torch.Tensor, steering: torch.Tensor, num_tokens: torch.Tensor | float
) -> torch.Tensor:
    r"""Steers a layer's output on the forget tokens towards one fixed random vector.

    .. math:: L = \frac{1}{N} \sum_t \frac{1}{H} \|h_t - c\,u / \|u\|\,\|^2

    Its retain loss is the token-weighted mean of the same distance to the original model's hidden states. Source: Li et
    al. 2024 (arXiv 2403.03218); means are over the tokens of the step, not over documents first.

    Args:
        hidden: [F, S, H] float.
        mask: [F, S] bool, the positions that count.
        steering: [H] float, see `steering_vector`.
        num_tokens: N, the counted positions of the whole optimisation step; a step without any has loss 0.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> hidden = torch.tensor([[[0.0, 2.0], [5.0, 5.0]]])
        >>> rmu(hidden, torch.tensor([[True, False]]), torch.tensor([1.0, 1.0]), num_tokens=1).item()
        1.0
    """
    return share(distance(hidden, steering), mask, num_tokens)
