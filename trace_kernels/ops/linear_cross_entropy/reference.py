"""The definition of the ops on a language-model head, in plain torch. It materialises the [T, V] logits."""

from __future__ import annotations

import torch

from trace_kernels.shared.linear import Call, Gradient, Stats
from trace_kernels.shared.losses import NO_LABEL, compute_dtype
from trace_kernels.shared.softmax import log_prob, log_prob_dz, slope, softmax, transform


def forward(
    call: Call, want_dhidden: bool, want_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logp [T], lse [T], dhidden [T, H], dweight [V, H], dbias [V]; those not wanted are empty.

    dhidden_t is d logp_t / d hidden_t; dweight and dbias are sums of row_weight_t * d logp_t.
    """
    assert call.target is not None
    kept = call.kept()
    x, w, logits = operands(call, kept)
    z = transform(logits, call.softcap, call.logit_scale)
    rows = softmax(z)
    logp = log_prob(z, call.target[:, None], rows)[:, 0]
    dhidden, dweight, dbias = x.new_empty(0, x.shape[1]), w.new_empty(0, w.shape[1]), z.new_empty(0)
    if want_dhidden or want_dweight:
        dz = log_prob_dz(z, call.target, logp, rows.lse) * slope(logits, call.softcap, call.logit_scale)
        dhidden, dweight, dbias = pulled(call, kept, x, w, dz, want_dhidden, want_dweight, scale_dhidden=False)
    logp, lse = torch.where(kept, logp, 0), torch.where(kept, rows.lse, 0)
    return logp, lse, dhidden.to(call.hidden.dtype), dweight.to(call.weight.dtype), dbias


def stats(call: Call, want_others: bool, want_entropy: bool) -> Stats:
    assert call.target is not None
    kept = call.kept()
    x, w, logits = operands(call, kept)
    z = transform(logits, call.softcap, call.logit_scale)
    rows = softmax(z)
    slopes = slope(logits, call.softcap, call.logit_scale)
    valid = (call.target >= 0) & (call.target < z.shape[1])
    at = torch.where(valid, call.target, 0)
    logp = log_prob(z, call.target, rows).masked_fill(call.target == call.ignore_index, 0)
    top, top_logp, entropy = call.target.new_empty(0), z.new_empty(0), z.new_empty(0)
    others = x.new_empty(0, x.shape[1])
    if want_entropy:
        log_p = (z - rows.lse[:, None]).scatter(1, rows.top[:, None], rows.top_logp[:, None])
        p = log_p.exp()
        entropy = torch.where(p == 0, 0, -p * log_p).sum(dim=1).masked_fill(~kept, 0)
        top, top_logp = rows.top.masked_fill(~kept, 0), rows.top_logp.masked_fill(~kept, 0)
    if want_others:
        p = torch.exp(z - rows.lse[:, None]) * slopes
        excluded = torch.zeros_like(z).scatter_reduce(1, at, valid.to(z.dtype), "amax") > 0
        others = (p.masked_fill(excluded | ~kept[:, None], 0) @ w).masked_fill(~kept[:, None], 0)
    return Stats(
        logp.masked_fill(~kept[:, None], 0),
        rows.lse.masked_fill(~kept, 0),
        top,
        top_logp,
        entropy,
        torch.where(valid & kept[:, None], slopes.gather(1, at), 0),
        others.to(call.hidden.dtype),
    )


def backward(
    call: Call, lse: torch.Tensor, gradient: Gradient, want_dhidden: bool, want_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dhidden [T, H], and dweight [V, H] and dbias [V], the sums over rows, of row_weight times the gradient."""
    assert call.target is not None
    kept = call.kept()
    x, w, logits = operands(call, kept)
    log_p = transform(logits, call.softcap, call.logit_scale) - lse[:, None]
    p = log_p.exp()
    dz = p * gradient.constant[:, None]
    if gradient.log is not None:
        dz += torch.where(p == 0, 0, p * log_p) * gradient.log[:, None]
    valid = (call.target >= 0) & (call.target < w.shape[0])
    known = valid | (call.target == NO_LABEL) | (call.target == call.ignore_index)
    dz = torch.where(known.all(dim=1)[:, None], dz, torch.nan)
    for target, value, one in zip(call.target.T, gradient.targets.T, valid.T, strict=True):
        at = torch.where(one, target, 0)[:, None]
        dz.scatter_(1, at, torch.where(one, value, dz.gather(1, at)[:, 0])[:, None])
    dz *= slope(logits, call.softcap, call.logit_scale)
    dhidden, dweight, dbias = pulled(call, kept, x, w, dz, want_dhidden, want_dweight, scale_dhidden=True)
    return dhidden.to(call.hidden.dtype), dweight.to(call.weight.dtype), dbias


def pulled(
    call: Call,
    kept: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    dlogits: torch.Tensor,
    want_dhidden: bool,
    want_dweight: bool,
    scale_dhidden: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of hidden, weight and bias from that of the raw logits; rows are weighted, dhidden on request."""
    dlogits = dlogits.masked_fill(~kept[:, None], 0)
    scaled = dlogits if call.row_weight is None else dlogits * call.row_weight[:, None]
    dhidden, dweight, dbias = x.new_empty(0, x.shape[1]), w.new_empty(0, w.shape[1]), dlogits.new_empty(0)
    if want_dhidden:
        dhidden = ((scaled if scale_dhidden else dlogits) @ w).masked_fill_(~kept[:, None], 0)
    if want_dweight:
        dweight, dbias = scaled.T @ x, scaled.sum(dim=0)
    return dhidden, dweight, dbias


def operands(call: Call, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both factors and their raw logits in the compute dtype. Dropped rows become 0: they stay out of every sum."""
    dtype = compute_dtype(call.hidden.dtype)
    x, w = call.hidden.to(dtype).masked_fill(~kept[:, None], 0), call.weight.to(dtype)
    return x, w, x @ w.T if call.bias is None else torch.addmm(call.bias, x, w.T)
