"""`linear_token_stats`: what one pass over a language-model head tells of each token; and several targets per token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from trace_kernels.ops.linear_cross_entropy.backends import stats_backends
from trace_kernels.shared import losses
from trace_kernels.shared.linear import Call, Gradient, call_of, needs_gradient


class TokenStats(NamedTuple):
    """Of each token; see `linear_token_stats`."""

    log_prob: torch.Tensor
    entropy: torch.Tensor
    logsumexp: torch.Tensor
    is_top1: torch.Tensor


def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> TokenStats:
    r"""Log-probability, entropy, logsumexp and top-1 hit of every token, without materialising the logits.

    .. math::
        z_t = \text{softcap}(\text{logit\_scale} \cdot (W h_t + b)), \qquad p_t = \text{softmax}(z_t), \qquad
        \log p_{t, \text{target}_t}, \quad -\sum_v p_{tv} \log p_{tv}, \quad \log \sum_v e^{z_{tv}}, \quad
        \text{target}_t = \text{argmax}_v \, z_{tv}

    in one product with the head. Where one class is nearly certain, all of them keep their digits.

    The gradient of `hidden` through log_prob and logsumexp costs one more product, in the forward, whatever arrives
    from above: what is stored is [T, H]. That through entropy computes the logits again and takes a product, in the
    backward and only where such a gradient arrives: d entropy / d h is -sum_v p_v (log p_v + entropy) W_v, and its
    sum of p_v log p_v W_v is a product of its own, which no [T, H] of the forward holds. Storing that sum, too, would
    save the second logits and cost a product in every forward. A trainable `weight` takes two more products.

    Args:
        hidden: [..., H] floating, any leading shape, H at least 1.
        weight: [V, H], the dtype of `hidden`.
        target: [...] int64, in [0, V) or `ignore_index`.
        bias: [V] floating.
        ignore_index: a target that is not scored.
        softcap: from 1e-30 to 1e30.
        logit_scale: finite; 1 / temperature.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        A NamedTuple of [...]: log_prob, entropy and logsumexp, float32 (float64 for float64 inputs), natural
        logarithms; is_top1, bool: the target has the largest logit, and no class before it has the same. 0 and False
        where the target is `ignore_index`. Differentiable once in hidden, weight and bias through the first three.

    Under autocast hidden and weight are cast as torch.nn.functional.linear would cast them.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; the message names the argument. On a GPU a
            target outside [0, V) yields NaN in its row, and raises with TRACE_KERNELS_DEBUG=1 only.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, trace_kernels as tk
        >>> hidden, weight = torch.zeros(2, 8), torch.randn(4, 8)
        >>> stats = tk.linear_token_stats(hidden, weight, torch.tensor([0, 3]))
        >>> [f"{value:.4f}" for value in stats.entropy]  # log(4)
        ['1.3863', '1.3863']
        >>> stats.is_top1.tolist()  # all four are as large: the first one counts
        [True, False]
    """
    call = call_of(hidden, weight, target, bias, ignore_index, softcap, logit_scale)
    assert call.target is not None
    targets = call.target[:, None]
    arguments = (*call[:3], targets, None, *call[5:8])
    logp, lse, entropy, top, *_ = linear_token_stats_op(*arguments, needs_gradient(call.hidden), True, backend)
    hit = (top == call.target) & (call.target != ignore_index)
    return TokenStats(*(values.view(target.shape) for values in (logp, entropy, lse, hit)))


def per_token(call: Call, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [T, K] of the targets [T, K] and logsumexp [T], differentiable.

    Rows of weight 0 are dropped, the other weights do not matter.
    """
    logp, lse, *_ = linear_token_stats_op(*call[:8], needs_gradient(call.hidden), False, backend)
    return logp, lse


@torch.library.custom_op("trace_kernels::linear_token_stats", mutates_args=())
def linear_token_stats_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    want_others: bool,
    want_entropy: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logp [T, K], lse, entropy, top and top_logp [T], slope [T, K] and others [T, H]: see `Stats`."""
    losses.check_target_values(target, weight.shape[0], ignore_index)
    call = Call(hidden, weight, bias, target, row_weight, ignore_index, softcap, logit_scale)
    with losses.without_autocast(hidden.device):
        functions = stats_backends.select(backend, hidden.device, hidden, weight, bias)
        found = functions.stats(call, want_others, want_entropy)
    logp = found.logp[:, 0].contiguous() if want_entropy else found.logp
    return logp, found.lse, found.entropy, found.top, found.top_logp, found.slope, found.others


@linear_token_stats_op.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, target: torch.Tensor, *others: Any) -> Any:
    *_, want_others, want_entropy, _ = others
    num_rows, width = hidden.shape
    lse = hidden.new_empty(num_rows, dtype=losses.compute_dtype(hidden.dtype))
    some = num_rows if want_entropy else 0
    return (
        lse.new_empty(num_rows) if want_entropy else lse.new_empty(target.shape),
        lse,
        lse.new_empty(some),
        target.new_empty(some),
        lse.new_empty(some),
        lse.new_empty(target.shape),
        hidden.new_empty(num_rows if want_others else 0, width),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *flat, _, want_entropy, ctx.backend = inputs
    call = Call(*flat)
    ctx.options = (call.ignore_index, call.softcap, call.logit_scale)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)
    ctx.want_entropy = want_entropy
    ctx.save_for_backward(*call[:5], *output)


def _backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, target, row_weight, logp, lse, entropy, top, top_logp, slope, others = ctx.saved_tensors
    grad, grad_lse, grad_entropy, *_ = grads
    grad_entropy = grad_entropy if ctx.want_entropy else None
    found: list[torch.Tensor | None] = [None] * 11
    if grad is None and grad_lse is None and grad_entropy is None:
        return tuple(found)
    ignore_index = ctx.options[0]
    dropped = (target == ignore_index).all(dim=1)
    if row_weight is not None:
        dropped = dropped | (row_weight == 0)
    logp = logp.view(target.shape)
    zero = torch.zeros_like(lse)
    scored = (target != ignore_index) & ~dropped[:, None]
    grad = torch.zeros_like(logp) if grad is None else torch.where(scored, grad.view(target.shape), 0)
    grad_lse = zero if grad_lse is None else torch.where(dropped, 0, grad_lse)
    # A class that stands several times counts once: the first entry gets what all of them get.
    same = (target[:, :, None] == target[:, None, :]) & scored[:, :, None] & scored[:, None, :]
    first = scored & ~same.tril(-1).any(dim=2)
    targets = torch.where(first, target, losses.NO_LABEL)
    own = torch.where(first, (same * grad[:, None, :]).sum(dim=2), 0)
    # Of the target's own gradient 1 - p, of all others' -p: no difference of nearly equal numbers.
    rest = grad_lse[:, None] - (own.sum(dim=1, keepdim=True) - own)
    p = logp.exp()
    values = torch.where(own == 0, 0, -torch.expm1(logp) * own) + torch.where(rest == 0, 0, p * rest)
    constant, log = grad_lse - own.sum(dim=1), None
    values = torch.where(first, values, 0)
    wants_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    if grad_entropy is not None:
        grad_entropy = torch.where(dropped, 0, grad_entropy)
        constant, log = constant - grad_entropy * entropy, -grad_entropy
        weighted = torch.where(p == 0, 0, p * (logp + entropy[:, None]))
        values = torch.where(first, values - grad_entropy[:, None] * weighted, 0)
        # The largest class, too, is known better than by its logit.
        known = top_logp.exp() * (constant + log * top_logp)
        apart = (targets != top[:, None]).all(dim=1) & ~dropped
        targets = torch.cat([targets, torch.where(apart, top, losses.NO_LABEL)[:, None]], dim=1)
        values = torch.cat([values, torch.where(apart, known, 0)[:, None]], dim=1)
    elif ctx.needs_input_grad[0]:
        found[0] = linear_token_stats_dhidden(
            others, weight, targets, constant.contiguous(), (values * slope).contiguous(), lse
        )
    if wants_head or grad_entropy is not None:
        # Rows are weighted by their largest number, so that float16 keeps its digits.
        largest = torch.cat([constant[:, None], values], dim=1).abs().amax(dim=1)
        if log is not None:
            largest = torch.maximum(largest, log.abs())
        unit = torch.where(largest == 0, 1, largest)
        dhidden, dweight, dbias = linear_token_stats_backward(
            hidden, weight, bias, targets, largest, *ctx.options, lse, constant / unit,
            None if log is None else log / unit, values / unit[:, None],
            ctx.needs_input_grad[0] and grad_entropy is not None, wants_head, ctx.backend,
        )  # fmt: skip
        if ctx.needs_input_grad[0] and grad_entropy is not None:
            found[0] = dhidden
        found[1] = dweight if ctx.needs_input_grad[1] else None
        found[2] = dbias if ctx.needs_input_grad[2] else None
    return tuple(found)


linear_token_stats_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("trace_kernels::linear_token_stats_dhidden", mutates_args=())
def linear_token_stats_dhidden(
    others: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    constant: torch.Tensor,
    values: torch.Tensor,
    lse: torch.Tensor,
) -> torch.Tensor:
    """[T, H] ``constant_t * others_t + sum over k of values_tk * W[target_tk]``, rounded once.

    Args:
        others: [T, H], what the forward stored.
        weight: [V, H].
        target: [T, K], NO_LABEL for none.
        constant: [T]; a row of constant 0 takes nothing of `others`, whatever it holds.
        values: [T, K].
        lse: the forward's output; not read. It ties the result to the graph, so that a second-order gradient raises.
    """
    out = torch.empty_like(others)
    step = max(1, 2**20 // max(1, others.shape[1]))
    for rows in (slice(start, start + step) for start in range(0, others.shape[0], step)):
        total = others[rows].to(constant.dtype) * constant[rows, None]
        total.masked_fill_(constant[rows, None] == 0, 0)
        for classes, factor in zip(target[rows].T, values[rows].T, strict=True):
            valid = (classes >= 0) & (classes < weight.shape[0])
            picked = weight.index_select(0, torch.where(valid, classes, 0)).to(total.dtype)
            total.addcmul_(picked, torch.where(valid | (classes < 0), factor, torch.nan)[:, None])
        out[rows] = total
    return out


@linear_token_stats_dhidden.register_fake
def _(others: torch.Tensor, *unused: Any) -> torch.Tensor:
    return torch.empty_like(others)


linear_token_stats_dhidden.register_autograd(losses.refuse_second_order)


@torch.library.custom_op("trace_kernels::linear_token_stats_backward", mutates_args=())
def linear_token_stats_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    lse: torch.Tensor,
    constant: torch.Tensor,
    log: torch.Tensor | None,
    at_target: torch.Tensor,
    want_dhidden: bool,
    want_dweight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dhidden [T, H], dweight [V, H] and dbias [V] of the gradients of logits that `Gradient` describes."""
    call = Call(hidden, weight, bias, target, row_weight, ignore_index, softcap, logit_scale)
    with losses.without_autocast(hidden.device):
        functions = stats_backends.select(backend, hidden.device, hidden, weight, bias)
        dhidden, dweight, dbias = functions.backward(
            call, lse, Gradient(constant, log, at_target), want_dhidden, want_dweight
        )
    return dhidden, dweight, dbias


@linear_token_stats_backward.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, bias: Any, target: Any, row_weight: torch.Tensor, *others: Any
) -> Any:
    *_, want_dhidden, want_dweight, _ = others
    num_classes = weight.shape[0] if want_dweight else 0
    return (
        hidden.new_empty(hidden.shape[0] if want_dhidden else 0, hidden.shape[1]),
        weight.new_empty(num_classes, weight.shape[1]),
        row_weight.new_empty(num_classes),
    )


linear_token_stats_backward.register_autograd(losses.refuse_second_order)
