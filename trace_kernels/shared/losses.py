"""What the loss ops share: checks, weights, reductions, autocast, and the scaling of stashed gradients."""

from __future__ import annotations

import math
import numbers
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from trace_kernels.runtime import triton_backend, validate
from trace_kernels.runtime.native import use_large_pages

REDUCTIONS = ("mean", "sum", "none")
SOFTCAPS = "None or a number from 1e-30 to 1e30"
#: What backends take for a target that is a class of probability 0: logp is -inf, its gradients those of -logsumexp.
#: Where the vocabulary is split, another process has the class (vocabulary.py).
NO_LABEL = -(2**62)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of logits, log-probabilities and losses: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """An op's implementation runs with its caller's autocast on, which would round its float32 products."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def autocast(tensor: torch.Tensor) -> torch.Tensor:
    """What `torch.nn.functional.linear` would do with `tensor` under autocast. Differentiable."""
    kind = tensor.device.type
    # torch.amp.is_autocast_available would say so too, but torch.compile cannot trace it in torch 2.11.
    if tensor.dtype == torch.float64 or kind == "meta":
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def check_number(name: str, value: object, allowed: str) -> None:
    if isinstance(value, (bool, torch.Tensor)) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is {allowed}")


def check_logits(softcap: float | None, logit_scale: float) -> None:
    if softcap is not None:
        check_number("softcap", softcap, SOFTCAPS)
        # Kernels divide by it in float32, where the reciprocal of a larger or smaller one has no digits left.
        if not 1e-30 <= softcap <= 1e30:
            raise ValueError(f"softcap: got {softcap}, allowed is {SOFTCAPS}")
    check_number("logit_scale", logit_scale, "a finite number")
    # Comparisons, because math.isfinite takes no symbolic number of torch.compile.
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale: got {logit_scale}, allowed is a finite number")


def check_penalties(label_smoothing: float, z_loss: float) -> None:
    for name, value, most, allowed in (
        ("label_smoothing", label_smoothing, 1, "a number from 0 to 1"),
        ("z_loss", z_loss, math.inf, "a finite number of at least 0"),
    ):
        check_number(name, value, allowed)
        if not 0 <= value <= most or value == math.inf:
            raise ValueError(f"{name}: got {value}, allowed is {allowed}")


def penalised(
    logp: torch.Tensor, lse: torch.Tensor, mean: torch.Tensor, label_smoothing: float, z_loss: float
) -> torch.Tensor:
    """[T] -logp, smoothed over all classes, of which `mean` is the mean logit, and with the squared logsumexp."""
    loss = -logp
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss + label_smoothing * (lse - mean)
    return loss + z_loss * lse.square() if z_loss > 0 else loss


def check_linear(
    hidden: torch.Tensor, weight: torch.Tensor, hidden_name: str = "hidden", weight_name: str = "weight"
) -> None:
    validate.check_dtype(hidden_name, hidden, validate.FLOAT_DTYPES)
    validate.check_dtype(weight_name, weight, validate.FLOAT_DTYPES)
    if hidden.dim() < 1:
        raise ValueError(f"{hidden_name}: got a 0-d tensor, allowed is [..., H]")
    if hidden.shape[-1] < 1:
        raise ValueError(f"{hidden_name}: got shape {list(hidden.shape)}, allowed is [..., H] with H of at least 1")
    validate.check_ndim(weight_name, weight, 2, "[V, H]")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name}: got shape {list(weight.shape)}, allowed is [V, H] with H = {hidden.shape[-1]}, "
            f"the last size of {hidden_name}"
        )
    check_vocabulary(weight_name, weight, weight.shape[0])
    validate.check_device(weight_name, weight, hidden.device, hidden_name)


def check_same_dtype(name: str, tensor: torch.Tensor, expected: torch.dtype, of: str) -> None:
    if tensor.dtype != expected:
        raise TypeError(f"{name}: got dtype {_name(tensor.dtype)}, allowed is {_name(expected)}, the dtype of {of}")


def check_vocabulary(name: str, tensor: torch.Tensor, size: int) -> None:
    if size < 1:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, allowed is at least one vocabulary entry")


def check_target(target: torch.Tensor, leading: torch.Size, device: torch.device, of: str, ignore_index: int) -> None:
    validate.check_dtype("target", target, (torch.int64,))
    validate.check_shape("target", target, leading, f"the leading shape of {of}")
    validate.check_device("target", target, device, of)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: got {type(ignore_index).__name__}, allowed is an integer")


def check_bias(bias: torch.Tensor, num_classes: int, device: torch.device) -> None:
    validate.check_dtype("bias", bias, validate.FLOAT_DTYPES)
    validate.check_shape("bias", bias, (num_classes,), "[V]")
    validate.check_device("bias", bias, device, "hidden")


def check_no_tangents(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        validate.check_no_tangent(name, tensor, "the losses")


def check_target_values(target: torch.Tensor, num_classes: int, ignore_index: int) -> None:
    """Called inside an op. On a GPU it would synchronise: there such a row yields NaN, unless debugging."""
    if validate.check_values_on(target.device):
        bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
        if bad.any():
            position = int(bad.view(-1).nonzero()[0])
            raise ValueError(
                f"target: got {int(target.view(-1)[position])} at flat position {position}, "
                f"allowed are [0, {num_classes}) and ignore_index = {ignore_index}"
            )


def check_weighting(
    token_weight: torch.Tensor | None,
    reduction: str,
    normalizer: float | torch.Tensor | None,
    leading: torch.Size,
    device: torch.device,
    of: str,
) -> None:
    validate.check_choice("reduction", reduction, REDUCTIONS)
    if token_weight is not None:
        validate.check_dtype("token_weight", token_weight, validate.FLOAT_DTYPES)
        validate.check_shape("token_weight", token_weight, leading, f"the leading shape of {of}")
        validate.check_device("token_weight", token_weight, device, of)
        validate.check_no_tangent("token_weight", token_weight, "the losses")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer: given with reduction={reduction!r}, allowed with reduction='mean' only")
    if isinstance(normalizer, torch.Tensor):
        validate.check_ndim("normalizer", normalizer, 0, "a number or a 0-d tensor")
        if normalizer.dtype == torch.bool or normalizer.dtype.is_complex:
            raise TypeError(f"normalizer: got dtype {_name(normalizer.dtype)}, allowed is a real number")
    elif isinstance(normalizer, bool) or not _is_real(normalizer):
        raise TypeError(f"normalizer: got {type(normalizer).__name__}, allowed is a real number or a 0-d tensor")


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real)  # numpy's scalars are such, though no float to a type checker


class Weighting:
    """The weights of the rows of one call and what their sum is divided by.

    Attributes:
        rows: [T] of the compute dtype, 0 for rows that do not count; None when every row that counts weighs 1.
        known: whether `rows` are constants, so that a gradient may be formed before the loss is known and rows
            of weight 0 never matter.
    """

    def __init__(
        self,
        token_weight: torch.Tensor | None,
        counted: torch.Tensor,
        reduction: str,
        normalizer: float | torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.counted = counted  # [T] bool
        self.reduction = reduction
        self.normalizer = normalizer
        self.dtype = dtype
        self.known = token_weight is None or not (token_weight.requires_grad and torch.is_grad_enabled())
        self.rows = None
        if token_weight is not None:
            self.rows = torch.where(counted, token_weight.reshape(-1).to(dtype), 0)

    def denominator(self) -> torch.Tensor:
        """0-d."""
        if isinstance(self.normalizer, torch.Tensor):
            return self.normalizer.detach().to(self.counted.device, self.dtype)
        if self.normalizer is not None:
            number = self.normalizer if isinstance(self.normalizer, int | float) else float(self.normalizer)
            return torch.full((), number, dtype=self.dtype, device=self.counted.device)
        return self.counted.sum().to(self.dtype) if self.rows is None else self.rows.sum()

    def coefficients(self) -> torch.Tensor | None:
        """[T]: what each row's loss is multiplied with before they are added up, or None for ones."""
        if self.reduction == "sum":
            return self.rows
        rows = self.counted.to(self.dtype) if self.rows is None else self.rows
        return _divide(rows, self.denominator())

    def reduce(self, per_row: torch.Tensor) -> torch.Tensor:
        """Weigh and reduce a loss that was computed for every row, 0 where it does not count."""
        if self.rows is not None:
            # A token of weight 0 contributes nothing, also when its loss is infinite.
            per_row = torch.where((self.rows == 0) & ~torch.isfinite(per_row), 0, per_row) * self.rows
        if self.reduction == "none":
            return per_row
        return per_row.sum() if self.reduction == "sum" else _divide(per_row.sum(), self.denominator())


def _divide(value: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """0, with zero gradients, where the denominator is 0."""
    zero = denominator == 0
    return torch.where(zero, 0, value / torch.where(zero, 1, denominator))


def stash_keeps_digits(weight: torch.Tensor) -> bool:
    """Whether a head's gradient may be stored before the gradient from above is known.

    In float16 a mean's would be below the smallest numbers, from which a loss scale of later does not bring it back.
    """
    return weight.dtype != torch.float16 or not (weight.requires_grad and torch.is_grad_enabled())


def lend_stash(total: torch.Tensor) -> None:
    """Lets the backward of an op that returned `total` overwrite the head's gradient that it stored.

    For callers that drop the op's other outputs: nobody else sees the stash then.
    """
    if not torch.compiler.is_compiling() and total.grad_fn is not None:
        total.grad_fn.stash_is_lent = True  # type: ignore[attr-defined]


def scale_weight_stash(ctx: Any, stash: torch.Tensor, scale: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """`scale_stash` by one number, in the stash's own memory where it was lent and this backward frees the graph.

    A head's gradient is as large as the head: a second one would cost as much memory, and the time to fault it in.
    """
    # Anything but a plain tensor is being traced, and a kept graph may come back for the stash.
    if (
        not getattr(ctx, "stash_is_lent", False)
        or type(stash) is not torch.Tensor
        or stash.device.type not in ("cpu", "cuda")
        or torch._C._autograd._get_current_graph_task_keep_graph()
        # Several gradients at once (is_grads_batched=True, vmap) are no single number.
        or torch._C._functorch.is_legacy_batchedtensor(scale)
        or torch._C._functorch.is_functorch_wrapped_tensor(scale)
    ):
        scaled: torch.Tensor = scale_stash(stash, scale, loss)
        return scaled
    if stash.device.type == "cpu":
        return stash.zero_() if scale == 0 else stash if scale == 1 else stash.mul_(scale)
    return scale_in_place(stash, scale)


def scale_in_place(stash: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`stash` times a 0-d `scale` whose value the host does not look at; 0 where it is 0."""
    if stash.device.type == "cuda" and scale.dtype == torch.float32 and triton_backend.triton_unavailable() is None:
        from trace_kernels.shared.triton_common import scaled_rows  # imports Triton

        return scaled_rows(stash, scale, stash)
    return stash.mul_(scale).masked_fill_(scale == 0, 0)


@torch.library.custom_op("trace_kernels::scale_stash", mutates_args=())
def scale_stash(stash: torch.Tensor, scale: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """A gradient that the forward stored, times what arrives from above, rounded once.

    Args:
        stash: [N, ...].
        scale: [N] or 0-d, in the compute dtype. A row of scale 0 gives 0, also where it is not finite.
        loss: the forward's output; not read. It ties the result to the graph, so that a second-order gradient
            raises instead of being silently 0.
    """
    scaled = torch.empty_like(stash, memory_format=torch.contiguous_format)
    if stash.numel() == 0:
        return scaled
    use_large_pages(scaled)
    if (
        stash.device.type == "cuda"
        and stash.dim() > 1
        and scale.dtype == torch.float32
        and triton_backend.triton_unavailable() is None
    ):
        from trace_kernels.shared.triton_common import scaled_rows  # imports Triton

        return scaled_rows(stash.reshape(stash.shape[0], -1), scale, scaled.view(stash.shape[0], -1)).view_as(stash)
    if scale.dim() == 0 and scale.device.type == "cpu":
        # One pass: a 0-d factor does not promote, and is multiplied in float32.
        return scaled.zero_() if scale == 0 else torch.mul(stash, scale, out=scaled)
    # In blocks, because bfloat16 rows pass through float32.
    block = max(1, 2**17 // max(1, stash[0].numel()))
    for start in range(0, stash.shape[0], block):
        rows = scaled[start : start + block]
        factor = scale if scale.dim() == 0 else scale[start : start + block].view(-1, *[1] * (stash.dim() - 1))
        torch.mul(stash[start : start + block], factor, out=rows)
        rows.masked_fill_(factor == 0, 0)
    return scaled


@scale_stash.register_fake
def _(stash: torch.Tensor, scale: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(stash, memory_format=torch.contiguous_format)


def refuse_second_order(ctx: Any, *grads: Any) -> Any:
    """The autograd formula of every op that computes a gradient."""
    raise RuntimeError("second-order gradients of the trace_kernels losses are not implemented")


scale_stash.register_autograd(refuse_second_order)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
