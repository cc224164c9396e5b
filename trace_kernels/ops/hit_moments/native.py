"""Calls of the compiled kernels of `hit_scores`, `hit_moments` and `hit_order`."""

from __future__ import annotations

import functools

import torch

from trace_kernels.runtime import native as compiled
from trace_kernels.runtime.native import native, num_threads

cpu_unavailable = functools.partial(compiled.cpu_unavailable, "hit_scores_cpu", "hit_moments_cpu", "hit_order_cpu")


def refuse_cpu(hits: torch.Tensor, *args: object) -> str | None:
    return None if hits.device.type == "cpu" else f"hits are on {hits.device}, it serves the cpu only"


def scores_cpu(hits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    hits = hits.contiguous()
    padded = torch.nn.functional.pad(values, (0, 8 * hits.shape[1] - values.shape[0]))
    out = torch.empty(hits.shape[0], dtype=torch.float64)
    native().hit_scores_cpu(hits.data_ptr(), *hits.shape, padded.data_ptr(), out.data_ptr(), num_threads())
    return out


def moments_cpu(hits: torch.Tensor, weights: torch.Tensor, num_bits: int, order: int) -> torch.Tensor:
    hits, weights = hits.contiguous(), weights.contiguous()
    out = torch.empty((num_bits,) * order, dtype=torch.float64)
    native().hit_moments_cpu(
        hits.data_ptr(), *hits.shape, weights.data_ptr(), num_bits, order, out.data_ptr(), num_threads()
    )
    return out


def order_cpu(hits: torch.Tensor) -> torch.Tensor:
    hits = hits.contiguous()
    out = torch.empty(hits.shape[0], dtype=torch.int64)
    native().hit_order_cpu(hits.data_ptr(), *hits.shape, out.data_ptr(), num_threads())
    return out
