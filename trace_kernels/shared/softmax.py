"""The mathematics of a row of logits, in plain torch: what the references of the losses are made of.

A class that is nearly certain keeps its digits: with S the sum of ``exp(z - z_top)`` over all classes but the largest,
``log p_top = -log(1 + S)`` and ``1 - p = -expm1(log p)``, where ``z - logsumexp(z)`` and ``1 - exp(log p)`` would be
differences of nearly equal numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from trace_kernels.shared.losses import NO_LABEL, compute_dtype


def transform(logits: torch.Tensor, softcap: float | None, logit_scale: float) -> torch.Tensor:
    """softcap(logit_scale * logits) in the compute dtype, where softcap(x) = cap * tanh(x / cap)."""
    z = logits.to(compute_dtype(logits.dtype)) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def slope(logits: torch.Tensor, softcap: float | None, logit_scale: float) -> torch.Tensor:
    """Dz / dlogits of ``z = transform(logits)``; it keeps its digits where tanh nears 1."""
    z = logits.to(compute_dtype(logits.dtype)) * logit_scale
    if softcap is None:
        return torch.full_like(z, logit_scale)
    r = 2 / (torch.exp(2 * (z / softcap).abs()) + 1)  # 1 - tanh|u|
    return logit_scale * r * (2 - r)


def mean_logit(logits: torch.Tensor, softcap: float | None, logit_scale: float) -> torch.Tensor:
    """[T] the mean of the transformed logits [T, V]; a few rows at a time."""
    if softcap is None:
        return logits.sum(dim=1, dtype=compute_dtype(logits.dtype)) * (logit_scale / logits.shape[1])
    rows = max(1, 2**20 // logits.shape[1])
    return torch.cat([transform(some, softcap, logit_scale).mean(dim=1) for some in torch.split(logits, rows)])


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + e^x) with all its digits, also where e^x is small; torch's drops it for x > 20."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


class Softmax(NamedTuple):
    """What is known of rows of logits [T, V]; all [T].

    Attributes:
        top: the largest class, the lowest index of several.
        top_logp: its log-probability.
        lse: logsumexp.
        rest: logsumexp of all other classes.
    """

    top: torch.Tensor
    top_logp: torch.Tensor
    lse: torch.Tensor
    rest: torch.Tensor


def softmax(z: torch.Tensor) -> Softmax:
    largest = z.amax(dim=1)
    classes = torch.arange(z.shape[1], device=z.device)
    top = torch.where(z == largest[:, None], classes, z.shape[1] - 1).amin(dim=1)
    rest = torch.logsumexp(z.scatter(1, top[:, None], -torch.inf), dim=1)
    # A logit of infinity has no log-probability.
    top_logp = torch.where(largest == torch.inf, torch.nan, 0 - softplus(rest - largest))
    return Softmax(top, top_logp, torch.logsumexp(z, dim=1), rest)


def log_prob(z: torch.Tensor, target: torch.Tensor, rows: Softmax) -> torch.Tensor:
    """Log-probabilities of targets [T, K]: NaN where one is no class; NO_LABEL is a class of probability 0."""
    valid = (target >= 0) & (target < z.shape[1])
    at = torch.where(valid, target, 0)
    largest = z.gather(1, rows.top[:, None])
    logp = torch.where(at == rows.top[:, None], 0, z.gather(1, at) - largest) + rows.top_logp[:, None]
    return torch.where(valid, logp, torch.nan).masked_fill(target == NO_LABEL, -torch.inf)


def log_prob_dz(z: torch.Tensor, target: torch.Tensor, logp: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """[T, V] d logp_t / d z_t of targets [T] with log-probabilities [T]: their one-hot rows less the softmax."""
    valid = (target >= 0) & (target < z.shape[1])
    dz = -torch.exp(z - lse[:, None])
    at = torch.where(valid, target, 0)[:, None]
    others = torch.where(target == NO_LABEL, dz.gather(1, at)[:, 0], torch.nan)
    return dz.scatter_(1, at, torch.where(valid, -torch.expm1(logp), others)[:, None])
