"""`linear_cross_entropy`: token-weighted cross-entropy from hidden states and a language-model head."""

from __future__ import annotations

from typing import Any

import torch

from trace_kernels.ops.linear_cross_entropy import token_stats
from trace_kernels.ops.linear_cross_entropy.backends import backends
from trace_kernels.ops.linear_cross_entropy.log_prob import per_token
from trace_kernels.ops.linear_cross_entropy.mean_logit import linear_mean_logit
from trace_kernels.shared import losses
from trace_kernels.shared.linear import Call, call_of, needs_gradient


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    group: Any = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Token-weighted cross-entropy of a language-model head, without materialising the [T, V] logits.

    .. math::
        z_t = \text{softcap}(\text{logit\_scale} \cdot (W h_t + b)), \qquad
        \text{nll}_t = \log \sum_v e^{z_{tv}} - z_{t, \text{target}_t}, \qquad
        \text{loss} = \frac{\sum_t w_t \, \text{nll}_t}{\sum_t w_t}

    over the tokens whose target is not `ignore_index`; softcap(x) = cap * tanh(x / cap), or x without one. The
    position t predicts target t: shift the labels before the call.

    With a label smoothing e and a z-loss c, nll_t becomes :math:`(1 - e) \, \text{nll}_t + e \, \frac1V \sum_v -\log
    p_{tv} + c \, (\log \sum_v e^{z_{tv}})^2`. Every backend serves both without logits, at the costs of
    reduction="none"; a label smoothing beside a softcap makes the logits of a few rows at a time in plain torch.

    Logits and losses are float32 whatever the inputs (float64 for float64 inputs). Tokens that are ignored or weigh
    0 cost nothing, and what their rows hold does not matter. With a frozen `weight` the gradient takes two passes over
    the head in all, with a trainable one three (on a CPU four for the rows beyond the H-th), or four with
    reduction="none", a `token_weight` that needs a gradient or float16.

    Args:
        hidden: [..., H] floating, any leading shape, H at least 1.
        weight: [V, H], the dtype of `hidden`.
        target: [...] int64, in [0, V) or `ignore_index`.
        token_weight: [...] floating, of any sign; ones by default. Differentiable: d loss / d w_t is nll_t for "sum"
            and "none", and for "mean" includes the denominator's part.
        bias: [V] floating.
        ignore_index: a target that does not count.
        reduction: "mean", "sum" (of w_t * nll_t), or "none" (w_t * nll_t, 0 where ignored).
        normalizer: a number or 0-d tensor that replaces the denominator of "mean"; a constant.
        softcap: from 1e-30 to 1e30.
        logit_scale: finite; 1 / temperature.
        label_smoothing: from 0 to 1, the share of the loss that is spread over all classes, as torch defines it.
        z_loss: finite, at least 0: times the squared logsumexp, weighted as the loss is.
        group: None, or a torch.distributed ProcessGroup or DeviceMesh over which the vocabulary is split: see below.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        0-d, or [...] for "none"; float32 (float64 for float64 inputs). Without a counted token, or with a
        denominator of 0, the loss is 0 and so are its gradients. Differentiable once in hidden, weight, bias and
        token_weight; a second-order gradient raises RuntimeError.

    With `group`, every process of it holds a slice of its own, `weight` [V_r, H] and `bias` [V_r], in the order of the
    ranks and of any sizes, and the same values in all other arguments; targets count classes of the whole vocabulary.
    A DTensor with Shard(0) gives its slice; ``group=weight.device_mesh`` says that it is meant so. The loss is the same
    on all processes, and all of them must call `backward`. The gradient of `hidden` is summed over the group here
    (what does so elsewhere, such as Megatron's copy_to_tensor_model_parallel_region, must then be left out), that of
    `weight` stays with its slice. A trainable head takes four passes over its slice then.

    Under autocast hidden and weight are cast as torch.nn.functional.linear would cast them.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; the message names the argument. On a GPU a
            target outside [0, V) yields NaN in its row, and raises with TRACE_KERNELS_DEBUG=1 only.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, trace_kernels as tk
        >>> hidden, weight = torch.zeros(3, 8, requires_grad=True), torch.randn(4, 8)
        >>> loss = tk.linear_cross_entropy(hidden, weight, torch.tensor([0, 3, -100]), torch.tensor([1.0, -3.0, 9.0]))
        >>> f"{loss.item():.4f}"  # log(4)
        '1.3863'
        >>> loss.backward()
    """
    call = call_of(hidden, weight, target, bias, ignore_index, softcap, logit_scale, group)
    losses.check_weighting(token_weight, reduction, normalizer, target.shape, hidden.device, "hidden")
    losses.check_penalties(label_smoothing, z_loss)
    penalised = label_smoothing > 0 or z_loss > 0
    if penalised and group is not None:
        raise ValueError("group: given with label_smoothing or z_loss, allowed is then None")
    assert call.target is not None
    dtype = losses.compute_dtype(call.hidden.dtype)
    weighting = losses.Weighting(token_weight, call.target != ignore_index, reduction, normalizer, dtype)
    whole = weighting.known and reduction != "none" and call.group_name is None and not penalised
    if whole and losses.stash_keeps_digits(call.weight):
        return -_sum(call, weighting.coefficients(), backend)[0]
    if backend != "auto" and not torch.compiler.is_compiling():
        # What follows is linear_log_prob, whose name a refusal bears: here it bears that of the op that was called.
        backends.select(backend, hidden.device, *call[:3])
    # A weight that needs a gradient needs its token's loss, also when it is 0.
    call = Call(*call[:4], weighting.rows if weighting.known else None, *call[5:])
    if penalised:
        logp, lse = token_stats.per_token(call.of_one_target(), backend)
        mean = linear_mean_logit(call) if label_smoothing > 0 else lse
        loss = weighting.reduce(losses.penalised(logp[:, 0], lse, mean, label_smoothing, z_loss))
    else:
        loss = weighting.reduce(-per_token(call, backend))
    return loss.view(target.shape) if reduction == "none" else loss


def log_prob_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    coefficient: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Minus `linear_cross_entropy` with reduction "sum", and what it is the sum of, for callers that log that too.

    `coefficient` [...] are the token weights, floating, of any sign, constants; the rest is as there.

    Returns:
        :math:`\sum_t c_t \log p_t`, 0-d; and log p [...], constants, 0 where c is 0 or the target is ignored.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> total, log_probs = log_prob_sum(hidden, weight, torch.tensor([0, 0]), torch.tensor([1.0, 0.5]))
        >>> log_probs
        tensor([-0.1269, -2.1269])
        >>> round(total.item(), 4)
        -1.1904
    """
    call = call_of(hidden, weight, target, bias, ignore_index, softcap, logit_scale)
    losses.check_weighting(coefficient, "sum", None, target.shape, hidden.device, "hidden")
    assert call.target is not None
    counted, dtype = call.target != ignore_index, losses.compute_dtype(call.hidden.dtype)
    coefficients = losses.Weighting(coefficient.detach(), counted, "sum", None, dtype).coefficients()
    if losses.stash_keeps_digits(call.weight):
        total, logp = _sum(call, coefficients, backend)
    else:
        logp = per_token(Call(*call[:4], coefficients, *call[5:]), backend)
        assert coefficients is not None
        total, logp = (logp * coefficients).sum(), logp.detach()
    return total, logp.view(target.shape)


def _sum(call: Call, coefficients: torch.Tensor | None, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    wanted = (needs_gradient(call.hidden), needs_gradient(call.weight, call.bias))
    total, *_, logp = linear_log_prob_sum(*call[:4], coefficients, *call[5:8], *wanted, backend)
    losses.lend_stash(total)
    return total, logp


@torch.library.custom_op("trace_kernels::linear_log_prob_sum", mutates_args=())
def linear_log_prob_sum(
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of row_weight_t * logp_t; the weights are constants, so both gradients are formed at once. Last: logp."""
    losses.check_target_values(target, weight.shape[0], ignore_index)
    call = Call(hidden, weight, bias, target, row_weight, ignore_index, softcap, logit_scale)
    with losses.without_autocast(hidden.device):
        functions = backends.select(backend, hidden.device, hidden, weight, bias)
        logp, _, dhidden, dweight, dbias = functions.forward(call, want_dhidden, want_dweight)
    total = (logp if row_weight is None else logp * row_weight).sum()
    return total, dhidden, dweight, dbias, logp


@linear_log_prob_sum.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> Any:
    *_, want_dhidden, want_dweight, _ = others
    (num_rows, width), num_classes = hidden.shape, weight.shape[0]
    total = hidden.new_empty((), dtype=losses.compute_dtype(hidden.dtype))
    return (
        total,
        hidden.new_empty(num_rows if want_dhidden else 0, width),
        weight.new_empty(num_classes if want_dweight else 0, width),
        total.new_empty(num_classes if want_dweight else 0),
        total.new_empty(num_rows),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[:4], inputs[4])


def _backward(ctx: Any, grad: torch.Tensor | None, *unused: None) -> tuple[torch.Tensor | None, ...]:
    total, dhidden, dweight, dbias, row_weight = ctx.saved_tensors
    grads: list[torch.Tensor | None] = [None] * 11
    if grad is not None:
        if ctx.needs_input_grad[0]:
            row_grad = grad if row_weight is None else grad * row_weight
            grads[0] = losses.scale_stash(dhidden, row_grad, total)
        if ctx.needs_input_grad[1]:
            grads[1] = losses.scale_weight_stash(ctx, dweight, grad, total)
        if ctx.needs_input_grad[2]:
            grads[2] = losses.scale_stash(dbias, grad, total)
    return tuple(grads)


linear_log_prob_sum.register_autograd(_backward, setup_context=_setup)
