"""Calls of the compiled kernels of `cross_entropy`."""

from __future__ import annotations

import functools

import torch

from trace_kernels.ops.cross_entropy.rows import LogitGradient, Rows
from trace_kernels.runtime import native as compiled
from trace_kernels.runtime.native import ELEMENTS, address, native, num_threads
from trace_kernels.shared.linear import unit_stride

__all__ = ["backward_cpu", "cpu_unavailable", "forward_cpu", "refuse_cpu"]

# LinearProblem came with the kernels' present arguments.
cpu_unavailable = functools.partial(
    compiled.cpu_unavailable, "LinearProblem", "cross_entropy_backward_cpu", "cross_entropy_forward_cpu"
)


def refuse_cpu(logits: torch.Tensor) -> str | None:
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}, it serves the cpu only"
    if logits.dtype not in ELEMENTS:
        return f"logits are {logits.dtype}, it serves float32, bfloat16 and float16"
    return None


def forward_cpu(logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    logits = unit_stride(logits)
    logp, lse = (torch.empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    native().cross_entropy_forward_cpu(
        logits.data_ptr(), ELEMENTS[logits.dtype], *logits.shape, logits.stride(0), rows.target.data_ptr(),
        *rows.numbers, logp.data_ptr(), lse.data_ptr(), num_threads(),
    )  # fmt: skip
    return logp, lse


def backward_cpu(
    logits: torch.Tensor, rows: Rows, lse: torch.Tensor, gradient: LogitGradient, inplace: bool
) -> torch.Tensor:
    source = unit_stride(logits)
    own = inplace and source is logits
    out = logits if own else torch.empty(logits.shape, dtype=logits.dtype)
    native().cross_entropy_backward_cpu(
        source.data_ptr(), ELEMENTS[logits.dtype], *logits.shape, source.stride(0), rows.target.data_ptr(),
        *rows.numbers, lse.data_ptr(), *map(address, gradient), out.data_ptr(), out.stride(0), num_threads(),
    )  # fmt: skip
    return logits.copy_(out) if inplace and not own else out
