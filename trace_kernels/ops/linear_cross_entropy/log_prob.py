"""`linear_log_prob`: log-probabilities of given tokens from hidden states, and its autograd."""

from __future__ import annotations

from typing import Any

import torch

from trace_kernels.ops.linear_cross_entropy import token_stats
from trace_kernels.ops.linear_cross_entropy.backends import backends, log_prob_backends
from trace_kernels.shared import losses, vocabulary
from trace_kernels.shared.linear import Call, Gradient, call_of, needs_gradient
from trace_kernels.shared.softmax import slope, softplus


def linear_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    group: Any = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Log-probability of every target under a language-model head, without materialising the logits.

    .. math::
        z_t = \text{softcap}(\text{logit\_scale} \cdot (W h_t + b)), \qquad
        \log p_t = z_{t, \text{target}_t} - \log \sum_v e^{z_{tv}}

    with softcap(x) = cap * tanh(x / cap), or x without one. Logits, log-probabilities and their sums are float32
    whatever the inputs (float64 for float64 inputs), so log-ratios of two models keep their digits.

    With a frozen `weight` the gradient of `hidden` costs no recomputation, for any gradient that arrives from
    above: the forward stores d logp_t / d h_t, which is [T, H]. With a trainable `weight` the backward computes the
    logits once more. Where a token is nearly certain, log p and the gradient keep their digits: log p is -log(1 + S)
    with S what it leaves to the others, and 1 - p is -expm1(log p).

    With a target [..., K] the log-probabilities of K given tokens per position come from the same one pass over the
    head, at the same cost: answers of a multiple-choice question, or the teacher's best tokens in a distillation.

    Args:
        hidden: [..., H] floating, any leading shape, H at least 1.
        weight: [V, H], the dtype of `hidden`.
        target: [...] or [..., K] int64, in [0, V) or `ignore_index`; tokens may repeat.
        bias: [V] floating.
        ignore_index: a target that is not scored.
        softcap: from 1e-30 to 1e30.
        logit_scale: finite; 1 / temperature.
        group: None, or a ProcessGroup or DeviceMesh over which the vocabulary is split; see linear_cross_entropy. One
            target per token only.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        [...] or [..., K] float32 (float64 for float64 inputs), natural logarithm, 0 where the target is `ignore_index`.
        Differentiable once in hidden, weight and bias; a second-order gradient raises RuntimeError.

    Under autocast hidden and weight are cast as torch.nn.functional.linear would cast them.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; the message names the argument. On a GPU a
            target outside [0, V) yields NaN in its row, and raises with TRACE_KERNELS_DEBUG=1 only.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, trace_kernels as tk
        >>> hidden, weight = torch.zeros(3, 8), torch.randn(4, 8)
        >>> tk.linear_log_prob(hidden, weight, torch.tensor([0, 3, -100])).exp().tolist()
        [0.25, 0.25, 1.0]
        >>> tk.linear_log_prob(hidden[0], weight, torch.tensor([0, 1])).exp().tolist()  # two tokens at one position
        [0.25, 0.25]
    """
    options = (bias, ignore_index, softcap, logit_scale, group)
    if isinstance(target, torch.Tensor) and target.dim() == hidden.dim() > 0:
        leading = torch.Size((*hidden.shape[:-1], target.shape[-1]))
        call = call_of(hidden, weight, target, *options, leading=leading)
        if group is not None:
            raise ValueError("group: given with several targets per token, allowed is then None")
        if backend != "auto" and not torch.compiler.is_compiling():
            # What follows is linear_token_stats, whose name a refusal bears: here it bears that of the op called.
            log_prob_backends.select(backend, hidden.device, *call[:3])
        return token_stats.per_token(call, backend)[0].view(target.shape)
    return per_token(call_of(hidden, weight, target, *options), backend).view(target.shape)


def per_token(call: Call, backend: str) -> torch.Tensor:
    """[T] log-probabilities, differentiable; rows of weight 0 are dropped, the other weights do not matter."""
    logp: torch.Tensor = linear_log_prob_op(*call, needs_gradient(call.hidden), backend)[0]
    return logp


@torch.library.custom_op("trace_kernels::linear_log_prob", mutates_args=())
def linear_log_prob_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    group_name: str | None,
    want_dhidden: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logp [T], lse [T], dhidden [T, H]; and with a group the target's place [T] in this process's slice."""
    call = Call(hidden, weight, bias, target, row_weight, ignore_index, softcap, logit_scale, group_name)
    with losses.without_autocast(hidden.device):
        if group_name is not None:
            return _split(call, group_name, want_dhidden, backend)
        losses.check_target_values(target, weight.shape[0], ignore_index)
        functions = log_prob_backends.select(backend, hidden.device, hidden, weight, bias)
        logp, lse, dhidden, _, _ = functions.forward(call, want_dhidden, False)
    return logp, lse, dhidden, target.new_empty(0)


def _split(
    call: Call, group_name: str, want_dhidden: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where weight and bias are this process's slices.

    With a its share of the row's probability, a slice without the target has the gradient a * d(-lse_r), which is a
    times the backend's. For the slice with the target it is ``d z_target - a * dlse_r = a * dlogp_r + (1 - a) *
    dz_target``, of which the last is a row of the weight: no second pass over it.
    """
    hidden, weight, bias, target, *_ = call
    assert target is not None
    slices = vocabulary.Slices(weight.shape[0], hidden.device, group_name)
    slices.check_target(target, call.ignore_index)
    local_target = slices.local_target(target, call.ignore_index)
    local = call._replace(target=local_target, ignore_index=vocabulary.IGNORED)
    functions = log_prob_backends.select(backend, hidden.device, hidden, weight, bias)
    logp, lse, dhidden, _, _ = functions.forward(local, want_dhidden, False)
    kept = local.kept()
    all_lse, all_logp = vocabulary.gathered(torch.stack([lse, logp]), group_name).unbind(1)
    owner = slices.owner(target)
    here = all_lse.gather(0, owner[None])[0]
    # Of what the owner says, a small loss keeps its digits.
    combined = all_logp.gather(0, owner[None])[0] - softplus(vocabulary.others(all_lse, owner) - here)
    valid = slices.valid(target)
    total = torch.where(valid, torch.logsumexp(all_lse, dim=0), torch.nan)
    if want_dhidden:
        share = torch.where(kept, torch.exp(lse - total), 0)
        mine = kept & (local_target >= 0)
        at = torch.where(mine, local_target, 0)
        rows = weight.index_select(0, at).to(lse.dtype)
        raw = (hidden.to(lse.dtype) * rows).sum(dim=1)
        slopes = slope(raw if bias is None else raw + bias[at], call.softcap, call.logit_scale)
        rest = torch.exp(vocabulary.others(all_lse, slices.rank) - total) * slopes
        corrected = torch.addcmul(dhidden * share[:, None], rows, torch.where(mine, rest, 0)[:, None])
        dhidden = corrected.to(hidden.dtype)
    logp = torch.where(kept, torch.where(valid, combined, torch.nan), 0)
    return logp, torch.where(kept, total, 0), dhidden, local_target


@linear_log_prob_op.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, target: torch.Tensor, *others: Any) -> Any:
    *_, group_name, want_dhidden, _ = others
    num_rows, width = hidden.shape
    logp = hidden.new_empty(num_rows, dtype=losses.compute_dtype(hidden.dtype))
    local_target = target.new_empty(0 if group_name is None else num_rows)
    return logp, torch.empty_like(logp), hidden.new_empty(num_rows if want_dhidden else 0, width), local_target


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *flat, _, ctx.backend = inputs
    call = Call(*flat)
    logp, lse, dhidden, local_target = output
    ctx.mark_non_differentiable(lse, dhidden, local_target)
    ctx.set_materialize_grads(False)
    ctx.options = (call.ignore_index, call.softcap, call.logit_scale)
    ctx.group_name, target = call.group_name, call.target
    if call.group_name is not None:
        ctx.options, target = (vocabulary.IGNORED, *ctx.options[1:]), local_target
    # The weight's gradient is recomputed from the inputs; a frozen head keeps none of them alive.
    recompute = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    kept = (call.hidden, call.weight, call.bias, target, lse) if recompute else (None,) * 5
    ctx.save_for_backward(logp, dhidden, call.row_weight, *kept)


def _backward(ctx: Any, grad: torch.Tensor | None, *unused: None) -> tuple[torch.Tensor | None, ...]:
    logp, dhidden, row_weight, hidden, weight, bias, target, lse = ctx.saved_tensors
    grads: list[torch.Tensor | None] = [None] * 11
    if grad is None:
        return tuple(grads)
    if row_weight is not None:
        grad = torch.where(row_weight == 0, 0, grad)
    grad = grad.contiguous()
    if ctx.needs_input_grad[0]:
        grads[0] = losses.scale_stash(dhidden, grad, logp)
        if ctx.group_name is not None:
            grads[0] = vocabulary.sum_over_group(grads[0], ctx.group_name)
    if weight is not None:
        grad_weight, grad_bias = linear_log_prob_backward_weight(
            hidden, weight, bias, target, grad, *ctx.options, logp, lse, ctx.backend
        )
        grads[1] = grad_weight if ctx.needs_input_grad[1] else None
        grads[2] = grad_bias if ctx.needs_input_grad[2] else None
    return tuple(grads)


linear_log_prob_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("trace_kernels::linear_log_prob_backward_weight", mutates_args=())
def linear_log_prob_backward_weight(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_grad: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    logp: torch.Tensor,
    lse: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dweight [V, H] and dbias [V]: sums of row_grad_t * d logp_t; rows with row_grad 0 are dropped."""
    with losses.without_autocast(hidden.device):
        functions = backends.select(backend, hidden.device, hidden, weight, bias)
        call = Call(hidden, weight, bias, target[:, None], row_grad, ignore_index, softcap, logit_scale)
        # Of the target it is 1 - p, which the log-probability knows better than any logit.
        gradient = Gradient(-torch.ones_like(lse), None, -torch.expm1(logp)[:, None])
        _, dweight, dbias = functions.backward(call, lse, gradient, False, True)
    return dweight, dbias


@linear_log_prob_backward_weight.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse = others[-2]
    return weight.new_empty(weight.shape), lse.new_empty(weight.shape[0])


linear_log_prob_backward_weight.register_autograd(losses.refuse_second_order)
