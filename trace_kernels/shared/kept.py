"""Rows that take part in a loss on a GPU, gathered before the products.

Prompts and padding are often half of the rows, and a library product computes a dropped row like any other. How many
rows are left has to be known on the host, which reads it once per call: 10 to 20 us, where products take milliseconds.
While a CUDA graph is captured nothing may be read, so that all rows are computed.
"""

from __future__ import annotations

import torch

from trace_kernels.runtime.recording import is_recording, recorded_share


def kept_rows(kept: torch.Tensor) -> torch.Tensor | None:
    """Indices of the rows that take part, at least one; None where all do, or where the host must not ask.

    kept: [T] bool.
    """
    if is_recording():
        share = recorded_share()
        return None if share is None else kept.new_empty(int(len(kept) * share), dtype=torch.int64)
    if not len(kept) or (kept.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    index = kept.nonzero()[:, 0]  # waits for the device
    if len(index) == len(kept):
        return None
    return index if len(index) else torch.zeros_like(kept[:1], dtype=torch.int64)


def spread(rows: torch.Tensor, index: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Results of the rows `index` among `num_rows`, 0 elsewhere; without rows there is nothing to spread."""
    if not len(rows):
        return rows
    return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy_(0, index, rows)
