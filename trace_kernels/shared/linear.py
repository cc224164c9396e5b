"""The call of a linear loss, as its op, its backends and its autograd hand it on, and the checks that make one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from trace_kernels.shared import losses, vocabulary


class Call(NamedTuple):
    """Hidden states [T, H] and a head [V, H], in the order of the arguments of the ops of torch.library.

    Attributes:
        hidden, weight: of one dtype, any strides.
        bias: [V] of the compute dtype (float64 for float64 inputs, float32 for all others), contiguous, or None.
        target: [T] int64, contiguous, or None.
        row_weight: [T] of the compute dtype, contiguous; 0 drops a row, and None is 1 for all.
        ignore_index: a target that drops its row.
        softcap, logit_scale: logits are softcap(logit_scale * (W h + b)).
        group_name: of the processes that the vocabulary is split over, or None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor | None
    row_weight: torch.Tensor | None
    ignore_index: int
    softcap: float | None
    logit_scale: float
    group_name: str | None = None

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def numbers(self) -> tuple[float, float]:
        """Softcap and logit scale as kernels get them: a softcap of 0 is none."""
        return self.softcap or 0.0, self.logit_scale

    def kept(self) -> torch.Tensor:
        """[T] bool: the rows that take part."""
        kept = torch.ones_like(self.hidden[:, 0], dtype=torch.bool)
        if self.target is not None:
            kept = kept_targets(self.target, self.ignore_index)
        return kept if self.row_weight is None else kept & (self.row_weight != 0)

    def of_one_target(self) -> Call:
        """With its targets [T] as [T, 1]."""
        assert self.target is not None
        options = (self.ignore_index, self.softcap, self.logit_scale, self.group_name)
        return Call(self.hidden, self.weight, self.bias, self.target[:, None], self.row_weight, *options)

    def rows(self, rows: slice | torch.Tensor) -> Call:
        """The call of some rows."""
        target = None if self.target is None else self.target[rows]
        row_weight = None if self.row_weight is None else self.row_weight[rows]
        return self._replace(hidden=self.hidden[rows], target=target, row_weight=row_weight)


def kept_targets(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """[T] bool: rows with a target that counts."""
    kept = target != ignore_index
    return kept if target.dim() == 1 else kept.any(dim=1)


def kept_index(kept: torch.Tensor) -> torch.Tensor | None:
    """Indices of the rows that take part, or None when all do. It looks at values: for the CPU."""
    return None if kept.all() else kept.nonzero()[:, 0]


def pick(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return values if index is None else values[index]


def unit_stride(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows; any distance between them will do."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def call_of(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    group: Any = None,
    leading: torch.Size | None = None,
) -> Call:
    """The public arguments checked, cast as autocast asks, and one row per token; `leading`: of the target."""
    weight, bias, group_name = vocabulary.local_head(weight, bias, group)
    losses.check_linear(hidden, weight)
    leading = hidden.shape[:-1] if leading is None else leading
    losses.check_target(target, leading, hidden.device, "hidden", ignore_index)
    if bias is not None:
        losses.check_bias(bias, weight.shape[0], hidden.device)
    losses.check_logits(softcap, logit_scale)
    losses.check_no_tangents(hidden=hidden, weight=weight, bias=bias)
    hidden, weight = losses.autocast(hidden), losses.autocast(weight)
    losses.check_same_dtype("weight", weight, hidden.dtype, "hidden")
    num_rows = hidden.shape[:-1].numel()
    return Call(
        hidden.reshape(num_rows, hidden.shape[-1]),
        weight,
        None if bias is None else bias.to(losses.compute_dtype(hidden.dtype)).contiguous(),
        target.reshape(num_rows, *leading[hidden.dim() - 1 :]).contiguous(),
        None,
        ignore_index,
        None if softcap is None else float(softcap),
        float(logit_scale),
        group_name,
    )


class Stats(NamedTuple):
    """What one pass over the head tells of each row, 0 where it is dropped; what was not asked for is empty.

    Attributes:
        logp: [T, K] log-probabilities of the targets.
        lse: [T] logsumexp.
        top, top_logp, entropy: [T], with entropy only: the largest class (the lowest index of several), int64, its
            log-probability, and the entropy.
        slope: [T, K] dz / d (W h) at the targets.
        others: [T, H], in the dtype of the hidden states: the sum over all classes but the targets of
            p_v dz_v / d (W h)_v W_v.
    """

    logp: torch.Tensor
    lse: torch.Tensor
    top: torch.Tensor
    top_logp: torch.Tensor
    entropy: torch.Tensor
    slope: torch.Tensor
    others: torch.Tensor


class Gradient(NamedTuple):
    """D loss / dz of the rows of a call, over their row_weight: ``p_v (constant + log * log p_v)``.

    Attributes:
        constant: [T].
        log: [T], or None for 0.
        targets: [T, K]: what it is instead at the call's targets [T, K], which differ or are NO_LABEL. There it is a
            sum of small numbers, where the formula would be a difference of nearly equal ones.
    """

    constant: torch.Tensor
    log: torch.Tensor | None
    targets: torch.Tensor
