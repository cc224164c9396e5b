"""The calls of the CUDA kernels of `cross_entropy`."""

from __future__ import annotations

import torch

from trace_kernels.runtime.cuda_backend import ELEMENTS, call


def forward(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, softcap: float | None, logit_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logp [T] and lse [T]."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    target = target.contiguous()
    logp = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logp)
    call(
        "cross_entropy_cuda",
        logits.device,
        logits.data_ptr(),
        ELEMENTS[logits.dtype],
        *logits.shape,
        logits.stride(0),
        target.data_ptr(),
        ignore_index,
        softcap or 0.0,
        logit_scale,
        logp.data_ptr(),
        lse.data_ptr(),
    )
    return logp, lse


def backward(
    grad_logp: torch.Tensor,
    logits: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    inplace: bool,
) -> torch.Tensor:
    """The gradient [T, V] of `logits`, in their own memory when `inplace`."""
    source = logits if logits.stride(1) == 1 else logits.contiguous()
    grad_logp, target, lse = grad_logp.contiguous(), target.contiguous(), lse.contiguous()
    dlogits = source if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    call(
        "cross_entropy_backward_cuda",
        logits.device,
        grad_logp.data_ptr(),
        source.data_ptr(),
        ELEMENTS[logits.dtype],
        *logits.shape,
        source.stride(0),
        target.data_ptr(),
        ignore_index,
        softcap or 0.0,
        logit_scale,
        lse.data_ptr(),
        dlogits.data_ptr(),
        dlogits.stride(0),
    )
    return logits.copy_(dlogits) if inplace and source is not logits else dlogits
