"""Other people's losses without logits, as installed (requirements/benchmarks.txt); each is called, not copied.

Each takes (hidden [T, H], weight [V, H], target [T], token_weight [T]) and returns the weighted mean of the losses.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch

from trace_kernels.ops.linear_cross_entropy.cases import eager

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _mean(log_probs: torch.Tensor, token_weight: torch.Tensor) -> torch.Tensor:
    return -(log_probs * token_weight).sum() / token_weight.sum()


def trl(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor) -> torch.Tensor:
    from trl.kernels import ChunkedLogProbFunction

    log_probs = ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 4096, None, 1.0, ())[0]
    return _mean(log_probs, token_weight)


def liger(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    found = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)
    return _mean(-(found[0] if isinstance(found, tuple) else found), token_weight)


def unsloth(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor
) -> torch.Tensor:
    os.environ.setdefault("UNSLOTH_ZOO_DISABLE_GPU_INIT", "1")  # otherwise it asks for the package unsloth
    from unsloth_zoo.cpu.ops import cpu_chunked_log_probs

    found = cpu_chunked_log_probs(hidden, weight, None, target, 1.0, 4096)
    return _mean(found[0] if isinstance(found, tuple) else found, token_weight)


@functools.cache
def _compiled() -> Loss:
    return torch.compile(eager, options={"auto_chunker.enable": True})


def auto_chunker(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor
) -> torch.Tensor:
    """torch.compile as with TORCHINDUCTOR_AUTO_CHUNKER=1."""
    return _compiled()(hidden, weight, target, token_weight)


#: By what a table calls them: the loss, and the package that it needs.
PEERS: dict[str, tuple[Loss, str]] = {
    "torch.compile, auto chunker": (auto_chunker, "torch"),
    "TRL chunked log-prob": (trl, "trl"),
    "Liger torch fallback": (liger, "liger_kernel"),
    "unsloth-zoo CPU": (unsloth, "unsloth_zoo"),
}


def installed() -> dict[str, Loss]:
    return {name: loss for name, (loss, package) in PEERS.items() if importlib.util.find_spec(package) is not None}
