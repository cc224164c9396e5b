"""`linear_kl` in Triton: library products and kernels per row, for ``KL(reference || policy)``.

Both logits are made in blocks of columns that fit the L2 cache, in float32; a kernel adds each block to the rows' sums.
The gradient, a difference of two softmaxes, needs both sums first: with it all blocks of a chunk of rows are kept.

Run in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from trace_kernels.ops.linear_kl import chunked
from trace_kernels.ops.linear_kl.chunked import Options, Pair, RowKernels
from trace_kernels.shared.triton_common import (
    LOWEST,
    combined,
    launch,
    online_softmax,
    scaled_rows,
    store_rounded,
    tile,
    transformed,
    zero_row,
)

WARPS = 8


@triton.jit
def load_pair(policy, reference, columns, inside, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    z = tl.load(policy + columns, mask=inside, other=0.0)
    x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
    z = tl.load(reference + columns, mask=inside, other=0.0)
    y, _ = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
    return tl.where(inside, x, -float("inf")), tl.where(inside, y, -float("inf")), derivative


@triton.jit
def block_kernel(
    policy, reference, row_weight, maximum, total, ref_maximum, ref_total, gap, kl, lse, ref_lse,
    width, stride, softcap, logit_scale,
    HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Add a block to each row's sums; the last block makes kl and both logsumexps of them, 0 in dropped rows.

    A row's state is maximum and sum of exponentials of both sides, and `gap`, the sum of
    ``exp(y - ref_maximum) * (y - x)`` with y the reference's logits and x the policy's.
    """
    row = tl.program_id(0).to(tl.int64)
    kept = True
    if HAS_WEIGHT:
        kept = tl.load(row_weight + row) != 0.0
    policy += row * stride
    reference += row * stride
    columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if kept:
        lane_maximum = tl.full([LANES], LOWEST, tl.float32)
        lane_ref_maximum = tl.full([LANES], LOWEST, tl.float32)
        lane_total = tl.zeros([LANES], tl.float32)
        lane_ref_total = tl.zeros([LANES], tl.float32)
        lane_gap = tl.zeros([LANES], tl.float32)
        for start in range(0, width, LANES * VEC):
            inside = start + columns < width
            x, y, _ = load_pair(policy, reference, start + columns, inside, softcap, logit_scale, HAS_SOFTCAP)
            lane_maximum, lane_total = online_softmax(lane_maximum, lane_total, x)
            larger = tl.maximum(lane_ref_maximum, tl.max(y, axis=1))
            rescale = tl.exp(lane_ref_maximum - larger)
            exponential = tl.exp(y - larger[:, None])
            lane_ref_total = lane_ref_total * rescale + tl.sum(exponential, axis=1)
            # What the reference excludes adds nothing, also where the policy excludes it too.
            lane_gap = lane_gap * rescale + tl.sum(tl.where(exponential == 0.0, 0.0, exponential * (y - x)), axis=1)
            lane_ref_maximum = larger
        top, exponentials = combined(lane_maximum, lane_total)
        ref_top, ref_exponentials = combined(lane_ref_maximum, lane_ref_total)
        gap_sum = tl.sum(lane_gap * tl.exp(lane_ref_maximum - ref_top), axis=0)
        if not FIRST:
            before = tl.load(maximum + row)
            larger = tl.maximum(before, top)
            exponentials = exponentials * tl.exp(top - larger) + tl.load(total + row) * tl.exp(before - larger)
            top = larger
            before = tl.load(ref_maximum + row)
            larger = tl.maximum(before, ref_top)
            here, there = tl.exp(ref_top - larger), tl.exp(before - larger)
            ref_exponentials = ref_exponentials * here + tl.load(ref_total + row) * there
            gap_sum = gap_sum * here + tl.load(gap + row) * there
            ref_top = larger
        if LAST:
            tl.store(kl + row, gap_sum / ref_exponentials + (top - ref_top) + tl.log(exponentials / ref_exponentials))
            tl.store(lse + row, top + tl.log(exponentials))
            tl.store(ref_lse + row, ref_top + tl.log(ref_exponentials))
        else:
            tl.store(maximum + row, top)
            tl.store(total + row, exponentials)
            tl.store(ref_maximum + row, ref_top)
            tl.store(ref_total + row, ref_exponentials)
            tl.store(gap + row, gap_sum)
    elif LAST:
        tl.store(kl + row, 0.0)
        tl.store(lse + row, 0.0)
        tl.store(ref_lse + row, 0.0)


@triton.jit
def gradient_kernel(
    policy, reference, dz, row_weight, lse, ref_lse, factor,
    first, width, stride, stride_dz, softcap, logit_scale,
    HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """``dz = d kl / d (W h)`` of a block from both logsumexps; `factor` becomes the row's weight, 0 if dropped.

    A row of dz may begin where that of the policy's logits does: its elements are no larger than theirs.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = tl.full([], 1.0, tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(row_weight + row)
    policy += row * stride
    reference += row * stride
    dz += row * stride_dz + first
    columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    tl.store(factor + row, weight)
    if weight != 0.0:
        normalizer = tl.load(lse + row)
        ref_normalizer = tl.load(ref_lse + row)
        for start in range(0, width, LANES * VEC):
            inside = start + columns < width
            x, y, derivative = load_pair(policy, reference, start + columns, inside, softcap, logit_scale, HAS_SOFTCAP)
            dx = tl.exp(x - normalizer) - tl.exp(y - ref_normalizer)
            tl.debug_barrier()  # all have read the tile, which dz may overwrite
            store_rounded(dz + start + columns, dx * derivative * logit_scale, inside)
    else:
        zero_row(dz, width, columns, LANES * VEC)


def _block(
    logits: Pair,
    weights: torch.Tensor | None,
    state: torch.Tensor,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    first: bool,
    last: bool,
    options: Options,
) -> None:
    (R, width), stride = logits[0].shape, logits[0].stride(0)
    lanes, vector = tile(width, 8, WARPS, vectors_per_thread=1)
    launch(
        block_kernel, (R,),
        *logits, weights, *state, *outputs, width, stride, *options.numbers,
        num_warps=WARPS, bytes=8 * R * width, cached=8 * R * width,
        HAS_WEIGHT=weights is not None, HAS_SOFTCAP=options.has_softcap, FIRST=first, LAST=last,
        LANES=lanes, VEC=vector,
    )  # fmt: skip


def _gradient(
    logits: Pair,
    dz: torch.Tensor,
    first: int,
    weights: torch.Tensor | None,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    factor: torch.Tensor,
    options: Options,
    cached: bool,
) -> None:
    R, width = logits[0].shape
    lanes, vector = tile(width, 8, WARPS, vectors_per_thread=1)
    launch(
        gradient_kernel, (R,),
        *logits, dz, weights, lse, ref_lse, factor, first, width, logits[0].stride(0), dz.stride(0), *options.numbers,
        num_warps=WARPS, bytes=R * width * (8 + dz.element_size()), cached=8 * R * width if cached else 0,
        HAS_WEIGHT=weights is not None, HAS_SOFTCAP=options.has_softcap, LANES=lanes, VEC=vector,
    )  # fmt: skip


KERNELS = RowKernels(_block, _gradient, scaled_rows)
forward = functools.partial(chunked.forward, KERNELS)
backward_weight = functools.partial(chunked.backward_weight, KERNELS)
forward_split = functools.partial(chunked.forward_split, KERNELS)
