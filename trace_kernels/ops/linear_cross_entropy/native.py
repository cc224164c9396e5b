"""Calls of the compiled kernels of the ops on a language-model head."""

from __future__ import annotations

import functools
from typing import Any

import torch

from trace_kernels.runtime import native as compiled
from trace_kernels.runtime.native import ELEMENTS, address, empty_gradient, native, num_threads
from trace_kernels.shared.linear import Call, Gradient, Stats, kept_index, pick, unit_stride

__all__ = ["backward_cpu", "cpu_unavailable", "forward_cpu", "refuse_cpu", "stats_cpu"]

cpu_unavailable = functools.partial(
    compiled.cpu_unavailable,
    "linear_cross_entropy_backward_cpu",
    "linear_cross_entropy_forward_cpu",
    "linear_cross_entropy_stats_cpu",
)


def refuse_cpu(hidden: torch.Tensor, weight: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    if hidden.device.type != "cpu":
        return f"hidden is on {hidden.device}, it serves the cpu only"
    if hidden.dtype not in ELEMENTS or weight.dtype != hidden.dtype:
        return f"hidden is {hidden.dtype} and weight {weight.dtype}, it serves float32, bfloat16 and float16"
    return None


class _Rows:
    """The rows of a call that take part, as the kernels get them, and the tensors that must outlive their calls.

    Attributes:
        index: of these rows, or None for all.
        count: how many they are.
    """

    def __init__(self, call: Call) -> None:
        assert call.target is not None
        hidden, weight, bias = unit_stride(call.hidden), unit_stride(call.weight), call.bias
        self.index = kept_index(call.kept())
        target = pick(call.target, self.index)
        self.count = target.shape[0]
        self._tensors = (hidden, weight, bias, target)
        self._arguments = (
            hidden.data_ptr(), weight.data_ptr(), ELEMENTS[weight.dtype], self.count, hidden.shape[1], weight.shape[0],
            hidden.stride(0), weight.stride(0), address(self.index), address(bias), target.data_ptr(),
            1 if target.dim() == 1 else target.shape[1], *call.numbers,
        )  # fmt: skip
        self._bias = bias is not None
        self.empty_dweight = functools.partial(empty_gradient, weight)

    def run(self, function: str, *arguments: int) -> None:
        getattr(native(), function)(native().LinearProblem(*self._arguments), *arguments, num_threads())

    def dhidden(self, hidden: torch.Tensor, wanted: bool) -> torch.Tensor:
        if wanted and self.index is not None:
            return hidden.new_zeros(hidden.shape)
        return hidden.new_empty(hidden.shape[0] if wanted else 0, hidden.shape[1])

    def head(self, call: Call, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for dweight, which is zero where no row takes part, and dbias."""
        dweight = self.empty_dweight() if wanted else call.weight.new_empty(0, call.weight.shape[1])
        dbias = torch.zeros(call.num_classes if wanted else 0, dtype=torch.float32)
        return dweight if self.count else dweight.zero_(), dbias

    def bias_address(self, dbias: torch.Tensor) -> int:
        return dbias.data_ptr() if self._bias and dbias.numel() else 0


def _wanted(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() if tensor.numel() else 0


def forward_cpu(
    call: Call, want_dhidden: bool, want_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = _Rows(call)
    logp, lse = (torch.zeros(call.hidden.shape[0], dtype=torch.float32) for _ in range(2))
    dhidden = rows.dhidden(call.hidden, want_dhidden)
    dweight, dbias = rows.head(call, want_dweight)
    row_weight = lse.new_ones(rows.count) if call.row_weight is None else pick(call.row_weight, rows.index).contiguous()
    if rows.count:
        rows.run(
            "linear_cross_entropy_forward_cpu", logp.data_ptr(), lse.data_ptr(), _wanted(dhidden),
            row_weight.data_ptr(), _wanted(dweight), rows.bias_address(dbias),
        )  # fmt: skip
    return logp, lse, dhidden, dweight, dbias


def stats_cpu(call: Call, want_others: bool, want_entropy: bool) -> Stats:
    assert call.target is not None
    rows = _Rows(call)
    T, K = call.target.shape

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    some = T if want_entropy else 0
    found = Stats(
        zeros(T, K), zeros(T), zeros(some, dtype=torch.int64), zeros(some), zeros(some), zeros(T, K),
        rows.dhidden(call.hidden, want_others),
    )  # fmt: skip
    if rows.count:
        rows.run(
            "linear_cross_entropy_stats_cpu", found.logp.data_ptr(), found.lse.data_ptr(), found.slope.data_ptr(),
            _wanted(found.others), _wanted(found.entropy), _wanted(found.top), _wanted(found.top_logp),
        )  # fmt: skip
    ignored = call.target == call.ignore_index
    return found._replace(logp=found.logp.masked_fill_(ignored, 0), slope=found.slope.masked_fill_(ignored, 0))


def backward_cpu(
    call: Call, lse: torch.Tensor, gradient: Gradient, want_dhidden: bool, want_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = _Rows(call)

    def weighted(values: torch.Tensor) -> Any:
        if call.row_weight is not None:
            values = values * call.row_weight.view(-1, *[1] * (values.dim() - 1))
        return pick(values, rows.index).contiguous()

    lse, constant, targets = pick(lse, rows.index), weighted(gradient.constant), weighted(gradient.targets)
    log = None if gradient.log is None else weighted(gradient.log)
    dhidden = rows.dhidden(call.hidden, want_dhidden)
    dweight, dbias = rows.head(call, want_dweight)
    if rows.count:
        rows.run(
            "linear_cross_entropy_backward_cpu", lse.data_ptr(), constant.data_ptr(), address(log), targets.data_ptr(),
            _wanted(dhidden), _wanted(dweight), rows.bias_address(dbias),
        )  # fmt: skip
    return dhidden, dweight, dbias
