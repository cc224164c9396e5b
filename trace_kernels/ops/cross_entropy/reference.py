"""The definition of `cross_entropy`, in plain torch, and the row mathematics that the linear ops share."""

from __future__ import annotations

import torch

from trace_kernels.shared.losses import NO_LABEL, compute_dtype


def transform(logits: torch.Tensor, softcap: float | None, logit_scale: float) -> torch.Tensor:
    """softcap(logit_scale * logits) in the compute dtype, where softcap(x) = cap * tanh(x / cap)."""
    z = logits.to(compute_dtype(logits.dtype)) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def untransform(dz: torch.Tensor, z: torch.Tensor, softcap: float | None, logit_scale: float) -> torch.Tensor:
    """The gradient of the logits from that of z = transform(logits)."""
    if softcap is not None:
        dz = dz * (1 - (z / softcap) ** 2)
    return dz * logit_scale


def kept_rows(target: torch.Tensor, row_weight: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """[T] bool: rows that take part."""
    kept = target != ignore_index
    return kept if row_weight is None else kept & (row_weight != 0)


def log_prob(z: torch.Tensor, target: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] log-probability of the target and [T] logsumexp; 0 in rows not kept, NaN where the target is no class.

    A target of NO_LABEL is a class of probability 0.
    """
    valid = (target >= 0) & (target < z.shape[1])
    lse = torch.logsumexp(z, dim=1)
    picked = z.gather(1, torch.where(valid, target, 0)[:, None])[:, 0]
    logp = torch.where(valid, picked - lse, torch.nan).masked_fill(target == NO_LABEL, -torch.inf)
    return torch.where(kept, logp, 0), torch.where(kept, lse, 0)


def log_prob_dz(z: torch.Tensor, target: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """[T, V] d logp_t / d z_t: the target's one-hot row less the softmax."""
    valid = (target >= 0) & (target < z.shape[1])
    dz = -torch.exp(z - lse[:, None])
    one = torch.where(valid, 1.0, torch.nan).to(dz.dtype).masked_fill(target == NO_LABEL, 0)
    return dz.scatter_add_(1, torch.where(valid, target, 0)[:, None], one[:, None])


def forward(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, softcap: float | None, logit_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logp [T] and lse [T]."""
    return log_prob(transform(logits, softcap, logit_scale), target, kept_rows(target, None, ignore_index))


def backward(
    grad_logp: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    inplace: bool,
) -> torch.Tensor:
    """The gradient [T, V] of `logits`, in their own memory when `inplace`."""
    kept = kept_rows(target, grad_logp, ignore_index)[:, None]
    z = transform(logits, softcap, logit_scale)
    dz = log_prob_dz(z, target, lse) * grad_logp[:, None]
    # Rows without a gradient get exact zeros, also where their logits are not finite.
    dlogits = untransform(dz, z, softcap, logit_scale).masked_fill_(~kept, 0)
    return logits.copy_(dlogits) if inplace else dlogits.to(logits.dtype)
