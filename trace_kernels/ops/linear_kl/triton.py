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
from trace_kernels.ops.linear_kl.chunked import Pair, RowKernels
from trace_kernels.shared.linear import Call
from trace_kernels.shared.triton_common import (
    LOWEST,
    launch,
    log1p,
    padded,
    scaled_rows,
    store_rounded,
    tile,
    transformed,
    zero_row,
)

WARPS = 8
#: Of a thread of block_kernel: three programs a processor. Left alone, the compiler keeps to four on some GPUs and puts
#: two of a thread's numbers on the stack, or leaves room for two.
MAX_REGISTERS = 80


@triton.jit
def load_pair(policy, reference, columns, width, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    inside = columns < width
    there = columns < padded(width)
    z = tl.load(policy + columns, mask=there, other=0.0)
    x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
    z = tl.load(reference + columns, mask=there, other=0.0)
    y, _ = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
    return tl.where(inside, x, -float("inf")), tl.where(inside, y, -float("inf")), derivative


# Another number of rows cuts the vocabulary into other blocks, and is no other kernel.
@triton.jit(do_not_specialize=["width", "last"])
def block_kernel(
    policy, reference, row_weight, maximum, total, ref_maximum, ref_total, gap, pivot, ref_pivot, top,
    kl, lse, ref_lse, logp, ref_logp,
    first, width, last, stride, softcap, logit_scale,
    HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Add a block to each row's sums; the last block makes the outputs of them, 0 in dropped rows.

    A row's state is the pivot, which is the reference's largest class `top`, and of all others maximum and sum of
    exponentials of both sides and `gap`, the sum of ``exp(y - ref_maximum) * ((y - ref_maximum) - (x - maximum))`` with
    y the reference's logits and x the policy's. Where both are sure of the pivot, the others' sums are what is left.
    """
    row = tl.program_id(0).to(tl.int64)
    kept = True
    if HAS_WEIGHT:
        kept = tl.load(row_weight + row) != 0.0
    policy += row * stride
    reference += row * stride
    columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if kept:
        later = first != 0
        top_x = tl.load(pivot + row, mask=later, other=LOWEST)
        top_y = tl.load(ref_pivot + row, mask=later, other=LOWEST)
        top_class = tl.load(top + row, mask=later, other=-1)
        largest = tl.load(maximum + row, mask=later, other=LOWEST)
        ref_largest = tl.load(ref_maximum + row, mask=later, other=LOWEST)
        sum_before = tl.load(total + row, mask=later, other=0.0)
        ref_sum_before = tl.load(ref_total + row, mask=later, other=0.0)
        gap_before = tl.load(gap + row, mask=later, other=0.0)
        lane_total = tl.zeros([LANES], tl.float32)
        lane_ref_total = tl.zeros([LANES], tl.float32)
        lane_gap = tl.zeros([LANES], tl.float32)
        for start in range(0, width, LANES * VEC):
            x, y, _ = load_pair(policy, reference, start + columns, width, softcap, logit_scale, HAS_SOFTCAP)
            best = tl.max(tl.max(x, axis=1), axis=0)
            ref_best = tl.max(tl.max(y, axis=1), axis=0)
            if (best > largest) | (ref_best > ref_largest):
                larger = tl.maximum(best, largest)
                ref_larger = tl.maximum(ref_best, ref_largest)
                shrink = tl.exp(largest - larger)
                ref_shrink = tl.exp(ref_largest - ref_larger)
                # From the old maxima to the new ones, of which the first is none.
                shift = (ref_largest - ref_larger) - (largest - larger)
                lane_gap = ref_shrink * (lane_gap + tl.where(lane_ref_total == 0.0, 0.0, lane_ref_total * shift))
                gap_before = ref_shrink * (gap_before + tl.where(ref_sum_before == 0.0, 0.0, ref_sum_before * shift))
                lane_total *= shrink
                sum_before *= shrink
                lane_ref_total *= ref_shrink
                ref_sum_before *= ref_shrink
                largest = larger
                ref_largest = ref_larger
            if ref_best > top_y:
                # The pivot so far joins the others.
                if top_class >= 0:
                    joining = tl.exp(top_y - ref_largest)
                    sum_before += tl.exp(top_x - largest)
                    ref_sum_before += joining
                    gap_before += tl.where(joining == 0.0, 0.0, joining * ((top_y - ref_largest) - (top_x - largest)))
                place = tl.min(tl.min(tl.where(y == ref_best, columns, LANES * VEC), axis=1), axis=0)
                top_y = ref_best
                top_x = tl.sum(tl.sum(tl.where(columns == place, x, 0.0), axis=1), axis=0)
                top_class = (first + start + place).to(tl.int64)
            other = first + start + columns != top_class
            exponential = tl.where(other, tl.exp(y - ref_largest), 0.0)
            lane_total += tl.sum(tl.where(other, tl.exp(x - largest), 0.0), axis=1)
            lane_ref_total += tl.sum(exponential, axis=1)
            # What the reference excludes adds nothing, also where the policy excludes it too.
            difference = (y - ref_largest) - (x - largest)
            lane_gap += tl.sum(tl.where(exponential == 0.0, 0.0, exponential * difference), axis=1)
        others = sum_before + tl.sum(lane_total, axis=0)
        ref_others = ref_sum_before + tl.sum(lane_ref_total, axis=0)
        gaps = gap_before + tl.sum(lane_gap, axis=0)
        if last != 0:
            # Relative to the pivot: what it leaves to the others, on both sides.
            own, ref_own = tl.exp(top_x - largest), tl.exp(top_y - ref_largest)
            everything = others + own
            log_p = tl.where(
                own > others, -log1p(others / tl.where(own > others, own, 1.0)), (top_x - largest) - tl.log(everything)
            )
            log_q = -log1p(ref_others / ref_own)
            log_p = tl.where(top_class < 0, float("nan"), log_p)
            log_total = tl.where(own > others, (top_x - largest) - log_p, tl.log(everything))
            log_ref_total = (top_y - ref_largest) - log_q
            left = gaps + tl.where(ref_others == 0.0, 0.0, ref_others * (log_total - log_ref_total))
            at_pivot = tl.exp(log_q) * (log_q - log_p)
            ref_everything = ref_others + ref_own
            # Where the reference is sure of nothing, the gaps with less rounding.
            gap_at_pivot = ref_own * ((top_y - ref_largest) - (top_x - largest))
            unsure = (gaps + tl.where(ref_own == 0.0, 0.0, gap_at_pivot)) / ref_everything
            unsure += tl.log(everything) - tl.log(ref_everything)
            tl.store(kl + row, tl.where(log_q > -0.7, left / ref_everything + at_pivot, unsure))
            tl.store(lse + row, largest + log_total)
            tl.store(ref_lse + row, ref_largest + log_ref_total)
            tl.store(logp + row, log_p)
            tl.store(ref_logp + row, log_q)
        else:
            tl.store(maximum + row, largest)
            tl.store(total + row, others)
            tl.store(ref_maximum + row, ref_largest)
            tl.store(ref_total + row, ref_others)
            tl.store(gap + row, gaps)
            tl.store(pivot + row, top_x)
            tl.store(ref_pivot + row, top_y)
        tl.store(top + row, top_class)
    elif last != 0:
        tl.store(kl + row, 0.0)
        tl.store(lse + row, 0.0)
        tl.store(ref_lse + row, 0.0)
        tl.store(logp + row, 0.0)
        tl.store(ref_logp + row, 0.0)
        tl.store(top + row, tl.zeros([], tl.int64))


@triton.jit(do_not_specialize=["width"])
def gradient_kernel(
    policy, reference, dz, row_weight, lse, ref_lse, pivot, at_pivot, factor,
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
        place = tl.load(pivot + row) - first
        for start in range(0, width, LANES * VEC):
            x, y, derivative = load_pair(policy, reference, start + columns, width, softcap, logit_scale, HAS_SOFTCAP)
            dx = tl.exp(x - normalizer) - tl.exp(y - ref_normalizer)
            dx = tl.where(start + columns == place, tl.load(at_pivot + row), dx)
            tl.debug_barrier()  # all have read the tile, which dz may overwrite
            store_rounded(dz + start + columns, dx * derivative * logit_scale, start + columns < padded(width))
    else:
        zero_row(dz, width, columns, LANES * VEC)


def _block(
    logits: Pair,
    call: Call,
    state: torch.Tensor,
    top: torch.Tensor,
    outputs: tuple[torch.Tensor, ...],
    first: int,
    last: bool,
) -> None:
    (R, width), stride = logits[0].shape, logits[0].stride(0)
    lanes, vector = tile(call.num_classes, 8, WARPS, vectors_per_thread=1)
    launch(
        block_kernel, (R,),
        *logits, call.row_weight, *state, top, *outputs, first, width, int(last), stride, *call.numbers,
        num_warps=WARPS, max_registers=MAX_REGISTERS, bytes=8 * R * width, cached=8 * R * width,
        HAS_WEIGHT=call.row_weight is not None, HAS_SOFTCAP=call.softcap is not None,
        LANES=lanes, VEC=vector,
    )  # fmt: skip


def _gradient(
    logits: Pair,
    dz: torch.Tensor,
    call: Call,
    first: int,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    pivot: torch.Tensor,
    difference: torch.Tensor,
    factor: torch.Tensor,
    cached: bool,
) -> None:
    R, width = logits[0].shape
    lanes, vector = tile(call.num_classes, 8, WARPS, vectors_per_thread=1)
    launch(
        gradient_kernel, (R,),
        *logits, dz, call.row_weight, lse, ref_lse, pivot, difference, factor,
        first, width, logits[0].stride(0), dz.stride(0), *call.numbers,
        num_warps=WARPS, bytes=R * width * (8 + dz.element_size()), cached=8 * R * width if cached else 0,
        HAS_WEIGHT=call.row_weight is not None, HAS_SOFTCAP=call.softcap is not None, LANES=lanes, VEC=vector,
    )  # fmt: skip


KERNELS = RowKernels(_block, _gradient, scaled_rows)
forward = functools.partial(chunked.forward, KERNELS)
backward_weight = functools.partial(chunked.backward_weight, KERNELS)
