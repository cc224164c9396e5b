"""Calls of the compiled kernels of `linear_cross_entropy` and `linear_log_prob`."""

from __future__ import annotations

import functools

import torch

from trace_kernels.runtime import native as compiled
from trace_kernels.runtime.native import address, empty_gradient, native, num_threads

__all__ = ["backward_weight_cpu", "cpu_unavailable", "forward_cpu", "refuse_cpu"]

cpu_unavailable = functools.partial(
    compiled.cpu_unavailable, "linear_cross_entropy_backward_weight_cpu", "linear_cross_entropy_forward_cpu"
)

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/tile_kernels.h


def refuse_cpu(hidden: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    if hidden.device.type != "cpu":
        return f"hidden is on {hidden.device}, it serves the cpu only"
    if hidden.dtype not in TYPES or weight.dtype != hidden.dtype:
        return f"hidden is {hidden.dtype} and weight {weight.dtype}, it serves float32, bfloat16 and float16"
    return None


def forward_cpu(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    T, H = hidden.shape
    index = kept_rows(target, row_weight, ignore_index)
    hidden, weight = unit_stride(hidden), unit_stride(weight)
    logp, lse = (torch.zeros(T, dtype=torch.float32) for _ in range(2))
    dhidden = hidden.new_empty(T if want_dhidden else 0, H)
    kept = T if index is None else index.numel()
    if want_dhidden and kept < T:
        dhidden.zero_()
    dweight = empty_gradient(weight) if want_dweight else weight.new_empty(0, H)
    dbias = lse.new_zeros(weight.shape[0] if want_dweight else 0)
    if not kept:
        return logp, lse, dhidden, dweight.zero_(), dbias
    problem = _problem(hidden, weight, bias, _pick(target, index), index, softcap, logit_scale)
    row_weight = lse.new_ones(kept) if row_weight is None else _pick(row_weight, index).contiguous()
    native().linear_cross_entropy_forward_cpu(
        *problem.arguments, logp.data_ptr(), lse.data_ptr(), dhidden.data_ptr() if want_dhidden else 0,
        row_weight.data_ptr(), dweight.data_ptr() if want_dweight else 0, _bias_address(bias, dbias), num_threads(),
    )  # fmt: skip
    return logp, lse, dhidden, dweight, dbias


def backward_weight_cpu(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    row_grad: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    index = kept_rows(target, row_grad, ignore_index)
    problem = _problem(
        unit_stride(hidden), unit_stride(weight), bias, _pick(target, index), index, softcap, logit_scale
    )
    lse, row_grad = _pick(lse, index), _pick(row_grad, index).contiguous()
    dweight, dbias = empty_gradient(weight), lse.new_zeros(weight.shape[0])
    if not lse.numel():
        return dweight.zero_(), dbias
    native().linear_cross_entropy_backward_weight_cpu(
        *problem.arguments, lse.data_ptr(), row_grad.data_ptr(), dweight.data_ptr(), _bias_address(bias, dbias),
        num_threads(),
    )  # fmt: skip
    return dweight, dbias


class _Problem:
    """The arguments that every kernel takes first, and the tensors that must outlive the call."""

    def __init__(self, arguments: tuple[float, ...], weight: torch.Tensor, tensors: tuple[torch.Tensor | None, ...]):
        self.arguments = arguments
        self.weight = weight
        self.tensors = tensors


def _problem(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    index: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> _Problem:
    arguments = (
        hidden.data_ptr(),
        weight.data_ptr(),
        TYPES[weight.dtype],
        target.numel(),
        hidden.shape[1],
        weight.shape[0],
        hidden.stride(0),
        weight.stride(0),
        address(index),
        address(bias),
        target.data_ptr(),
        softcap or 0.0,
        logit_scale,
    )
    return _Problem(arguments, weight, (hidden, weight, bias, target, index))


def _bias_address(bias: torch.Tensor | None, dbias: torch.Tensor) -> int:
    return 0 if bias is None or not dbias.numel() else dbias.data_ptr()


def kept_rows(target: torch.Tensor, row_weight: torch.Tensor | None, ignore_index: int) -> torch.Tensor | None:
    """Indices of the rows that take part, or None when all do."""
    kept = target != ignore_index
    if row_weight is not None:
        kept &= row_weight != 0
    return None if kept.all() else kept.nonzero()[:, 0]


def unit_stride(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with contiguous rows; any distance between them will do."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _pick(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return values if index is None else values[index]
