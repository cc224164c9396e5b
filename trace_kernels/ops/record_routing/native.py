"""Calls of the compiled kernels of `record_routing_`."""

from __future__ import annotations

import functools

import torch

from trace_kernels.runtime import native as compiled
from trace_kernels.runtime import validate
from trace_kernels.runtime.native import address, native, num_threads

__all__ = ["cpu_unavailable", "forward_cpu", "refuse_cpu"]

cpu_unavailable = functools.partial(compiled.cpu_unavailable, "record_routing_cpu")


def refuse_cpu(indices: torch.Tensor, *args: torch.Tensor | None) -> str | None:
    return None if indices.is_cpu else f"indices are on {indices.device}, it serves the cpu only"


def forward_cpu(
    indices: torch.Tensor,
    counts: torch.Tensor,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> None:
    if gate is not None and gate.item() == 0:
        if table is not None:
            validate.check_finite("table", table)
        return
    table = None if table is None else table.contiguous()
    not_finite = native().record_routing_cpu(
        indices.data_ptr(),
        indices.element_size(),
        indices.dtype.is_signed,
        *indices.shape,
        *indices.stride(),
        counts.data_ptr(),
        counts.shape[0],
        counts.stride(0),
        address(token_mask),
        0 if token_mask is None else token_mask.stride(0),
        address(table),
        address(token_score),
        0 if token_score is None else token_score.stride(0),
        num_threads(),
    )
    if not_finite:
        raise validate.not_finite("table", not_finite, counts.shape[0])
