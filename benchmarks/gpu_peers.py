"""Other people's fused losses, with the signature of our ops: timed where they are installed, else named as absent.

Written against Liger-Kernel 0.8.2, Cut Cross-Entropy 25.6.4 and quack 0.6.4. None takes token weights: where there are
some they multiply the unreduced loss, of those that have one.
"""

from __future__ import annotations

from typing import Any

import torch

from trace_kernels.ops.linear_cross_entropy.cases import torch_chunked
from trace_kernels.testing.linear_cases import eager_reduce


def weighted(nll: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor | None) -> torch.Tensor:
    return eager_reduce(nll, target != -100, token_weight, "mean", None)


def liger_nll(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="none")(weight, hidden, target)


def liger_scaled_nll(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Liger's native kernels on an sm_90, its torch fallback elsewhere: float32 losses, 4 passes with a backward."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    outputs = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, 1.0, -100)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def cut_nll(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """With its gradient filter on, as it comes."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, target, ignore_index=-100, reduction="none")


def quack(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, *weights: Any) -> torch.Tensor:
    """Quack reduces over all tokens alike: what it is timed on is the unweighted mean."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, target, ignore_index=-100, reduction="mean")


def loss_of(nll: Any) -> Any:
    def loss(
        hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        return weighted(nll(hidden, weight, target), target, token_weight)

    return loss


def log_prob_of(nll: Any) -> Any:
    return lambda hidden, weight, target: -nll(hidden, weight, target)


def torch_chunked_nll(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch_chunked(hidden, weight, target, reduction="none")


PEERS = {
    "linear_cross_entropy": {
        "liger": loss_of(liger_nll),
        "liger scaled": loss_of(liger_scaled_nll),
        "cut_cross_entropy": loss_of(cut_nll),
        "quack (unweighted)": quack,
    },
    "linear_log_prob": {
        "torch_chunked": log_prob_of(torch_chunked_nll),
        "liger": log_prob_of(liger_nll),
        "liger scaled": log_prob_of(liger_scaled_nll),
        "cut_cross_entropy": log_prob_of(cut_nll),
    },
}
