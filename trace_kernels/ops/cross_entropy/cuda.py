"""The calls of the CUDA kernels of `cross_entropy`."""

from __future__ import annotations

import torch

from trace_kernels.ops.cross_entropy.rows import LogitGradient, Rows
from trace_kernels.runtime.cuda_backend import call
from trace_kernels.runtime.native import ELEMENTS, address
from trace_kernels.shared.linear import unit_stride


def forward(logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Logp [T] and lse [T]."""
    logits = unit_stride(logits)
    logp = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logp)
    call(
        "cross_entropy_cuda", logits.device, logits.data_ptr(), ELEMENTS[logits.dtype], *logits.shape, logits.stride(0),
        rows.target.data_ptr(), *rows.numbers, logp.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    return logp, lse


def backward(
    logits: torch.Tensor, rows: Rows, lse: torch.Tensor, gradient: LogitGradient, inplace: bool
) -> torch.Tensor:
    """The gradient [T, V] of `logits`, in their own memory when `inplace`."""
    source = unit_stride(logits)
    dlogits = source if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    call(
        "cross_entropy_backward_cuda", logits.device, source.data_ptr(), ELEMENTS[logits.dtype], *logits.shape,
        source.stride(0), rows.target.data_ptr(), *rows.numbers, lse.data_ptr(), *map(address, gradient),
        dlogits.data_ptr(), dlogits.stride(0),
    )  # fmt: skip
    return logits.copy_(dlogits) if inplace and source is not logits else dlogits
