"""The call of the CUDA kernel of `record_routing_`."""

from __future__ import annotations

import torch

from trace_kernels.runtime.cuda_backend import call, most_blocks
from trace_kernels.runtime.native import address


def forward(
    indices: torch.Tensor,
    counts: torch.Tensor,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> None:
    table = None if table is None else table.contiguous()
    call(
        "record_routing_cuda",
        indices.device,
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
        address(gate),
        most_blocks(indices.device, 4),
    )
