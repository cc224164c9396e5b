"""`cross_entropy`: token-weighted cross-entropy from logits."""

from __future__ import annotations

from typing import Any

import torch

from trace_kernels.ops.cross_entropy import cuda, native, reference
from trace_kernels.ops.cross_entropy.rows import LogitGradient, Rows
from trace_kernels.runtime import cuda_backend, triton_backend, validate
from trace_kernels.runtime.backends import OpBackends
from trace_kernels.shared import losses
from trace_kernels.shared.softmax import mean_logit

# A backend's ``refuse`` gets the logits [T, V], of any strides; its functions have the arguments of reference.py.
backends = OpBackends("cross_entropy")
backends.register("reference", forward=reference.forward, backward=reference.backward)
backends.register(
    "cpu",
    unavailable=native.cpu_unavailable,
    refuse=native.refuse_cpu,
    forward=native.forward_cpu,
    backward=native.backward_cpu,
)
triton_backend.register(backends, __package__, "forward", "backward")
cuda_backend.register(backends, cuda, "forward", "backward")


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    r"""Token-weighted cross-entropy from logits.

    .. math::
        z_t = \text{softcap}(\text{logit\_scale} \cdot \text{logits}_t), \qquad
        \text{nll}_t = \log \sum_v e^{z_{tv}} - z_{t, \text{target}_t}, \qquad
        \text{loss} = \frac{\sum_t w_t \, \text{nll}_t}{\sum_t w_t}

    over the tokens whose target is not `ignore_index`; softcap(x) = cap * tanh(x / cap), or x without one. Row t
    predicts target t: shift the labels before the call. Losses are float32 whatever the logits (float64 for float64).
    Where the target is nearly certain, the loss and its gradient keep their digits: log p is -log(1 + S) with S what
    the target leaves to the others, and 1 - p is -expm1(log p).

    With a label smoothing e and a z-loss c, nll_t becomes :math:`(1 - e) \, \text{nll}_t + e \, \frac1V \sum_v -\log
    p_{tv} + c \, (\log \sum_v e^{z_{tv}})^2`.

    Args:
        logits: [..., V] floating, any leading shape.
        target: [...] int64, in [0, V) or `ignore_index`.
        token_weight: [...] floating, of any sign; ones by default. Differentiable: d loss / d w_t is nll_t for "sum"
            and "none", and for "mean" includes the denominator's part.
        ignore_index: a target that does not count.
        reduction: "mean", "sum" (of w_t * nll_t), or "none" (w_t * nll_t, 0 where ignored).
        normalizer: a number or 0-d tensor that replaces the denominator of "mean"; a constant.
        softcap: from 1e-30 to 1e30.
        logit_scale: finite; 1 / temperature.
        label_smoothing: from 0 to 1, the share of the loss that is spread over all classes, as torch defines it.
        z_loss: finite, at least 0: times the squared logsumexp.
        inplace: the gradient overwrites the logits' memory in the backward, which saves [T, V]. The logits must not be
            used after the backward; another backward through them raises. Without effect under torch.compile
            (it plans memory itself), with create_graph=True, and where elements of the logits share memory.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        0-d, or [...] for "none"; float32 (float64 for float64 logits). Without a counted token, or with a
        denominator of 0, the loss is 0 and so are its gradients. Differentiable once in logits and token_weight; a
        second-order gradient raises RuntimeError.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value; the message names the argument. On a GPU a
            target outside [0, V) yields NaN in its row, and raises with TRACE_KERNELS_DEBUG=1 only.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, trace_kernels as tk
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> loss = tk.cross_entropy(logits, torch.tensor([0, 3, -100]), torch.tensor([1.0, 3.0, 9.0]))
        >>> f"{loss.item():.4f}"  # log(4)
        '1.3863'
        >>> loss.backward()
        >>> logits.grad[0].tolist()  # a quarter of softmax less one-hot
        [-0.1875, 0.0625, 0.0625, 0.0625]
    """
    validate.check_dtype("logits", logits, validate.FLOAT_DTYPES)
    if logits.dim() < 1:
        raise ValueError("logits: got a 0-d tensor, allowed is [..., V]")
    losses.check_vocabulary("logits", logits, logits.shape[-1])
    losses.check_target(target, logits.shape[:-1], logits.device, "logits", ignore_index)
    losses.check_weighting(token_weight, reduction, normalizer, logits.shape[:-1], logits.device, "logits")
    losses.check_logits(softcap, logit_scale)
    losses.check_penalties(label_smoothing, z_loss)
    losses.check_no_tangents(logits=logits)
    rows, flat_target = logits.reshape(target.numel(), logits.shape[-1]), target.reshape(-1).contiguous()
    softcap = None if softcap is None else float(softcap)
    overwrite = inplace and not torch.compiler.is_compiling()
    logp, lse, mean = cross_entropy_op(
        rows, flat_target, ignore_index, softcap, float(logit_scale), label_smoothing > 0, overwrite, backend
    )
    dtype = losses.compute_dtype(logits.dtype)
    weighting = losses.Weighting(token_weight, flat_target != ignore_index, reduction, normalizer, dtype)
    loss = weighting.reduce(losses.penalised(logp, lse, mean, label_smoothing, z_loss))
    return loss.view(target.shape) if reduction == "none" else loss


@torch.library.custom_op("trace_kernels::cross_entropy", mutates_args=())
def cross_entropy_op(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    want_mean: bool,
    overwrite: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logp, lse and the mean logit [T], which is empty unless wanted."""
    losses.check_target_values(target, logits.shape[1], ignore_index)
    rows = Rows(target, ignore_index, softcap, logit_scale)
    logp, lse = backends.select(backend, logits.device, logits).forward(logits, rows)
    mean = lse.new_empty(0)
    if want_mean:
        mean = mean_logit(logits, softcap, logit_scale).masked_fill(target == ignore_index, 0)
    return logp, lse, mean


@cross_entropy_op.register_fake
def _(logits: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    *_, want_mean, _, _ = others
    logp = logits.new_empty(logits.shape[0], dtype=losses.compute_dtype(logits.dtype))
    return logp, torch.empty_like(logp), logp.new_empty(len(logp) if want_mean else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, target, *ctx.options, ctx.want_mean, ctx.overwrite, ctx.backend = inputs
    logp, lse, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, logp, lse)


def _backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    none = (None,) * 7
    grad, grad_lse, grad_mean = grads
    grad_mean = grad_mean if ctx.want_mean else None
    if grad is None and grad_lse is None and grad_mean is None:
        return None, *none
    logits, target, logp, lse = ctx.saved_tensors
    constant, at_target, uniform = torch.zeros_like(logp), torch.zeros_like(logp), None
    if grad is not None:
        constant = -grad
        # 1 - p, and exactly 0 where nothing arrives, whatever the row holds.
        at_target = torch.where(grad == 0, 0, -torch.expm1(logp) * grad)
    if grad_lse is not None:
        constant = constant + grad_lse
        at_target = at_target + torch.where(grad_lse == 0, 0, logp.exp() * grad_lse)
    if grad_mean is not None:
        uniform = (grad_mean / logits.shape[1]).contiguous()
        at_target = at_target + uniform
    args = (target, lse, constant.contiguous(), uniform, at_target.contiguous(), *ctx.options, ctx.backend)
    # Under create_graph the gradient must hang on the graph, so that differentiating it again raises.
    if ctx.overwrite and not torch.is_grad_enabled() and _has_memory_for_each(logits):
        # Shares memory and version counter with the logits: whoever saved them too is told that they changed.
        memory = logits.detach()
        cross_entropy_backward_(memory, *args)
        return memory, *none
    return cross_entropy_backward(logits, *args), *none


cross_entropy_op.register_autograd(_backward, setup_context=_setup)


def _has_memory_for_each(matrix: torch.Tensor) -> bool:
    """Whether no two elements share memory, as those of expanded and unfolded tensors do."""
    sizes = sorted((stride, size) for stride, size in zip(matrix.stride(), matrix.shape, strict=True) if size > 1)
    reach = 0  # the furthest element of the dimensions so far
    for stride, size in sizes:
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


@torch.library.custom_op("trace_kernels::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    constant: torch.Tensor,
    uniform: torch.Tensor | None,
    at_target: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> torch.Tensor:
    """The gradient [T, V] of the logits: see `LogitGradient`."""
    rows = Rows(target, ignore_index, softcap, logit_scale)
    functions = backends.select(backend, logits.device, logits)
    dlogits: torch.Tensor = functions.backward(logits, rows, lse, LogitGradient(constant, uniform, at_target), False)
    return dlogits


@cross_entropy_backward.register_fake
def _(logits: torch.Tensor, *others: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


cross_entropy_backward.register_autograd(losses.refuse_second_order)


@torch.library.custom_op("trace_kernels::cross_entropy_backward_", mutates_args=("logits",))
def cross_entropy_backward_(
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    constant: torch.Tensor,
    uniform: torch.Tensor | None,
    at_target: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    backend: str,
) -> None:
    """The gradient overwrites `logits`."""
    rows = Rows(target, ignore_index, softcap, logit_scale)
    functions = backends.select(backend, logits.device, logits)
    functions.backward(logits, rows, lse, LogitGradient(constant, uniform, at_target), True)


@cross_entropy_backward_.register_fake
def _(logits: torch.Tensor, *others: Any) -> None:
    return None
