"""The definition of `cross_entropy`, in plain torch."""

from __future__ import annotations

import torch

from trace_kernels.ops.cross_entropy.rows import LogitGradient, Rows
from trace_kernels.shared.softmax import log_prob, slope, softmax, transform


def forward(logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Logp [T] and lse [T], 0 in rows that are ignored."""
    kept = rows.target != rows.ignore_index
    z = transform(logits, rows.softcap, rows.logit_scale)
    found = softmax(z)
    logp = log_prob(z, rows.target[:, None], found)[:, 0]
    return torch.where(kept, logp, 0), torch.where(kept, found.lse, 0)


def backward(
    logits: torch.Tensor, rows: Rows, lse: torch.Tensor, gradient: LogitGradient, inplace: bool
) -> torch.Tensor:
    """The gradient [T, V] of `logits`, in their own memory when `inplace`."""
    valid = (rows.target >= 0) & (rows.target < logits.shape[1])
    # Rows without a gradient get exact zeros, also where their logits are not finite.
    zero = (rows.target == rows.ignore_index) | gradient.is_zero()
    z = transform(logits, rows.softcap, rows.logit_scale)
    dz = torch.exp(z - lse[:, None]) * gradient.constant[:, None]
    if gradient.uniform is not None:
        dz += gradient.uniform[:, None]
    dz = torch.where(valid[:, None], dz, torch.nan)
    dz.scatter_(1, torch.where(valid, rows.target, 0)[:, None], torch.where(valid, gradient.target, torch.nan)[:, None])
    dlogits = (dz * slope(logits, rows.softcap, rows.logit_scale)).masked_fill_(zero[:, None], 0)
    return logits.copy_(dlogits) if inplace else dlogits.to(logits.dtype)
