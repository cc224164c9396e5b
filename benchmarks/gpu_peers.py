"""Other people's fused losses, with the signature of our ops: timed where they are installed, else named as absent."""

from __future__ import annotations

from typing import Any

import torch

from trace_kernels.ops.linear_cross_entropy.cases import eager_reduce


def liger(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Liger-Kernel has no token weights: they multiply its unreduced loss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    reduction = "mean" if token_weight is None else "none"
    loss = LigerFusedLinearCrossEntropyLoss(reduction=reduction)(weight, hidden, target)
    return loss if token_weight is None else eager_reduce(loss, target != -100, token_weight, "mean", None)


def cut_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """Cut Cross-Entropy likewise, with its gradient filter on, as it comes."""
    from cut_cross_entropy import linear_cross_entropy

    reduction = "mean" if token_weight is None else "none"
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    return loss if token_weight is None else eager_reduce(loss, target != -100, token_weight, "mean", None)


def quack(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *weights: Any) -> torch.Tensor:
    """Quack reduces over all tokens alike: what it is timed on is the unweighted mean."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, target, reduction="mean")


def liger_log_prob(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, target)


def cut_log_prob(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, target, reduction="none")


PEERS = {
    "linear_cross_entropy": {
        "liger": liger,
        "cut_cross_entropy": cut_cross_entropy,
        "quack (unweighted)": quack,
    },
    "linear_log_prob": {"liger": liger_log_prob, "cut_cross_entropy": cut_log_prob},
}
