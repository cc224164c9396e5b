"""The row kernels of `linear_cross_entropy` and `linear_log_prob` in Triton; chunked.py runs them between the products.

Run in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from trace_kernels.ops.linear_cross_entropy import chunked
from trace_kernels.ops.linear_cross_entropy.chunked import RowKernels, State
from trace_kernels.runtime.recording import cdiv
from trace_kernels.shared import losses
from trace_kernels.shared.linear import Call, Gradient, Stats
from trace_kernels.shared.triton_common import (
    LOWEST,
    column_sums,
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
#: Of a thread of block_kernel: four programs a processor. Left alone, the compiler goes for five on some GPUs, by the
#: stack.
MAX_REGISTERS = 64
#: Where a soft cap and the entropy meet dz in float32, more numbers are live at once: three programs.
MORE_REGISTERS = 72
#: How far the number that exponentials are taken from may lag behind the row's maximum: e^40 is far from overflow.
LAG = 40.0
NO_LABEL = tl.constexpr(losses.NO_LABEL)


@triton.jit
def is_kept(target, row_weight, row, num_targets, ignore_index, HAS_WEIGHT: tl.constexpr):
    kept = tl.load(target + row * num_targets) != ignore_index
    for k in range(1, num_targets):
        kept = kept | (tl.load(target + row * num_targets + k) != ignore_index)
    if HAS_WEIGHT:
        kept = kept & (tl.load(row_weight + row) != 0.0)
    return kept


# Another number of rows cuts the vocabulary into other blocks, and is no other kernel.
@triton.jit(do_not_specialize=["width"])
def block_kernel(
    logits, dz, bias, target, row_weight, reference, others, pivot, gap, top, label_logit,
    first, width, stride, stride_dz, num_targets, ignore_index, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WRITE: tl.constexpr, ENTROPY: tl.constexpr, LAG: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Add the logits of the columns ``first`` to ``first + width`` to each row's softmax.

    A row's state is its `reference`, the largest logit `pivot` and its class `top`, `others` = the sum of
    ``exp(x - reference)`` over all columns but that, with ENTROPY `gap` = that of ``exp(x - reference)`` times ``x -
    reference``, and the labels' logits. With WRITE, dz becomes ``exp(x - reference) * dx/dz``; finish_kernel knows its
    factor. The reference lags the maximum by at most LAG, so that it seldom moves and what is written seldom has to be
    read again.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    dz += row * stride_dz
    columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if is_kept(target, row_weight, row, num_targets, ignore_index, HAS_WEIGHT):
        gap_before = tl.zeros([], tl.float32)
        later = first != 0
        largest = tl.load(reference + row, mask=later, other=LOWEST)
        highest = tl.load(pivot + row, mask=later, other=LOWEST)
        highest_class = tl.load(top + row, mask=later, other=-1)
        sum_before = tl.load(others + row, mask=later, other=0.0)
        if ENTROPY:
            gap_before = tl.load(gap + row, mask=later, other=0.0)
        for k in range(num_targets):
            label = tl.load(target + row * num_targets + k) - first
            if first == 0:
                tl.store(label_logit + row * num_targets + k, float("nan"))  # what a label that is no class keeps
            if (label >= 0) & (label < width):
                z = tl.load(logits + label)
                if HAS_BIAS:
                    z += tl.load(bias + first + label)
                tl.store(label_logit + row * num_targets + k, z)
        total = tl.zeros([LANES], tl.float32)
        gap_total = tl.zeros([LANES], tl.float32)
        for start in range(0, width, LANES * VEC):
            inside = start + columns < width
            there = start + columns < padded(width)
            z = tl.load(logits + start + columns, mask=there, other=0.0)
            if HAS_BIAS:
                z += tl.load(bias + first + start + columns, mask=inside, other=0.0)
            x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
            x = tl.where(inside, x, -float("inf"))
            best = tl.max(tl.max(x, axis=1), axis=0)
            if best > highest:
                if best > largest + LAG:
                    rescale = tl.exp(largest - best)
                    if ENTROPY:
                        gap_total = rescale * (gap_total + total * (largest - best))
                        gap_before = rescale * (gap_before + sum_before * (largest - best))
                    total *= rescale
                    sum_before *= rescale
                    if WRITE:
                        tl.debug_barrier()
                        for done in range(0, first + start, LANES * VEC):
                            before = done + columns < first + start
                            old = tl.load(dz + done + columns, mask=before, other=0.0).to(tl.float32)
                            store_rounded(dz + done + columns, old * rescale, before)
                    largest = best
                # The pivot so far joins the others.
                joining = tl.exp(highest - largest)
                sum_before += joining
                if ENTROPY:
                    gap_before += joining * (highest - largest)
                highest = best
                place = tl.where(x == best, columns, LANES * VEC)
                highest_class = (first + start + tl.min(tl.min(place, axis=1), axis=0)).to(tl.int64)
            exponential = tl.exp(x - largest)
            rest = tl.where(first + start + columns == highest_class, 0.0, exponential)
            total += tl.sum(rest, axis=1)
            if ENTROPY:
                gap_total += tl.sum(tl.where(rest == 0.0, 0.0, rest * (x - largest)), axis=1)
            if WRITE:
                store_rounded(dz + first + start + columns, exponential * derivative, there)
        tl.store(reference + row, largest)
        tl.store(pivot + row, highest)
        tl.store(top + row, highest_class)
        tl.store(others + row, sum_before + tl.sum(total, axis=0))
        if ENTROPY:
            tl.store(gap + row, gap_before + tl.sum(gap_total, axis=0))
    elif WRITE:
        zero_row(dz + first, width, columns, LANES * VEC)


@triton.jit(do_not_specialize=["num_rows"])
def finish_kernel(
    dz, target, row_weight, reference, others, pivot, gap, top, label_logit,
    logp, lse, top_class, top_logp, entropy, slope, factor,
    num_rows, num_classes, stride_dz, num_targets, ignore_index, softcap, logit_scale,
    HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WRITE: tl.constexpr, ENTROPY: tl.constexpr,
    EXCLUDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The stats of the rows' states. With WRITE a factor, and dz at the labels: ``factor * dz = d logp / d (W h)``.

    With EXCLUDE dz is 0 at the labels, and ``factor * dz`` the softmax times dz / d (W h) elsewhere.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    kept = tl.zeros([BLOCK], tl.int1)
    known = tl.full([BLOCK], 1, tl.int1)
    for k in range(num_targets):
        label = tl.load(target + row * num_targets + k, mask=inside, other=0)
        kept = kept | (label != ignore_index)
        known = known & (((label >= 0) & (label < num_classes)) | (label == ignore_index) | (label == NO_LABEL))
    kept = kept & inside
    if HAS_WEIGHT:
        kept = kept & (tl.load(row_weight + row, mask=inside, other=0.0) != 0.0)
    largest = tl.load(reference + row, mask=kept, other=0.0)
    rest = tl.load(others + row, mask=kept, other=0.0)
    highest = tl.load(pivot + row, mask=kept, other=0.0)
    highest_class = tl.load(top + row, mask=kept, other=0)
    # Relative to the pivot. A row of which nothing is above -1e30 has no probabilities.
    back = tl.where(highest_class < 0, float("nan"), tl.exp(largest - highest))
    share = rest * back
    highest_logp = -log1p(share)
    tl.store(lse + row, tl.where(kept, highest - highest_logp, 0.0), mask=inside)
    if ENTROPY:
        tl.store(top_class + row, tl.where(kept, highest_class, 0), mask=inside)
        tl.store(top_logp + row, tl.where(kept, highest_logp, 0.0), mask=inside)
        weighted = back * (tl.load(gap + row, mask=kept, other=0.0) + rest * (largest - highest))
        tl.store(entropy + row, tl.where(kept, -highest_logp - weighted / (1.0 + share), 0.0), mask=inside)
    normalizer = rest + tl.exp(highest - largest)
    if WRITE:
        scale = tl.where(known, logit_scale / normalizer, float("nan"))
        if not EXCLUDE:
            scale = -scale
        tl.store(factor + row, tl.where(kept, scale, 0.0), mask=inside)
    for k in range(num_targets):
        label = tl.load(target + row * num_targets + k, mask=inside, other=0)
        scored = kept & (label != ignore_index)
        z = tl.load(label_logit + row * num_targets + k, mask=scored, other=0.0)
        x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
        difference = tl.where(label == NO_LABEL, -float("inf"), x - highest)
        result = tl.where(label == highest_class, 0.0, difference) + highest_logp
        tl.store(logp + row * num_targets + k, tl.where(scored, result, 0.0), mask=inside)
        valid = scored & (label >= 0) & (label < num_classes)
        if EXCLUDE:
            steep = derivative * logit_scale + tl.zeros([BLOCK], tl.float32)
            tl.store(slope + row * num_targets + k, tl.where(valid, steep, 0.0), mask=inside)
        if WRITE:
            at = dz + row * stride_dz + label
            if EXCLUDE:
                store_rounded(at, tl.zeros([BLOCK], tl.float32), valid)
            else:
                # 1 - p is the others' share: no difference of two roundings.
                left = tl.where(label == highest_class, rest, normalizer - tl.exp(x - largest))
                store_rounded(at, -left * derivative, valid)


@triton.jit(do_not_specialize=["width"])
def gradient_kernel(
    logits, dz, bias, target, row_weight, lse, constant, slope_of_log, at_targets, factor,
    first, width, num_classes, stride, stride_dz, num_targets, ignore_index, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LOG: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Dz of a block: ``p (constant + slope_of_log * log p) * dx/dz``, at the labels ``at_targets * dx/dz``.

    `factor`: the row's weight, 0 where it is dropped.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    dz += row * stride_dz + first
    columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if is_kept(target, row_weight, row, num_targets, ignore_index, HAS_WEIGHT):
        normalizer = tl.load(lse + row)
        a = tl.load(constant + row)
        for start in range(0, width, LANES * VEC):
            inside = start + columns < width
            there = start + columns < padded(width)
            z = tl.load(logits + start + columns, mask=there, other=0.0)
            if HAS_BIAS:
                z += tl.load(bias + first + start + columns, mask=inside, other=0.0)
            x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
            p = tl.exp(x - normalizer)
            dx = p * a
            if HAS_LOG:
                dx += tl.where(p == 0.0, 0.0, p * tl.load(slope_of_log + row) * (x - normalizer))
            store_rounded(dz + start + columns, dx * derivative * logit_scale, there)
        tl.debug_barrier()  # what follows is written by whichever thread
        known = row >= 0
        for k in range(num_targets):
            label = tl.load(target + row * num_targets + k)
            known = known & (((label >= 0) & (label < num_classes)) | (label == ignore_index) | (label == NO_LABEL))
            place = label - first
            if (place >= 0) & (place < width):
                z = tl.load(logits + place)
                if HAS_BIAS:
                    z += tl.load(bias + label)
                _, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
                value = tl.load(at_targets + row * num_targets + k) * derivative * logit_scale
                store_rounded(dz + place, value, place >= 0)
        weight = tl.full([], 1.0, tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(row_weight + row)
        tl.store(factor + row, tl.where(known, weight, float("nan")))
    else:
        tl.store(factor + row, 0.0)
        zero_row(dz, width, columns, LANES * VEC)


def _block(z: torch.Tensor, dz: torch.Tensor, call: Call, state: State, first: int, write: bool, entropy: bool) -> None:
    assert call.target is not None
    lanes, vector = tile(call.num_classes, 8, WARPS, vectors_per_thread=1)
    more = write and entropy and call.softcap is not None and dz.dtype == torch.float32
    launch(
        block_kernel, (z.shape[0],),
        z, dz, call.bias, call.target, call.row_weight, *state.numbers, state.top, state.labels,
        first, z.shape[1], z.stride(0), dz.stride(0), call.target.shape[1], call.ignore_index, *call.numbers,
        num_warps=WARPS, max_registers=MORE_REGISTERS if more else MAX_REGISTERS,
        bytes=z.numel() * (4 + write * dz.element_size()), cached=4 * z.numel(),
        HAS_BIAS=call.bias is not None, HAS_WEIGHT=call.row_weight is not None, HAS_SOFTCAP=call.softcap is not None,
        WRITE=write, ENTROPY=entropy, LAG=LAG, LANES=lanes, VEC=vector,
    )  # fmt: skip


def _finish(
    dz: torch.Tensor, call: Call, state: State, stats: Stats, factor: torch.Tensor, write: bool, exclude: bool
) -> None:
    assert call.target is not None
    R, K = stats.logp.shape
    launch(
        finish_kernel, (cdiv(R, 128),),
        dz, call.target, call.row_weight, *state.numbers, state.top, state.labels, *stats[:6], factor,
        R, call.num_classes, dz.stride(0), K, call.ignore_index, *call.numbers,
        num_warps=4, bytes=48 * R * K, HAS_WEIGHT=call.row_weight is not None, HAS_SOFTCAP=call.softcap is not None,
        WRITE=write, ENTROPY=stats.entropy.numel() > 0, EXCLUDE=exclude, BLOCK=128,
    )  # fmt: skip


def _gradient(
    z: torch.Tensor,
    dz: torch.Tensor,
    call: Call,
    first: int,
    lse: torch.Tensor,
    gradient: Gradient,
    factor: torch.Tensor,
    cached: bool,
) -> None:
    assert call.target is not None
    lanes, vector = tile(call.num_classes, 8, WARPS, vectors_per_thread=1)
    moved = z.numel() * (4 + dz.element_size())
    launch(
        gradient_kernel, (z.shape[0],),
        z, dz, call.bias, call.target, call.row_weight, lse, *gradient, factor,
        first, z.shape[1], call.num_classes, z.stride(0), dz.stride(0), call.target.shape[1], call.ignore_index,
        *call.numbers,
        num_warps=WARPS, bytes=moved, cached=4 * z.numel() if cached else 0,
        HAS_BIAS=call.bias is not None, HAS_WEIGHT=call.row_weight is not None, HAS_SOFTCAP=call.softcap is not None,
        HAS_LOG=gradient.log is not None, LANES=lanes, VEC=vector,
    )  # fmt: skip


KERNELS = RowKernels(_block, _finish, _gradient, scaled_rows, column_sums)
forward = functools.partial(chunked.forward, KERNELS)
stats = functools.partial(chunked.stats, KERNELS)
backward = functools.partial(chunked.backward, KERNELS)
