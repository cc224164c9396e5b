"""The definition of `linear_log_prob` and `linear_cross_entropy`, in plain torch. It materialises the [T, V] logits."""

from __future__ import annotations

import torch

from trace_kernels.ops.cross_entropy import reference as rows
from trace_kernels.shared.losses import compute_dtype


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logp [T], lse [T], dhidden [T, H], dweight [V, H], dbias [V]; those not wanted are empty.

    dhidden_t is d logp_t / d hidden_t; dweight and dbias are sums of row_weight_t * d logp_t (all ones when None).
    """
    kept = rows.kept_rows(target, row_weight, ignore_index)
    x, w = operands(hidden, weight, kept)
    z = rows.transform(product(x, w, bias), softcap, logit_scale)
    logp, lse = rows.log_prob(z, target, kept)
    dhidden, dweight, dbias = x.new_empty(0, x.shape[1]), w.new_empty(0, w.shape[1]), lse.new_empty(0)
    if want_dhidden or want_dweight:
        dlogits = rows.untransform(rows.log_prob_dz(z, target, lse), z, softcap, logit_scale)
        dlogits = dlogits.masked_fill_(~kept[:, None], 0)
        if want_dhidden:
            dhidden = (dlogits @ w).masked_fill_(~kept[:, None], 0)
        if want_dweight:
            dweight, dbias = weight_gradients(dlogits if row_weight is None else dlogits * row_weight[:, None], x)
    return logp, lse, dhidden.to(hidden.dtype), dweight.to(weight.dtype), dbias


def backward_weight(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    row_grad: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dweight [V, H] and dbias [V]: sums of row_grad_t * d logp_t; rows with row_grad 0 are dropped."""
    kept = rows.kept_rows(target, row_grad, ignore_index)
    x, w = operands(hidden, weight, kept)
    z = rows.transform(product(x, w, bias), softcap, logit_scale)
    dz = rows.log_prob_dz(z, target, lse) * row_grad[:, None]
    dlogits = rows.untransform(dz, z, softcap, logit_scale).masked_fill_(~kept[:, None], 0)
    dweight, dbias = weight_gradients(dlogits, x)
    return dweight.to(weight.dtype), dbias


def operands(hidden: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors in the compute dtype. Dropped rows become 0: whatever they hold stays out of every sum."""
    dtype = compute_dtype(hidden.dtype)
    return hidden.to(dtype).masked_fill(~kept[:, None], 0), weight.to(dtype)


def product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x @ w.T if bias is None else torch.addmm(bias, x, w.T)


def weight_gradients(dlogits: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return dlogits.T @ x, dlogits.sum(dim=0)
