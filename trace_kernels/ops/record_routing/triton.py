"""`record_routing_` in Triton: a block-level histogram, one writer per token score.

Run in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: SIM108

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trace_kernels.runtime.recording import cdiv, size_of
from trace_kernels.shared.triton_common import launch, next_power_of_2

#: Entries that a program reads: one 8-byte index for each of 128 threads in 8 loads.
ENTRIES = 1024


# Another number of tokens is no other kernel.
@triton.jit(do_not_specialize=["num_tokens"])
def record_routing_kernel(
    indices, counts, token_mask, table, token_score, gate,
    num_tokens, num_experts, stride_t, stride_k, stride_counts, stride_mask, stride_score,
    K: tl.constexpr, DENSE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr, HAS_GATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    on = True
    if HAS_GATE:
        on = tl.load(gate) != 0
    if on:
        rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        slots = tl.arange(0, BLOCK_K)
        inside = (rows < num_tokens)[:, None] & (slots < K)[None, :]
        if DENSE:
            # A stride known to the compiler lets it see that rows are aligned.
            offsets = rows[:, None] * K + slots[None, :]
        else:
            offsets = rows[:, None] * stride_t + slots[None, :] * stride_k
        experts = tl.load(indices + offsets, mask=inside, other=0).to(tl.int64)
        valid = inside & (experts >= 0) & (experts < num_experts)
        experts = tl.where(valid, experts, 0).to(tl.int32)
        counted = valid
        if HAS_MASK:
            counted = valid & (tl.load(token_mask + rows * stride_mask, mask=rows < num_tokens, other=0) != 0)[:, None]
        bins = tl.arange(0, BINS)
        added = tl.histogram(
            tl.reshape(experts, [BLOCK_T * BLOCK_K]), BINS, mask=tl.reshape(counted, [BLOCK_T * BLOCK_K])
        )
        tl.atomic_add(
            counts + bins * stride_counts, added.to(tl.int64), mask=(bins < num_experts) & (added > 0), sem="relaxed"
        )
        if HAS_TABLE:
            value = tl.sum(tl.load(table + experts, mask=valid, other=0.0), axis=1)
            scores = token_score + rows * stride_score
            tl.store(scores, tl.load(scores, mask=rows < num_tokens, other=0.0) + value, mask=rows < num_tokens)


def forward(
    indices: torch.Tensor,
    counts: torch.Tensor,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> None:
    T, k = indices.shape
    E = counts.shape[0]
    if k == 0:
        return
    table = None if table is None else table.contiguous()
    block_k = next_power_of_2(k)
    block_t = max(1, ENTRIES // block_k)
    launch(
        record_routing_kernel,
        (cdiv(T, block_t),),
        indices,
        counts,
        token_mask,
        table,
        token_score,
        gate,
        T,
        E,
        *indices.stride(),
        counts.stride(0),
        0 if token_mask is None else token_mask.stride(0),
        0 if token_score is None else token_score.stride(0),
        num_warps=4,
        bytes=size_of(indices, counts, counts, token_mask, table, token_score, token_score),
        K=k,
        DENSE=indices.stride() == (k, 1),
        HAS_MASK=token_mask is not None,
        HAS_TABLE=table is not None,
        HAS_GATE=gate is not None,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BINS=max(32, next_power_of_2(E)),
    )
