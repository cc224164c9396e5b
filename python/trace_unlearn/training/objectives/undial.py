"""UNDIAL: self-distillation from the original model with the true token's logit lowered."""

from __future__ import annotations

import math

import torch

from trace_unlearn.training.objectives._totals import share


def undial(
    log_probs: torch.Tensor,
    divergence: torch.Tensor,
    reference: torch.Tensor,
    mask: torch.Tensor,
    num_tokens: torch.Tensor | float,
    beta: float = 10.0,
) -> torch.Tensor:
    r"""KL divergence from the original model's distribution q, after the true token's logit was lowered by beta.

    .. math:: q_t = \text{softmax}(z^\text{ref}_t - \beta\,\text{onehot}(y_t)), \qquad
        L = \frac{1}{N} \sum_t \text{KL}(q_t \,\|\, p_t)

    With pi the original probability of y and c = 1 / (1 - pi (1 - exp(-beta))), q is c times the original distribution
    except at y, hence per token

    .. math:: \text{KL}(q\|p) = c\,\text{KL}(p^\text{ref}\|p) + c\,\pi (1 - e^{-\beta}) \log p_y - c\,\pi\log\pi
        + c\,(1 - \pi) \log c + q_y \log q_y, \qquad q_y = c\,\pi e^{-\beta}

    and no logits are needed. It differs from the published cross-entropy by the entropy of q, a constant, and counts
    the forget tokens only (the published code averages over padding too). Source: Dong et al. 2024 (arXiv 2402.10052).

    Args:
        log_probs: [F, S] float.
        divergence: [F, S] float, KL(original model || model) at each position, from `trace_kernels.linear_kl`.
        reference: [F, S] float, log_probs by the original model; constant.
        mask: [F, S] bool, the positions that count.
        num_tokens: N, the counted positions of the whole optimisation step; a step without any has loss 0.
        beta: > 0.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> same = torch.tensor([[0.5]]).log()  # of the original model itself: KL(q || p) is log 2 for a large beta
        >>> round(undial(same, torch.zeros(1, 1), same, torch.tensor([[True]]), num_tokens=1, beta=50.0).item(), 4)
        0.6931
    """
    log_pi = reference.detach().where(mask, -1.0)
    pi = log_pi.exp()
    log_c = -torch.log1p((pi * math.expm1(-beta)).clamp(min=-1 + 1e-6))
    c = log_c.exp()
    log_q = log_c + log_pi - beta
    constant = -c * pi * log_pi + c * (1 - pi) * log_c + log_q.exp() * log_q
    moving = c * divergence.where(mask, 0.0) - c * pi * math.expm1(-beta) * log_probs.where(mask, 0.0)
    return share(moving + constant, mask, num_tokens)
