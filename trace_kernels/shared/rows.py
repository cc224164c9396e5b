"""The CUDA kernels that scale and sum rows, which the linear losses share."""

from __future__ import annotations

import torch

from trace_kernels.runtime.cuda_backend import call
from trace_kernels.runtime.native import ELEMENTS


def scaled_rows(rows: torch.Tensor, factor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``factor_t * rows_t`` rounded once, and 0 where the factor is 0; `out` has a dense last dimension."""
    if out is None:
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    call(
        "scaled_rows_cuda",
        rows.device,
        rows.data_ptr(),
        ELEMENTS[rows.dtype],
        *rows.shape,
        *rows.stride(),
        factor.data_ptr(),
        out.data_ptr(),
        ELEMENTS[out.dtype],
        out.stride(0),
    )
    return out


def column_sums(rows: torch.Tensor, factor: torch.Tensor, sums: torch.Tensor) -> None:
    """``sums += sum over t of factor_t * rows_t``, in float32."""
    call(
        "column_sums_cuda",
        rows.device,
        rows.data_ptr(),
        ELEMENTS[rows.dtype],
        *rows.shape,
        rows.stride(0),
        factor.data_ptr(),
        sums.data_ptr(),
    )
