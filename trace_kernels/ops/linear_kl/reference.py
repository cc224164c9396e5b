"""The definition of `linear_kl`, in plain torch. It materialises both [T, V] logits.

Where both models are sure of one class, ``p - q`` is a difference of nearly equal numbers there. It is formed from what
they leave to all others instead, at one class per row, the `pivot`: the reference's largest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trace_kernels.shared.linear import Call
from trace_kernels.shared.losses import compute_dtype
from trace_kernels.shared.softmax import log_prob, slope, softmax, transform

#: (kl, lse, ref_lse, and the pivot's log-probabilities) of rows [T], which it changes in place from those of a slice of
#: the vocabulary to those of the whole one.
Exchange = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


def forward(
    policy: Call, ref: Call, want_dhidden: bool, want_dweight: bool, exchange: Exchange | None
) -> tuple[torch.Tensor, ...]:
    """Kl, lse, ref_lse, pivot and difference [T], dhidden [T, H], dweight [V, H]; those not wanted are empty.

    pivot: int64, NO_LABEL for none; difference: p - q there. dhidden_t is d kl_t / d hidden_t; dweight is the sum of
    row_weight_t * d kl_t. With `exchange` the weights are slices of the vocabulary.
    """
    kept = policy.kept()
    x, w, logits, z = _logits(policy, kept, compute_dtype(policy.hidden.dtype))
    _, _, _, ref_z = _logits(ref, kept, compute_dtype(policy.hidden.dtype))
    rows, ref_rows = softmax(z), softmax(ref_z)
    pivot = ref_rows.top
    at = pivot[:, None]
    logp, ref_logp = log_prob(z, at, rows)[:, 0], ref_rows.top_logp.clone()
    log_p = (z - rows.lse[:, None]).scatter(1, at, logp[:, None])
    log_q = (ref_z - ref_rows.lse[:, None]).scatter(1, at, ref_logp[:, None])
    q = log_q.exp()
    # 0 * log 0 is 0, and a class that both rule out has no log-ratio at all.
    kl = torch.where(q == 0, 0, q * (log_q - log_p)).sum(dim=1)
    lse, ref_lse = rows.lse, ref_rows.lse
    if exchange is not None:
        exchange(kl, lse, ref_lse, logp, ref_logp)
    difference = torch.expm1(logp) - torch.expm1(ref_logp)
    dhidden, dweight = x.new_empty(0, x.shape[1]), x.new_empty(0, x.shape[1])
    if want_dhidden or want_dweight:
        dlogits = _dz(z, ref_z, lse, ref_lse, pivot, difference) * slope(logits, policy.softcap, policy.logit_scale)
        dlogits.masked_fill_(~kept[:, None], 0)
        if want_dhidden:
            dhidden = (dlogits @ w).masked_fill_(~kept[:, None], 0)
        if want_dweight:
            dweight = (dlogits if policy.row_weight is None else dlogits * policy.row_weight[:, None]).T @ x
    return (
        *(values.masked_fill(~kept, 0) for values in (kl, lse, ref_lse, pivot, difference)),
        dhidden.to(policy.hidden.dtype),
        dweight.to(policy.weight.dtype),
    )


def backward_weight(
    policy: Call,
    ref: Call,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    pivot: torch.Tensor,
    difference: torch.Tensor,
) -> torch.Tensor:
    """Dweight [V, H]: the sum of row_weight_t * d kl_t."""
    assert policy.row_weight is not None
    kept = policy.kept()
    x, _, logits, z = _logits(policy, kept, compute_dtype(policy.hidden.dtype))
    _, _, _, ref_z = _logits(ref, kept, compute_dtype(policy.hidden.dtype))
    dz = _dz(z, ref_z, lse, ref_lse, pivot, difference) * policy.row_weight[:, None]
    dlogits = (dz * slope(logits, policy.softcap, policy.logit_scale)).masked_fill_(~kept[:, None], 0)
    return (dlogits.T @ x).to(policy.weight.dtype)


def _dz(
    z: torch.Tensor,
    ref_z: torch.Tensor,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    pivot: torch.Tensor,
    difference: torch.Tensor,
) -> torch.Tensor:
    dz = (z - lse[:, None]).exp() - (ref_z - ref_lse[:, None]).exp()
    at, valid = pivot.clamp(min=0)[:, None], (pivot >= 0)[:, None]
    return dz.scatter(1, at, torch.where(valid, difference[:, None], dz.gather(1, at)))


def _logits(
    call: Call, kept: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both factors, raw logits and logits, in `dtype`. Dropped rows become 0: they stay out of every sum."""
    x, w = call.hidden.to(dtype).masked_fill(~kept[:, None], 0), call.weight.to(dtype)
    logits = x @ w.T
    return x, w, logits, transform(logits, call.softcap, call.logit_scale)
