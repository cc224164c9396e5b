"""Calls of the compiled kernels of `cross_entropy`."""

from __future__ import annotations

import functools

import torch

from trace_kernels.ops.linear_cross_entropy.native import TYPES, unit_stride
from trace_kernels.runtime import native as compiled
from trace_kernels.runtime.native import native, num_threads

__all__ = ["backward_cpu", "cpu_unavailable", "forward_cpu", "refuse_cpu"]

cpu_unavailable = functools.partial(compiled.cpu_unavailable, "cross_entropy_backward_cpu", "cross_entropy_forward_cpu")


def refuse_cpu(logits: torch.Tensor) -> str | None:
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}, it serves the cpu only"
    if logits.dtype not in TYPES:
        return f"logits are {logits.dtype}, it serves float32, bfloat16 and float16"
    return None


def forward_cpu(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, softcap: float | None, logit_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    T, V = logits.shape
    logits = unit_stride(logits)
    logp, lse = (torch.empty(T, dtype=torch.float32) for _ in range(2))
    native().cross_entropy_forward_cpu(
        logits.data_ptr(), TYPES[logits.dtype], T, V, logits.stride(0), target.data_ptr(), ignore_index,
        softcap or 0.0, logit_scale, logp.data_ptr(), lse.data_ptr(), num_threads(),
    )  # fmt: skip
    return logp, lse


def backward_cpu(
    grad_logp: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    inplace: bool,
) -> torch.Tensor:
    T, V = logits.shape
    source = unit_stride(logits)
    own = inplace and source is logits
    out = logits if own else torch.empty(T, V, dtype=logits.dtype)
    native().cross_entropy_backward_cpu(
        source.data_ptr(), TYPES[logits.dtype], T, V, source.stride(0), target.data_ptr(), ignore_index,
        softcap or 0.0, logit_scale, grad_logp.data_ptr(), lse.data_ptr(), out.data_ptr(), out.stride(0), num_threads(),
    )  # fmt: skip
    return logits.copy_(out) if inplace and not own else out
