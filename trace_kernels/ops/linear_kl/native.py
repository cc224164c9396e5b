"""Calls of the compiled kernels of `linear_kl`."""

from __future__ import annotations

import functools

import torch

from trace_kernels.ops.linear_kl.reference import Exchange
from trace_kernels.runtime import native as compiled
from trace_kernels.runtime.backends import all_ops
from trace_kernels.runtime.native import ELEMENTS, address, empty_gradient, native, num_threads
from trace_kernels.shared.linear import Call, kept_index, pick, unit_stride
from trace_kernels.shared.losses import NO_LABEL

__all__ = ["backward_weight_cpu", "cpu_unavailable", "forward_cpu", "refuse_cpu"]

cpu_unavailable = functools.partial(
    compiled.cpu_unavailable, "DivergenceProblem", "linear_kl_backward_weight_cpu", "linear_kl_forward_cpu"
)


def refuse_cpu(
    hidden: torch.Tensor, weight: torch.Tensor, ref_hidden: torch.Tensor, ref_weight: torch.Tensor
) -> str | None:
    if hidden.device.type != "cpu":
        return f"hidden is on {hidden.device}, it serves the cpu only"
    for name, states, head in (("hidden", hidden, weight), ("ref_hidden", ref_hidden, ref_weight)):
        if states.dtype not in ELEMENTS or head.dtype != states.dtype:
            return f"{name} is {states.dtype} and its head {head.dtype}, it serves float32, bfloat16 and float16"
    return None


class _Rows:
    """The rows that take part, as the kernels get them, and the tensors that must outlive their calls."""

    def __init__(self, policy: Call, ref: Call) -> None:
        self.index = None if policy.row_weight is None else kept_index(policy.row_weight != 0)
        self.count = policy.hidden.shape[0] if self.index is None else self.index.numel()
        self._matrices = [unit_stride(matrix) for call in (policy, ref) for matrix in call[:2]]
        sides: list[int] = []
        for states, head in (self._matrices[:2], self._matrices[2:]):
            sides += [states.data_ptr(), head.data_ptr(), ELEMENTS[head.dtype]]
            sides += [head.shape[1], states.stride(0), head.stride(0)]
        self._arguments = (*sides, address(self.index), self.count, policy.num_classes, *policy.numbers)

    def run(self, function: str, *tensors: torch.Tensor | None) -> None:
        getattr(native(), function)(native().DivergenceProblem(*self._arguments), *map(address, tensors), num_threads())

    def dweight(self, sums: tuple[torch.Tensor, ...], row_weight: torch.Tensor | None) -> torch.Tensor:
        """`sums`: logsumexps and what rounding them lost, pivot and difference of the rows that take part."""
        weight = self._matrices[1]
        dweight = empty_gradient(weight)
        if not self.count:
            return dweight.zero_()
        row_weight = sums[0].new_ones(self.count) if row_weight is None else pick(row_weight, self.index).contiguous()
        self.run("linear_kl_backward_weight_cpu", *sums, row_weight, dweight)
        return dweight


def forward_cpu(
    policy: Call, ref: Call, want_dhidden: bool, want_dweight: bool, exchange: Exchange | None
) -> tuple[torch.Tensor, ...]:
    T, H = policy.hidden.shape
    rows = _Rows(policy, ref)
    outputs = [torch.zeros(T, dtype=torch.float32) for _ in range(5)]  # kl, lse, ref_lse, logp, ref_logp
    low, ref_low = (torch.empty(rows.count, dtype=torch.float32) for _ in range(2))
    pivot = torch.zeros(T, dtype=torch.int64)
    dhidden = policy.hidden.new_empty(T if want_dhidden else 0, H)
    if want_dhidden and rows.count < T:
        dhidden.zero_()
    if rows.count:
        rows.run("linear_kl_forward_cpu", *outputs, pivot, low, ref_low, dhidden if want_dhidden else None)
    if exchange is not None:
        dhidden = _whole(policy, exchange, outputs, dhidden)
    kl, lse, ref_lse, logp, ref_logp = outputs
    difference = torch.expm1(logp) - torch.expm1(ref_logp)
    dweight = policy.weight.new_empty(0, H)
    if want_dweight:
        known = (pick(lse, rows.index), pick(ref_lse, rows.index), low, ref_low)
        at = (pick(pivot, rows.index), pick(difference, rows.index))
        dweight = rows.dweight((*known, *at), policy.row_weight)
    return kl, lse, ref_lse, pivot, difference, dhidden, dweight


def _whole(policy: Call, exchange: Exchange, outputs: list[torch.Tensor], dhidden: torch.Tensor) -> torch.Tensor:
    """Exchanges the outputs of a slice, and makes its part of the whole dhidden of its own.

    With a and b the slice's shares of the policy's and the reference's probability it is ``b * dkl_r + (a - b) *
    dlse_r``, whose second term costs a further pass over the policy's slice and a product.
    """
    before = [values.clone() for values in outputs]
    exchange(*outputs)
    if not dhidden.numel():
        return dhidden
    # A share that is nearly 1 keeps its digits in what the pivot's log-probability has lost.
    log_a, log_b = (
        torch.where(
            torch.isfinite(before[at_pivot]),
            outputs[at_pivot] - before[at_pivot],
            before[whole] - outputs[whole],
        )
        for whole, at_pivot in ((1, 3), (2, 4))
    )
    lse = outputs[1]
    nowhere = torch.full_like(lse, NO_LABEL, dtype=torch.int64)
    log_prob = all_ops()["linear_log_prob"].select("cpu", lse.device, policy.hidden, policy.weight, None)
    minus_dlse = log_prob.forward(policy._replace(target=nowhere), True, False)[2]
    change = torch.expm1(log_b) - torch.expm1(log_a)
    whole = torch.addcmul(dhidden * log_b.exp()[:, None], minus_dlse.to(lse.dtype), change[:, None])
    return whole.to(dhidden.dtype)


def backward_weight_cpu(
    policy: Call,
    ref: Call,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    pivot: torch.Tensor,
    difference: torch.Tensor,
) -> torch.Tensor:
    rows = _Rows(policy, ref)
    known = [pick(values, rows.index) for values in (lse, ref_lse)]
    low = torch.zeros_like(known[0])
    return rows.dweight((*known, low, low, pick(pivot, rows.index), pick(difference, rows.index)), policy.row_weight)
