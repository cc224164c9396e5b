"""`linear_kl`: token-weighted KL(ref || policy) from two pairs of hidden states and heads."""

from __future__ import annotations

from typing import Any

import torch

from trace_kernels.ops.linear_cross_entropy.log_prob import backends as log_prob_backends
from trace_kernels.ops.linear_cross_entropy.log_prob import needs_gradient
from trace_kernels.ops.linear_kl import cuda, native, reference
from trace_kernels.runtime import cuda_backend, triton_backend, validate
from trace_kernels.runtime.backends import OpBackends
from trace_kernels.shared import losses, vocabulary

# A backend's ``refuse`` gets (hidden [T, H], weight [V, H], ref_hidden [T, R], ref_weight [V, R]); its functions have
# the arguments of reference.py. The matrices may have any strides, the reference's a dtype of their own; row_weight,
# lse, ref_lse and row_grad are contiguous and of the compute dtype.
backends = OpBackends("linear_kl")
backends.register(
    "reference",
    forward=reference.forward,
    forward_split=reference.forward_split,
    backward_weight=reference.backward_weight,
)
backends.register(
    "cpu",
    unavailable=native.cpu_unavailable,
    refuse=native.refuse_cpu,
    forward=native.forward_cpu,
    backward_weight=native.backward_weight_cpu,
)
triton_backend.register(backends, __package__, "forward", "forward_split", "backward_weight")
cuda_backend.register(backends, cuda, "forward", "forward_split", "backward_weight")


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
    group: Any = None,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Token-weighted KL divergence from a reference model to the policy, without materialising either's logits.

    .. math::
        p_t = \text{softmax}(\text{softcap}(\text{logit\_scale} \cdot W h_t)), \quad
        q_t = \text{softmax}(\text{softcap}(\text{logit\_scale} \cdot W^\text{ref} h^\text{ref}_t)), \quad
        \text{kl}_t = \sum_v q_{tv} \log \frac{q_{tv}}{p_{tv}}, \quad
        \text{loss} = \frac{\sum_t w_t \, \text{kl}_t}{\sum_t w_t}

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
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        validate.check_no_tangent(name, tensor, "the losses")

    hidden, weight = losses.autocast(hidden), losses.autocast(weight)
    ref_hidden, ref_weight = losses.autocast(ref_hidden.detach()), losses.autocast(ref_weight.detach())
    losses.check_same_dtype("weight", weight, hidden.dtype, "hidden")
    losses.check_same_dtype("ref_weight", ref_weight, ref_hidden.dtype, "ref_hidden")
    dtype = losses.compute_dtype(hidden.dtype)
    num_rows = leading.numel()
    rows = hidden.reshape(num_rows, hidden.shape[-1])
    ref_rows = ref_hidden.reshape(num_rows, ref_hidden.shape[-1])
    options = (None if softcap is None else float(softcap), float(logit_scale))
    counted = hidden.new_ones(num_rows, dtype=torch.bool) if mask is None else mask.reshape(-1)
    in_mask = None if mask is None else counted.to(dtype)
    weighting = losses.Weighting(token_weight, counted, reduction, normalizer, dtype)
    if weighting.known and reduction != "none" and group_name is None and losses.stash_keeps_digits(weight):
        coefficients = weighting.coefficients()
        coefficients = in_mask if coefficients is None else coefficients
        wanted = (needs_gradient(rows), needs_gradient(weight))
        total: torch.Tensor = linear_kl_sum(
            rows, weight, ref_rows, ref_weight, coefficients, *options, *wanted, backend
        )[0]
        losses.lend_stash(total)
        return total
    # A weight that needs a gradient needs its token's loss, also when it is 0.
    row_weight = weighting.rows if weighting.known and weighting.rows is not None else in_mask
    arguments = (rows, weight, ref_rows, ref_weight, row_weight, *options, needs_gradient(rows), backend)
    kl = (linear_kl_op(*arguments) if group_name is None else linear_kl_split(*arguments, group_name))[0]
    loss = weighting.reduce(kl)
    return loss.view(leading) if reduction == "none" else loss


@torch.library.custom_op("trace_kernels::linear_kl", mutates_args=())
def linear_kl_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with losses.without_autocast(hidden.device):
        functions = backends.select(backend, hidden.device, hidden, weight, ref_hidden, ref_weight)
        kl, lse, ref_lse, dhidden, _ = functions.forward(
            hidden, weight, ref_hidden, ref_weight, row_weight, softcap, logit_scale, want_dhidden, False
        )
    return kl, lse, ref_lse, dhidden


@linear_kl_op.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, width = hidden.shape
    kl = hidden.new_empty(num_rows, dtype=losses.compute_dtype(hidden.dtype))
    dhidden = hidden.new_empty(num_rows if want_dhidden else 0, width)
    return kl, torch.empty_like(kl), torch.empty_like(kl), dhidden


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.group_name = None
    _save(ctx, inputs, output)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *matrices, row_weight, ctx.softcap, ctx.logit_scale, _, ctx.backend = inputs
    kl, lse, ref_lse, dhidden = output
    ctx.mark_non_differentiable(lse, ref_lse, dhidden)
    ctx.set_materialize_grads(False)
    recompute = [*matrices, lse, ref_lse] if ctx.needs_input_grad[1] else []
    ctx.save_for_backward(kl, dhidden, row_weight, *recompute)


def _backward(ctx: Any, grad: torch.Tensor | None, *unused: None) -> tuple[torch.Tensor | None, ...]:
    kl, dhidden, row_weight, *recompute = ctx.saved_tensors
    grads: list[torch.Tensor | None] = [None] * (9 if ctx.group_name is None else 10)
    if grad is not None:
        if row_weight is not None:
            grad = torch.where(row_weight == 0, 0, grad)
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            grads[0] = losses.scale_stash(dhidden, grad, kl)
            if ctx.group_name is not None:
                grads[0] = vocabulary.sum_over_group(grads[0], ctx.group_name)
        if recompute:
            grads[1] = linear_kl_backward_weight(*recompute, grad, ctx.softcap, ctx.logit_scale, ctx.backend)
    return tuple(grads)


linear_kl_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("trace_kernels::linear_kl_split", mutates_args=())
def linear_kl_split(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    backend: str,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`linear_kl_op` where both weights are this process's slices.

    With a and b the slice's shares of the policy's and the reference's probability, kl is the sum over slices of
    ``b * (kl_r + log(b / a))``. The gradient needs the sums of the whole vocabulary: a backend with ``forward_split``
    asks for them after each chunk of rows. For another one it is ``b * dkl_r + (a - b) * dlse_r``, whose second term
    costs a further pass over the policy's slice and a product.
    """

    def exchange(kl: torch.Tensor, lse: torch.Tensor, ref_lse: torch.Tensor) -> None:
        parts = vocabulary.gathered(torch.stack([kl, lse, ref_lse]), group_name)
        total, ref_total = torch.logsumexp(parts[:, 1], dim=0), torch.logsumexp(parts[:, 2], dim=0)
        log_share, log_ref_share = parts[:, 1] - total, parts[:, 2] - ref_total
        ref_share = log_ref_share.exp()
        terms = ref_share * (parts[:, 0] + log_ref_share - log_share)
        kl.copy_(torch.where(ref_share == 0, 0, terms).sum(dim=0))
        lse.copy_(total)
        ref_lse.copy_(ref_total)

    matrices = (hidden, weight, ref_hidden, ref_weight)
    with losses.without_autocast(hidden.device):
        functions = backends.select(backend, hidden.device, *matrices)
        options = (row_weight, softcap, logit_scale)
        if want_dhidden and hasattr(functions, "forward_split"):
            kl, lse, ref_lse, dhidden = functions.forward_split(*matrices, *options, exchange)
        else:
            kl, lse, ref_lse, dhidden, _ = functions.forward(*matrices, *options, want_dhidden, False)
            mine, ref_mine = lse.clone(), ref_lse.clone()
            exchange(kl, lse, ref_lse)
            if want_dhidden:
                a, b = torch.exp(mine - lse), torch.exp(ref_mine - ref_lse)
                target = torch.full_like(lse, losses.NO_LABEL, dtype=torch.int64)
                log_prob = log_prob_backends.select(backend, hidden.device, hidden, weight, None)
                minus_dlse = log_prob.forward(
                    hidden, weight, None, target, row_weight, vocabulary.IGNORED, softcap, logit_scale, True, False
                )[2]
                corrected = torch.addcmul(dhidden * b[:, None], minus_dlse.to(lse.dtype), (b - a)[:, None])
                dhidden = corrected.to(hidden.dtype)
        if row_weight is not None:
            kl, lse, ref_lse = (rows.masked_fill(row_weight == 0, 0) for rows in (kl, lse, ref_lse))
    return kl, lse, ref_lse, dhidden


@linear_kl_split.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    backend: str,
    group_name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, width = hidden.shape
    kl = hidden.new_empty(num_rows, dtype=losses.compute_dtype(hidden.dtype))
    return kl, torch.empty_like(kl), torch.empty_like(kl), hidden.new_empty(num_rows if want_dhidden else 0, width)


def _setup_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *usual, ctx.group_name = inputs
    _save(ctx, tuple(usual), output)


linear_kl_split.register_autograd(_backward, setup_context=_setup_split)


@torch.library.custom_op("trace_kernels::linear_kl_backward_weight", mutates_args=())
def linear_kl_backward_weight(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    row_grad: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> torch.Tensor:
    with losses.without_autocast(hidden.device):
        functions = backends.select(backend, hidden.device, hidden, weight, ref_hidden, ref_weight)
        dweight: torch.Tensor = functions.backward_weight(
            hidden, weight, ref_hidden, ref_weight, lse, ref_lse, row_grad, softcap, logit_scale
        )
    return dweight


@linear_kl_backward_weight.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    row_grad: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> torch.Tensor:
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
    want_dhidden: bool,
    want_dweight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of row_weight_t * kl_t; the weights are constants, so both gradients are formed at once."""
    with losses.without_autocast(hidden.device):
        functions = backends.select(backend, hidden.device, hidden, weight, ref_hidden, ref_weight)
        kl, _, _, dhidden, dweight = functions.forward(
            hidden, weight, ref_hidden, ref_weight, row_weight, softcap, logit_scale, want_dhidden, want_dweight
        )
    return (kl if row_weight is None else kl * row_weight).sum(), dhidden, dweight


@linear_kl_sum.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    want_dweight: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    grads: list[torch.Tensor | None] = [None] * 10
    if grad is not None:
        if ctx.needs_input_grad[0]:
            grads[0] = losses.scale_stash(dhidden, grad if row_weight is None else grad * row_weight, total)
        if ctx.needs_input_grad[1]:
            grads[1] = losses.scale_weight_stash(ctx, dweight, grad, total)
    return tuple(grads)


linear_kl_sum.register_autograd(_backward_sum, setup_context=_setup_sum)
