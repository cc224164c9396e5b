"""`linear_log_prob`: per-token log-probabilities from hidden states, and the autograd of the linear ops.

`linear_cross_entropy` (op.py) is built on the same backend functions. They are registered for both ops at once.

A backend's ``refuse`` gets (hidden [T, H], weight [V, H], bias [V] or None); its functions are ``forward`` and
``backward_weight`` with the arguments of reference.py. hidden and weight may have any strides. bias, row_weight,
lse and row_grad are contiguous and of the compute dtype (float64 for float64 inputs, float32 for all others).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from trace_kernels.ops.cross_entropy.reference import kept_rows
from trace_kernels.ops.linear_cross_entropy import cuda, native, reference
from trace_kernels.runtime import cuda_backend, triton_backend, validate
from trace_kernels.runtime.backends import OpBackends
from trace_kernels.shared import losses, vocabulary

backends = OpBackends("linear_cross_entropy")
log_prob_backends = OpBackends("linear_log_prob")
for _op in (backends, log_prob_backends):
    _op.register("reference", forward=reference.forward, backward_weight=reference.backward_weight)
    triton_backend.register(_op, __package__, "forward", "backward_weight")
    cuda_backend.register(_op, cuda, "forward", "backward_weight")
    _op.register(
        "cpu",
        unavailable=native.cpu_unavailable,
        refuse=native.refuse_cpu,
        forward=native.forward_cpu,
        backward_weight=native.backward_weight_cpu,
    )


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
    logits once more.

    Args:
        hidden: [..., H] floating, any leading shape, H at least 1.
        weight: [V, H], the dtype of `hidden`.
        target: [...] int64, in [0, V) or `ignore_index`.
        bias: [V] floating.
        ignore_index: a target that is not scored.
        softcap: from 1e-30 to 1e30.
        logit_scale: finite; 1 / temperature.
        group: None, or a ProcessGroup or DeviceMesh over which the vocabulary is split; see linear_cross_entropy.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        [...] float32 (float64 for float64 inputs), natural logarithm, 0 where the target is `ignore_index`.
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
    """
    weight, bias, group_name = vocabulary.local_head(weight, bias, group)
    check_inputs(hidden, weight, target, bias, ignore_index, softcap, logit_scale)
    hidden, weight = losses.autocast(hidden), losses.autocast(weight)
    losses.check_same_dtype("weight", weight, hidden.dtype, "hidden")
    softcap = None if softcap is None else float(softcap)
    rows = hidden.reshape(target.numel(), hidden.shape[-1])
    logp = per_token(
        rows, weight, bias, target.reshape(-1), None, ignore_index, softcap, float(logit_scale), group_name, backend
    )
    return logp.view(target.shape)


def check_inputs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> None:
    losses.check_linear(hidden, weight)
    losses.check_target(target, hidden.shape[:-1], hidden.device, "hidden", ignore_index)
    if bias is not None:
        validate.check_dtype("bias", bias, validate.FLOAT_DTYPES)
        validate.check_shape("bias", bias, (weight.shape[0],), "[V]")
        validate.check_device("bias", bias, hidden.device, "hidden")
    losses.check_logits(softcap, logit_scale)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        validate.check_no_tangent(name, tensor, "the losses")


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def per_token(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    group_name: str | None,
    backend: str,
) -> torch.Tensor:
    """[T] log-probabilities, differentiable; rows of weight 0 are dropped, the other weights do not matter."""
    bias = None if bias is None else bias.to(losses.compute_dtype(hidden.dtype)).contiguous()
    arguments = (
        hidden, weight, bias, target.contiguous(), row_weight, ignore_index, softcap, logit_scale,
        needs_gradient(hidden), backend,
    )  # fmt: skip
    outputs = linear_log_prob_op(*arguments) if group_name is None else linear_log_prob_split(*arguments, group_name)
    logp: torch.Tensor = outputs[0]
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
    want_dhidden: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    losses.check_target_values(target, weight.shape[0], ignore_index)
    with losses.without_autocast(hidden.device):
        logp, lse, dhidden, _, _ = log_prob_backends.select(backend, hidden.device, hidden, weight, bias).forward(
            hidden, weight, bias, target, row_weight, ignore_index, softcap, logit_scale, want_dhidden, False
        )
    return logp, lse, dhidden


@linear_log_prob_op.register_fake
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
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, width = hidden.shape
    logp = hidden.new_empty(num_rows, dtype=losses.compute_dtype(hidden.dtype))
    return logp, torch.empty_like(logp), hidden.new_empty(num_rows if want_dhidden else 0, width)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.group_name = None
    _save(ctx, inputs, output)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, target, row_weight, *ctx.options, _, ctx.backend = inputs
    logp, lse, dhidden = output
    ctx.mark_non_differentiable(lse, dhidden)
    ctx.set_materialize_grads(False)
    # The weight's gradient is recomputed from the inputs; a frozen head keeps none of them alive.
    recompute = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    inputs = (hidden, weight, bias, target, lse) if recompute else (None,) * 5
    ctx.save_for_backward(logp, dhidden, row_weight, *inputs)


def _backward(ctx: Any, grad: torch.Tensor | None, *unused: None) -> tuple[torch.Tensor | None, ...]:
    logp, dhidden, row_weight, hidden, weight, bias, target, lse = ctx.saved_tensors
    none = (None,) * (7 if ctx.group_name is None else 8)
    if grad is None:
        return None, None, None, *none
    if row_weight is not None:
        grad = torch.where(row_weight == 0, 0, grad)
    grad = grad.contiguous()
    grad_hidden = losses.scale_stash(dhidden, grad, logp) if ctx.needs_input_grad[0] else None
    if grad_hidden is not None and ctx.group_name is not None:
        grad_hidden = vocabulary.sum_over_group(grad_hidden, ctx.group_name)
    if weight is None:
        return grad_hidden, None, None, *none
    grad_weight, grad_bias = linear_log_prob_backward_weight(
        hidden, weight, bias, target, lse, grad, *ctx.options, ctx.backend
    )
    return (
        grad_hidden,
        grad_weight if ctx.needs_input_grad[1] else None,
        grad_bias if ctx.needs_input_grad[2] else None,
        *none,
    )


linear_log_prob_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("trace_kernels::linear_log_prob_split", mutates_args=())
def linear_log_prob_split(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    backend: str,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`linear_log_prob_op` where weight and bias are this process's slices; also the target's place in it.

    With a its share of the row's probability, a slice without the target has the gradient a * d(-lse_r), which is a
    times the backend's. For the slice with the target it is ``d z_target - a * dlse_r = a * dlogp_r + (1 - a) *
    dz_target``, of which the last is a row of the weight: no second pass over it.
    """
    slices = vocabulary.Slices(weight.shape[0], hidden.device, group_name)
    slices.check_target(target, ignore_index)
    local_target = slices.local_target(target, ignore_index)
    with losses.without_autocast(hidden.device):
        functions = log_prob_backends.select(backend, hidden.device, hidden, weight, bias)
        options = (vocabulary.IGNORED, softcap, logit_scale, want_dhidden, False)
        logp, lse, dhidden, _, _ = functions.forward(hidden, weight, bias, local_target, row_weight, *options)
        kept = kept_rows(local_target, row_weight, vocabulary.IGNORED)
        all_lse, all_logp = vocabulary.gathered(torch.stack([lse, logp]), group_name).unbind(1)
        owner = slices.owner(target)
        here = all_lse.gather(0, owner[None])[0]
        # Of what the owner says, a small loss keeps its digits.
        combined = all_logp.gather(0, owner[None])[0] - F.softplus(vocabulary.others(all_lse, owner) - here)
        valid = slices.valid(target)
        total = torch.where(valid, torch.logsumexp(all_lse, dim=0), torch.nan)
        if want_dhidden:
            share = torch.where(kept, torch.exp(lse - total), 0)
            rest = torch.exp(vocabulary.others(all_lse, slices.rank) - total) * logit_scale
            if softcap is not None:
                rest = rest * (1 - ((logp + lse) / softcap) ** 2)
            mine = kept & (local_target >= 0)
            rows = weight.index_select(0, torch.where(mine, local_target, 0))
            corrected = torch.addcmul(dhidden * share[:, None], rows.to(lse.dtype), torch.where(mine, rest, 0)[:, None])
            dhidden = corrected.to(hidden.dtype)
    logp = torch.where(kept, torch.where(valid, combined, torch.nan), 0)
    return logp, torch.where(kept, total, 0), dhidden, local_target


@linear_log_prob_split.register_fake
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
    backend: str,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, width = hidden.shape
    logp = hidden.new_empty(num_rows, dtype=losses.compute_dtype(hidden.dtype))
    dhidden = hidden.new_empty(num_rows if want_dhidden else 0, width)
    return logp, torch.empty_like(logp), dhidden, torch.empty_like(target)


def _setup_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, _, row_weight, _, *others, ctx.group_name = inputs
    *usual, local_target = output
    ctx.mark_non_differentiable(local_target)
    _save(ctx, (hidden, weight, bias, local_target, row_weight, vocabulary.IGNORED, *others), tuple(usual))


linear_log_prob_split.register_autograd(_backward, setup_context=_setup_split)


@torch.library.custom_op("trace_kernels::linear_log_prob_backward_weight", mutates_args=())
def linear_log_prob_backward_weight(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    row_grad: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    with losses.without_autocast(hidden.device):
        functions = backends.select(backend, hidden.device, hidden, weight, bias)
        dweight, dbias = functions.backward_weight(
            hidden, weight, bias, target, lse, row_grad, ignore_index, softcap, logit_scale
        )
    return dweight, dbias


@linear_log_prob_backward_weight.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    row_grad: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return weight.new_empty(weight.shape), lse.new_empty(weight.shape[0])


linear_log_prob_backward_weight.register_autograd(losses.refuse_second_order)
