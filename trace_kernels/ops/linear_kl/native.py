"""Calls of the compiled kernels of `linear_kl`."""

from __future__ import annotations

import functools

import torch

from trace_kernels.ops.linear_cross_entropy.native import TYPES, unit_stride
from trace_kernels.runtime import native as compiled
from trace_kernels.runtime.native import address, empty_gradient, native, num_threads

__all__ = ["backward_weight_cpu", "cpu_unavailable", "forward_cpu", "refuse_cpu"]

cpu_unavailable = functools.partial(compiled.cpu_unavailable, "linear_kl_backward_weight_cpu", "linear_kl_forward_cpu")


def refuse_cpu(
    hidden: torch.Tensor, weight: torch.Tensor, ref_hidden: torch.Tensor, ref_weight: torch.Tensor
) -> str | None:
    if hidden.device.type != "cpu":
        return f"hidden is on {hidden.device}, it serves the cpu only"
    for name, states, head in (("hidden", hidden, weight), ("ref_hidden", ref_hidden, ref_weight)):
        if states.dtype not in TYPES or head.dtype != states.dtype:
            return f"{name} is {states.dtype} and its head {head.dtype}, it serves float32, bfloat16 and float16"
    return None


def forward_cpu(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    T, H = hidden.shape
    index = _kept_rows(row_weight)
    kept = T if index is None else index.numel()
    matrices = [unit_stride(matrix) for matrix in (hidden, weight, ref_hidden, ref_weight)]
    kl, lse, ref_lse = (torch.zeros(T, dtype=torch.float32) for _ in range(3))
    lse_low, ref_lse_low = (torch.empty(kept, dtype=torch.float32) for _ in range(2))
    dhidden = hidden.new_empty(T if want_dhidden else 0, H)
    if want_dhidden and kept < T:
        dhidden.zero_()
    if kept:
        native().linear_kl_forward_cpu(
            *_problem(matrices, index, kept, softcap, logit_scale),
            kl.data_ptr(), lse.data_ptr(), ref_lse.data_ptr(), lse_low.data_ptr(), ref_lse_low.data_ptr(),
            dhidden.data_ptr() if want_dhidden else 0, num_threads(),
        )  # fmt: skip
    if not want_dweight:
        return kl, lse, ref_lse, dhidden, weight.new_empty(0, H)
    row_weight = lse.new_ones(T) if row_weight is None else row_weight
    sums = (_pick(lse, index), _pick(ref_lse, index), lse_low, ref_lse_low)
    dweight = _backward_weight(matrices, index, sums, _pick(row_weight, index), softcap, logit_scale)
    return kl, lse, ref_lse, dhidden, dweight


def backward_weight_cpu(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    row_grad: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    index = _kept_rows(row_grad)
    matrices = [unit_stride(matrix) for matrix in (hidden, weight, ref_hidden, ref_weight)]
    lse, ref_lse = _pick(lse, index), _pick(ref_lse, index)
    low = torch.zeros_like(lse)
    sums = (lse, ref_lse, low, low)
    return _backward_weight(matrices, index, sums, _pick(row_grad, index), softcap, logit_scale)


def _backward_weight(
    matrices: list[torch.Tensor],
    index: torch.Tensor | None,
    sums: tuple[torch.Tensor, ...],
    row_grad: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    """`sums` (lse, ref_lse and what rounding them lost) and `row_grad` of the rows that count only."""
    weight = matrices[1]
    if not row_grad.numel():
        return weight.new_zeros(weight.shape)
    dweight = empty_gradient(weight)
    native().linear_kl_backward_weight_cpu(
        *_problem(matrices, index, row_grad.numel(), softcap, logit_scale),
        *(values.data_ptr() for values in sums), row_grad.data_ptr(), dweight.data_ptr(), num_threads(),
    )  # fmt: skip
    return dweight


def _problem(
    matrices: list[torch.Tensor], index: torch.Tensor | None, kept: int, softcap: float | None, logit_scale: float
) -> tuple[float, ...]:
    """The arguments that both kernels take first; the caller keeps the tensors alive."""
    sides: list[int] = []
    for states, head in (matrices[:2], matrices[2:]):
        sides += [states.data_ptr(), head.data_ptr(), TYPES[head.dtype]]
        sides += [head.shape[1], states.stride(0), head.stride(0)]
    return (*sides, address(index), kept, matrices[1].shape[0], softcap or 0.0, logit_scale)


def _kept_rows(row_weight: torch.Tensor | None) -> torch.Tensor | None:
    """Indices of the rows that take part, or None when all do."""
    if row_weight is None or (kept := row_weight != 0).all():
        return None
    return kept.nonzero()[:, 0]


def _pick(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return values if index is None else values[index]
