"""`linear_kl`: token-weighted KL(ref || policy) from two pairs of hidden states and heads."""

from __future__ import annotations

import functools
from typing import Any

import torch

from trace_kernels.ops.linear_kl import cuda, divergence, native, reference
from trace_kernels.runtime import cuda_backend, triton_backend, validate
from trace_kernels.runtime.backends import OpBackends
from trace_kernels.shared import losses, vocabulary
from trace_kernels.shared.linear import Call, needs_gradient
from trace_kernels.shared.softmax import softplus

# A backend's ``refuse`` gets (hidden [T, H], weight [V, H], ref_hidden [T, R], ref_weight [V, R]); its functions have
# the arguments of reference.py: a `Call` of the policy, which has the weights of the rows, and one of the reference.
backends = OpBackends("linear_kl")
backends.register("reference", forward=reference.forward, backward_weight=reference.backward_weight)
backends.register(
    "cpu",
    unavailable=native.cpu_unavailable,
    refuse=native.refuse_cpu,
    forward=native.forward_cpu,
    backward_weight=native.backward_weight_cpu,
)
triton_backend.register(backends, __package__, "forward", "backward_weight")
cuda_backend.register(backends, cuda, "forward", "backward_weight")


def linear_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    beta: float = 0.0,
    group: Any = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Token-weighted KL divergence from a reference model to the policy, without materialising either's logits.

    .. math::
        p_t = \text{softmax}(\text{softcap}(\text{logit\_scale} \cdot W h_t)), \quad
        q_t = \text{softmax}(\text{softcap}(\text{logit\_scale} \cdot W^\text{ref} h^\text{ref}_t)), \quad
        \text{kl}_t = \sum_v q_{tv} \log \frac{q_{tv}}{p_{tv}}, \quad
        \text{loss} = \frac{\sum_t w_t \, \text{kl}_t}{\sum_t w_t}

    and with a `beta` the generalised Jensen-Shannon divergence, as TRL and Liger define it, in place of kl_t:

    .. math::
        \text{beta} \; \text{KL}(q_t \| m_t) + (1 - \text{beta}) \, \text{KL}(p_t \| m_t), \quad
        m_t = (1 - \text{beta}) \, p_t + \text{beta} \; q_t

    over the tokens of the mask; softcap(x) = cap * tanh(x / cap), or x without one. The reference is constant: it gets
    no gradient. Logits and losses are float32 whatever the inputs (float64 for float64 inputs), in nats. Tokens
    outside the mask or of weight 0 cost nothing, and what their rows hold does not matter.

    Args:
        hidden: [..., H] floating, any leading shape, H at least 1.
        weight: [V, H], the dtype of `hidden`.
        ref_hidden: [..., R], the same leading shape; the width R may differ.
        ref_weight: [V, R], the dtype of `ref_hidden`, which may differ from that of `hidden`.
        token_weight: [...] floating, of any sign; ones by default. Differentiable: d loss / d w_t is kl_t for "sum"
            and "none", and for "mean" includes the denominator's part.
        mask: [...] bool, the tokens that count; all by default.
        reduction: "mean", "sum" (of w_t * kl_t), or "none" (w_t * kl_t, 0 outside the mask).
        normalizer: a number or 0-d tensor that replaces the denominator of "mean"; a constant.
        softcap: from 1e-30 to 1e30.
        logit_scale: finite; 1 / temperature.
        beta: from 0 to 1. 0 is KL(ref || policy), 1 is KL(policy || ref), between them the divergence above; any but 0
            is computed in plain torch, some rows at a time, whatever the backend, and takes longer than 0.
        group: None, or a ProcessGroup or DeviceMesh over which the vocabulary is split; see linear_cross_entropy. Both
            weights are split at the same classes.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        0-d, or [...] for "none"; float32 (float64 for float64 inputs). Without a counted token, or with a
        denominator of 0, the loss is 0 and so are its gradients. Differentiable once in hidden, weight and
        token_weight; a second-order gradient raises RuntimeError.

    Under autocast hidden states and weights are cast as torch.nn.functional.linear would cast them.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; the message names the argument.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, trace_kernels as tk
        >>> hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
        >>> loss = tk.linear_kl(hidden, weight, hidden, weight, mask=torch.tensor([True, True, False]))
        >>> abs(loss.item()) < 1e-6
        True
        >>> loss.backward()
        >>> policy, ref = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 9.0]])  # of each other nothing is left
        >>> f"{tk.linear_kl(policy, torch.eye(2), ref, torch.eye(2), beta=0.5).item():.2f}"  # log 2
        '0.69'
    """
    weight, sliced, group_name = vocabulary.local_head(weight, ref_weight, group, ("weight", "ref_weight"))
    ref_weight = ref_weight if sliced is None else sliced
    losses.check_linear(hidden, weight)
    losses.check_linear(ref_hidden, ref_weight, "ref_hidden", "ref_weight")
    leading = hidden.shape[:-1]
    validate.check_device("ref_hidden", ref_hidden, hidden.device, "hidden")
    if ref_hidden.shape[:-1] != leading:
        raise ValueError(
            f"ref_hidden: got shape {list(ref_hidden.shape)}, allowed is [..., R] with the leading shape of hidden, "
            f"{list(leading)}"
        )
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: got shape {list(ref_weight.shape)}, allowed is [V, R] with V = {weight.shape[0]}, "
            "the first size of weight"
        )
    losses.check_weighting(token_weight, reduction, normalizer, leading, hidden.device, "hidden")
    if mask is not None:
        validate.check_dtype("mask", mask, (torch.bool,))
        validate.check_shape("mask", mask, leading, "the leading shape of hidden")
        validate.check_device("mask", mask, hidden.device, "hidden")
    losses.check_logits(softcap, logit_scale)
    losses.check_number("beta", beta, "a number from 0 to 1")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: got {beta}, allowed is a number from 0 to 1")
    losses.check_no_tangents(hidden=hidden, weight=weight)

    hidden, weight = losses.autocast(hidden), losses.autocast(weight)
    ref_hidden, ref_weight = losses.autocast(ref_hidden.detach()), losses.autocast(ref_weight.detach())
    losses.check_same_dtype("weight", weight, hidden.dtype, "hidden")
    losses.check_same_dtype("ref_weight", ref_weight, ref_hidden.dtype, "ref_hidden")
    dtype = losses.compute_dtype(hidden.dtype)
    num_rows = leading.numel()
    rows = hidden.reshape(num_rows, hidden.shape[-1])
    matrices = (rows, weight, ref_hidden.reshape(num_rows, ref_hidden.shape[-1]), ref_weight)
    options = (None if softcap is None else float(softcap), float(logit_scale), float(beta))
    counted = hidden.new_ones(num_rows, dtype=torch.bool) if mask is None else mask.reshape(-1)
    in_mask = None if mask is None else counted.to(dtype)
    weighting = losses.Weighting(token_weight, counted, reduction, normalizer, dtype)
    if weighting.known and reduction != "none" and group_name is None and losses.stash_keeps_digits(weight):
        coefficients = weighting.coefficients()
        coefficients = in_mask if coefficients is None else coefficients
        wanted = (needs_gradient(rows), needs_gradient(weight))
        total: torch.Tensor = linear_kl_sum(*matrices, coefficients, *options, *wanted, backend)[0]
        losses.lend_stash(total)
        return total
    # A weight that needs a gradient needs its token's loss, also when it is 0.
    row_weight = weighting.rows if weighting.known and weighting.rows is not None else in_mask
    kl = linear_kl_op(*matrices, row_weight, *options, group_name, needs_gradient(rows), backend)[0]
    loss = weighting.reduce(kl)
    return loss.view(leading) if reduction == "none" else loss


def _calls(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Call, Call]:
    """Of the policy and of the reference; there is no target."""
    policy = Call(hidden, weight, None, None, row_weight, 0, softcap, logit_scale)
    return policy, policy._replace(hidden=ref_hidden, weight=ref_weight)


@torch.library.custom_op("trace_kernels::linear_kl", mutates_args=())
def linear_kl_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    beta: float,
    group_name: str | None,
    want_dhidden: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kl, lse, ref_lse, pivot and difference [T], see reference.py, and dhidden [T, H]."""
    calls = _calls(hidden, weight, ref_hidden, ref_weight, row_weight, softcap, logit_scale)
    with losses.without_autocast(hidden.device):
        functions = backends.select(backend, hidden.device, hidden, weight, ref_hidden, ref_weight)
        if beta != 0:
            kl, dhidden, _ = divergence.forward(*calls, beta, want_dhidden, False, group_name)
            unused = torch.zeros_like(kl)
            return kl, unused, unused.clone(), kl.new_zeros(len(kl), dtype=torch.int64), unused.clone(), dhidden
        exchange = None if group_name is None else functools.partial(_exchange, group_name)
        *rows, dhidden, _ = functions.forward(*calls, want_dhidden, False, exchange)
    return *rows, dhidden


def _exchange(
    group_name: str,
    kl: torch.Tensor,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    logp: torch.Tensor,
    ref_logp: torch.Tensor,
) -> None:
    """Makes those of the whole vocabulary out of those of a slice.

    With a and b the slice's shares of the policy's and the reference's probability, kl is the sum over slices of
    ``b * (kl_r + log(b / a))``. A log-probability falls by that of the slice. A share of nearly 1 keeps its digits.
    """
    parts = vocabulary.gathered(torch.stack([kl, lse, ref_lse]), group_name)
    log_share, log_ref_share = (
        torch.stack([-softplus(vocabulary.others(all_lse, rank) - all_lse[rank]) for rank in range(len(all_lse))])
        for all_lse in (parts[:, 1], parts[:, 2])
    )
    ref_share = log_ref_share.exp()
    terms = ref_share * (parts[:, 0] + log_ref_share - log_share)
    kl.copy_(torch.where(ref_share == 0, 0, terms).sum(dim=0))
    rank = vocabulary.rank_in(group_name)
    logp += log_share[rank]
    ref_logp += log_ref_share[rank]
    lse.copy_(torch.logsumexp(parts[:, 1], dim=0))
    ref_lse.copy_(torch.logsumexp(parts[:, 2], dim=0))


@linear_kl_op.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> Any:
    *_, want_dhidden, _ = others
    num_rows, width = hidden.shape
    kl = hidden.new_empty(num_rows, dtype=losses.compute_dtype(hidden.dtype))
    dhidden = hidden.new_empty(num_rows if want_dhidden else 0, width)
    pivot = kl.new_empty(num_rows, dtype=torch.int64)
    return kl, torch.empty_like(kl), torch.empty_like(kl), pivot, torch.empty_like(kl), dhidden


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *matrices, row_weight, softcap, logit_scale, beta, ctx.group_name, _, ctx.backend = inputs
    ctx.options = (softcap, logit_scale, beta)
    kl, *rows, dhidden = output
    ctx.mark_non_differentiable(*rows, dhidden)
    ctx.set_materialize_grads(False)
    recompute = [*matrices, *rows] if ctx.needs_input_grad[1] else []
    ctx.save_for_backward(kl, dhidden, row_weight, *recompute)


def _backward(ctx: Any, grad: torch.Tensor | None, *unused: None) -> tuple[torch.Tensor | None, ...]:
    kl, dhidden, row_weight, *recompute = ctx.saved_tensors
    grads: list[torch.Tensor | None] = [None] * 11
    if grad is not None:
        if row_weight is not None:
            grad = torch.where(row_weight == 0, 0, grad)
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            grads[0] = losses.scale_stash(dhidden, grad, kl)
            if ctx.group_name is not None:
                grads[0] = vocabulary.sum_over_group(grads[0], ctx.group_name)
        if recompute:
            grads[1] = linear_kl_backward_weight(
                *recompute[:4], grad, *ctx.options, *recompute[4:], ctx.group_name, ctx.backend
            )
    return tuple(grads)


linear_kl_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("trace_kernels::linear_kl_backward_weight", mutates_args=())
def linear_kl_backward_weight(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_grad: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    beta: float,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    pivot: torch.Tensor,
    difference: torch.Tensor,
    group_name: str | None,
    backend: str,
) -> torch.Tensor:
    """Dweight [V, H]: the sum of row_grad_t * d kl_t; rows with row_grad 0 are dropped."""
    calls = _calls(hidden, weight, ref_hidden, ref_weight, row_grad, softcap, logit_scale)
    with losses.without_autocast(hidden.device):
        functions = backends.select(backend, hidden.device, hidden, weight, ref_hidden, ref_weight)
        if beta != 0:
            return divergence.forward(*calls, beta, False, True, group_name)[2]
        dweight: torch.Tensor = functions.backward_weight(*calls, lse, ref_lse, pivot, difference)
    return dweight


@linear_kl_backward_weight.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
    return weight.new_empty(weight.shape)


linear_kl_backward_weight.register_autograd(losses.refuse_second_order)


@torch.library.custom_op("trace_kernels::linear_kl_sum", mutates_args=())
def linear_kl_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    beta: float,
    want_dhidden: bool,
    want_dweight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of row_weight_t * kl_t; the weights are constants, so both gradients are formed at once."""
    calls = _calls(hidden, weight, ref_hidden, ref_weight, row_weight, softcap, logit_scale)
    with losses.without_autocast(hidden.device):
        functions = backends.select(backend, hidden.device, hidden, weight, ref_hidden, ref_weight)
        if beta != 0:
            kl, dhidden, dweight = divergence.forward(*calls, beta, want_dhidden, want_dweight, None)
        else:
            kl, *_, dhidden, dweight = functions.forward(*calls, want_dhidden, want_dweight, None)
    return (kl if row_weight is None else kl * row_weight).sum(), dhidden, dweight


@linear_kl_sum.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *_, want_dhidden, want_dweight, _ = others
    num_rows, width = hidden.shape
    return (
        hidden.new_empty((), dtype=losses.compute_dtype(hidden.dtype)),
        hidden.new_empty(num_rows if want_dhidden else 0, width),
        weight.new_empty(weight.shape[0] if want_dweight else 0, width),
    )


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, inputs[4])


def _backward_sum(ctx: Any, grad: torch.Tensor | None, *unused: None) -> tuple[torch.Tensor | None, ...]:
    total, dhidden, dweight, row_weight = ctx.saved_tensors
    grads: list[torch.Tensor | None] = [None] * 11
    if grad is not None:
        if ctx.needs_input_grad[0]:
            grads[0] = losses.scale_stash(dhidden, grad if row_weight is None else grad * row_weight, total)
        if ctx.needs_input_grad[1]:
            grads[1] = losses.scale_weight_stash(ctx, dweight, grad, total)
    return tuple(grads)


linear_kl_sum.register_autograd(_backward_sum, setup_context=_setup_sum)
