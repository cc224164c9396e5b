"""The mean logit of each token, which label smoothing asks for."""

from __future__ import annotations

from typing import Any

import torch

from trace_kernels.ops.linear_cross_entropy.reference import operands
from trace_kernels.shared import losses
from trace_kernels.shared.linear import Call
from trace_kernels.shared.softmax import mean_logit, slope

#: Logits that exist at a time.
LOGITS = 2**22


def linear_mean_logit(call: Call) -> torch.Tensor:
    """[T] the mean over the classes of softcap(logit_scale * (W h + b)), 0 in dropped rows; differentiable.

    Without a softcap it is a product with the mean row of the head. With one the logits of a few rows at a time are
    made in plain torch, whatever the backend, and again in the backward.
    """
    if call.softcap is not None:
        mean: torch.Tensor = linear_mean_logit_op(*call[:8])
        return mean
    dtype, dropped = losses.compute_dtype(call.hidden.dtype), ~call.kept()
    # What dropped rows hold stays out of the gradient of the head.
    hidden = call.hidden.masked_fill(dropped[:, None], 0).to(dtype)
    mean = hidden @ call.weight.mean(dim=0, dtype=dtype)
    if call.bias is not None:
        mean = mean + call.bias.mean()
    return (mean * call.logit_scale).masked_fill(dropped, 0)


def _chunks(call: Call) -> list[slice]:
    rows = max(1, LOGITS // call.num_classes)
    return [slice(start, start + rows) for start in range(0, call.hidden.shape[0], rows)]


@torch.library.custom_op("trace_kernels::linear_mean_logit", mutates_args=())
def linear_mean_logit_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    call = Call(hidden, weight, bias, target, row_weight, ignore_index, softcap, logit_scale)
    mean = hidden.new_zeros(hidden.shape[0], dtype=losses.compute_dtype(hidden.dtype))
    with losses.without_autocast(hidden.device):
        for rows in _chunks(call):
            kept = call.rows(rows).kept()
            logits = operands(call.rows(rows), kept)[2]
            mean[rows] = mean_logit(logits, softcap, logit_scale).masked_fill(~kept, 0)
    return mean


@linear_mean_logit_op.register_fake
def _(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=losses.compute_dtype(hidden.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    call = Call(*inputs)
    ctx.options = (call.ignore_index, call.softcap, call.logit_scale)
    ctx.save_for_backward(*call[:5])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    hidden, weight, bias, target, row_weight = ctx.saved_tensors
    grads = linear_mean_logit_backward(grad, hidden, weight, bias, target, row_weight, *ctx.options)
    return *(value if needed else None for value, needed in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 5


linear_mean_logit_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("trace_kernels::linear_mean_logit_backward", mutates_args=())
def linear_mean_logit_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    call = Call(hidden, weight, bias, target, row_weight, ignore_index, softcap, logit_scale)
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    dweight = grad.new_zeros(weight.shape)
    dbias = grad.new_zeros(weight.shape[0])
    with losses.without_autocast(hidden.device):
        for rows in _chunks(call):
            part = call.rows(rows)
            kept = part.kept()
            x, w, logits = operands(part, kept)
            factor = torch.where(kept, grad[rows], 0) / call.num_classes
            dlogits = slope(logits, softcap, logit_scale) * factor[:, None]
            dhidden[rows] = dlogits @ w
            dweight.addmm_(dlogits.T, x)
            dbias += dlogits.sum(dim=0)
    return dhidden, dweight.to(weight.dtype), dbias


@linear_mean_logit_backward.register_fake
def _(grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> Any:
    dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return dhidden, weight.new_empty(weight.shape), grad.new_empty(weight.shape[0])


linear_mean_logit_backward.register_autograd(losses.refuse_second_order)
