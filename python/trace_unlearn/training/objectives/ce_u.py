"""CE-U: cross-entropy unlearning."""

from __future__ import annotations

import torch

from trace_unlearn.training.objectives._totals import share

_LEAST = 1e-6  # 1 - p is not known better than this from a float32 log-probability


def ce_u(log_probs: torch.Tensor, mask: torch.Tensor, num_tokens: torch.Tensor | float) -> torch.Tensor:
    r"""Cross-entropy towards the model's own distribution without the true token.

    .. math:: L = \frac{1}{N} \sum_t \text{CE}\left(\text{softmax}(\text{sg}(z_t)|_{z_{ty} = -\infty}),
        \text{softmax}(z_t)\right) = \frac{1}{N} \sum_t -\log(1 - p_t) + \text{const}

    The second form holds because the distribution without y is p_v / (1 - p_y): the entropy is constant under sg, and
    what is left is the KL divergence. So the gradient is exactly that of the logits' form, and no logits are needed;
    the value here leaves the entropy out, is at least 0 and 0 when forgotten (unlikelihood). 1 - p is floored at 1e-6.
    Source: Yang 2025 (arXiv 2503.01224). The published code skips the first answer token; mask it to do so.

    Args:
        log_probs: [F, S] float.
        mask: [F, S] bool, the positions that count.
        num_tokens: N, the counted positions of the whole optimisation step; a step without any has loss 0.

    Returns:
        0-d: this micro-batch's share.

    Example:
        >>> log_probs = torch.tensor([[0.5, 0.25]]).log()
        >>> round(ce_u(log_probs, torch.tensor([[True, True]]), num_tokens=2).item(), 4)
        0.4904
    """
    kept = log_probs.where(mask, -1.0)
    # A floor and not a clamp: a token that is certain is the one to forget, so its gradient must not vanish.
    room = (-torch.expm1(kept.detach())).clamp(min=_LEAST)
    odds = kept.detach().exp() / room
    return share(-room.log() + odds * (kept - kept.detach()), mask, num_tokens)
