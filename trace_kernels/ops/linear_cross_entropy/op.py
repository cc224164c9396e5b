"""`linear_cross_entropy`: token-weighted cross-entropy from hidden states and a language-model head."""

from __future__ import annotations

from typing import Any

import torch

from trace_kernels.ops.linear_cross_entropy.log_prob import backends, check_inputs, needs_gradient, per_token
from trace_kernels.shared import losses, vocabulary


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
    weight, bias, group_name = vocabulary.local_head(weight, bias, group)
    check_inputs(hidden, weight, target, bias, ignore_index, softcap, logit_scale)
    losses.check_weighting(token_weight, reduction, normalizer, hidden.shape[:-1], hidden.device, "hidden")
    hidden, weight = losses.autocast(hidden), losses.autocast(weight)
    losses.check_same_dtype("weight", weight, hidden.dtype, "hidden")
    dtype = losses.compute_dtype(hidden.dtype)
    softcap = None if softcap is None else float(softcap)
    rows, flat_target = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(-1).contiguous()
    weighting = losses.Weighting(token_weight, flat_target != ignore_index, reduction, normalizer, dtype)
    if weighting.known and reduction != "none" and group_name is None and losses.stash_keeps_digits(weight):
        coefficients = weighting.coefficients()
        return -_sum(rows, weight, bias, flat_target, coefficients, ignore_index, softcap, logit_scale, backend)[0]
    if backend != "auto" and not torch.compiler.is_compiling():
        # What follows is linear_log_prob, whose name a refusal bears: here it bears that of the op that was called.
        backends.select(backend, hidden.device, hidden, weight, bias)
    # A weight that needs a gradient needs its token's loss, also when it is 0.
    row_weight = weighting.rows if weighting.known else None
    logp = per_token(
        rows, weight, bias, flat_target, row_weight, ignore_index, softcap, float(logit_scale), group_name, backend
    )
    loss = weighting.reduce(-logp)
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
    check_inputs(hidden, weight, target, bias, ignore_index, softcap, logit_scale)
    losses.check_weighting(coefficient, "sum", None, hidden.shape[:-1], hidden.device, "hidden")
    hidden, weight = losses.autocast(hidden), losses.autocast(weight)
    losses.check_same_dtype("weight", weight, hidden.dtype, "hidden")
    softcap = None if softcap is None else float(softcap)
    rows, flat_target = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(-1).contiguous()
    counted, dtype = flat_target != ignore_index, losses.compute_dtype(hidden.dtype)
    coefficients = losses.Weighting(coefficient.detach(), counted, "sum", None, dtype).coefficients()
    if losses.stash_keeps_digits(weight):
        total, logp = _sum(rows, weight, bias, flat_target, coefficients, ignore_index, softcap, logit_scale, backend)
    else:
        assert coefficients is not None
        logp = per_token(
            rows, weight, bias, flat_target, coefficients, ignore_index, softcap, float(logit_scale), None, backend
        )
        total, logp = (logp * coefficients).sum(), logp.detach()
    return total, logp.view(target.shape)


def _sum(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    coefficients: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = None if bias is None else bias.to(losses.compute_dtype(rows.dtype)).contiguous()
    total, *_, logp = linear_log_prob_sum(
        rows, weight, bias, target, coefficients, ignore_index, softcap, float(logit_scale),
        needs_gradient(rows), needs_gradient(weight, bias), backend,
    )  # fmt: skip
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
    with losses.without_autocast(hidden.device):
        logp, _, dhidden, dweight, dbias = backends.select(backend, hidden.device, hidden, weight, bias).forward(
            hidden, weight, bias, target, row_weight, ignore_index, softcap, logit_scale, want_dhidden, want_dweight
        )
    total = (logp if row_weight is None else logp * row_weight).sum()
    return total, dhidden, dweight, dbias, logp


@linear_log_prob_sum.register_fake
def _(
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
    (num_rows, width), vocabulary = hidden.shape, weight.shape[0]
    total = hidden.new_empty((), dtype=losses.compute_dtype(hidden.dtype))
    return (
        total,
        hidden.new_empty(num_rows if want_dhidden else 0, width),
        weight.new_empty(vocabulary if want_dweight else 0, width),
        total.new_empty(vocabulary if want_dweight else 0),
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
