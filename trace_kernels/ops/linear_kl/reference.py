"""The definition of `linear_kl`, in plain torch. It materialises both [T, V] logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from trace_kernels.ops.cross_entropy.reference import transform, untransform
from trace_kernels.ops.linear_cross_entropy.reference import weight_gradients
from trace_kernels.shared.losses import compute_dtype


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    want_dweight: bool,
    exchange: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kl [T], lse [T], ref_lse [T], dhidden [T, H], dweight [V, H]; those not wanted are empty.

    dhidden_t is d kl_t / d hidden_t; dweight is the sum of row_weight_t * d kl_t (all ones when None). With `exchange`
    the weights are slices: it makes kl and both logsumexps those of the whole vocabulary, in place.
    """
    dtype = compute_dtype(hidden.dtype)
    dropped = hidden.new_zeros(hidden.shape[0], dtype=torch.bool) if row_weight is None else row_weight == 0
    x, w, z = _logits(hidden, weight, dropped, softcap, logit_scale, dtype)
    _, _, ref_z = _logits(ref_hidden, ref_weight, dropped, softcap, logit_scale, dtype)
    lse, ref_lse = torch.logsumexp(z, dim=1), torch.logsumexp(ref_z, dim=1)
    log_p, log_q = z - lse[:, None], ref_z - ref_lse[:, None]
    q = log_q.exp()
    # 0 * log 0 is 0, and a class that both rule out has no log-ratio at all.
    kl = torch.where(q == 0, 0, q * (log_q - log_p)).sum(dim=1)
    if exchange is not None:
        exchange(kl, lse, ref_lse)
        log_p, q = z - lse[:, None], (ref_z - ref_lse[:, None]).exp()
    dhidden, dweight = x.new_empty(0, x.shape[1]), x.new_empty(0, x.shape[1])
    if want_dhidden or want_dweight:
        dlogits = untransform(log_p.exp() - q, z, softcap, logit_scale).masked_fill_(dropped[:, None], 0)
        if want_dhidden:
            dhidden = (dlogits @ w).masked_fill_(dropped[:, None], 0)
        if want_dweight:
            dweight, _ = weight_gradients(dlogits if row_weight is None else dlogits * row_weight[:, None], x)
    return (
        kl.masked_fill(dropped, 0),
        lse.masked_fill(dropped, 0),
        ref_lse.masked_fill(dropped, 0),
        dhidden.to(hidden.dtype),
        dweight.to(weight.dtype),
    )


def forward_split(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    exchange: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kl, lse and ref_lse [T] of the whole vocabulary, and the part [T, H] of dhidden of this process's slice."""
    return forward(hidden, weight, ref_hidden, ref_weight, row_weight, softcap, logit_scale, True, False, exchange)[:4]


def backward_weight(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    row_grad: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    """Dweight [V, H]: the sum of row_grad_t * d kl_t; rows with row_grad 0 are dropped."""
    dtype = compute_dtype(hidden.dtype)
    dropped = row_grad == 0
    x, _, z = _logits(hidden, weight, dropped, softcap, logit_scale, dtype)
    _, _, ref_z = _logits(ref_hidden, ref_weight, dropped, softcap, logit_scale, dtype)
    dz = (z - lse[:, None]).exp() - (ref_z - ref_lse[:, None]).exp()
    dlogits = untransform(dz * row_grad[:, None], z, softcap, logit_scale).masked_fill_(dropped[:, None], 0)
    return weight_gradients(dlogits, x)[0].to(weight.dtype)


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    dropped: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both factors and the logits, in `dtype`. Dropped rows become 0: what they hold stays out of every sum."""
    x, w = hidden.to(dtype).masked_fill(dropped[:, None], 0), weight.to(dtype)
    return x, w, transform(x @ w.T, softcap, logit_scale)
