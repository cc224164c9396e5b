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
from trace_kernels.ops.linear_cross_entropy.chunked import Options, RowKernels, Rows
from trace_kernels.runtime.recording import cdiv
from trace_kernels.shared import losses
from trace_kernels.shared.triton_common import (
    LOWEST,
    column_sums,
    launch,
    scaled_rows,
    store_rounded,
    tile,
    transformed,
    zero_row,
)

WARPS = 8
#: How far the number that exponentials are taken from may lag behind the row's maximum: e^40 is far from overflow.
LAG = 40.0
NO_LABEL = tl.constexpr(losses.NO_LABEL)


@triton.jit
def is_kept(target, row_weight, row, ignore_index, HAS_WEIGHT: tl.constexpr):
    kept = tl.load(target + row) != ignore_index
    if HAS_WEIGHT:
        kept = kept & (tl.load(row_weight + row) != 0.0)
    return kept


@triton.jit
def block_kernel(
    logits, dz, bias, target, row_weight, reference, others, label_logit,
    first, width, stride, stride_dz, ignore_index, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, FIRST: tl.constexpr,
    WRITE: tl.constexpr, LAG: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Add the logits of the columns ``first`` to ``first + width`` to each row's softmax.

    A row's state is its `reference`, `others` = the sum of ``exp(x - reference)`` over all columns but the label's, and
    the label's logit. With WRITE, dz becomes ``exp(x - reference) * dx/dz``; finish_kernel knows its factor. The
    reference lags the maximum by at most LAG, so that it seldom moves and what is written seldom has to be read again.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    dz += row * stride_dz
    columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if is_kept(target, row_weight, row, ignore_index, HAS_WEIGHT):
        label = tl.load(target + row) - first
        if FIRST:
            largest = tl.full([], LOWEST, tl.float32)
            sum_before = tl.zeros([], tl.float32)
            tl.store(label_logit + row, float("nan"))  # what a label that is no class keeps
        else:
            largest = tl.load(reference + row)
            sum_before = tl.load(others + row)
        if (label >= 0) & (label < width):
            z = tl.load(logits + label)
            if HAS_BIAS:
                z += tl.load(bias + first + label)
            tl.store(label_logit + row, z)
        total = tl.zeros([LANES], tl.float32)
        for start in range(0, width, LANES * VEC):
            inside = start + columns < width
            z = tl.load(logits + start + columns, mask=inside, other=0.0)
            if HAS_BIAS:
                z += tl.load(bias + first + start + columns, mask=inside, other=0.0)
            x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
            x = tl.where(inside, x, -float("inf"))
            top = tl.max(tl.max(x, axis=1), axis=0)
            if top > largest + LAG:
                rescale = tl.exp(largest - top)
                total *= rescale
                sum_before *= rescale
                if WRITE:
                    tl.debug_barrier()
                    for done in range(0, first + start, LANES * VEC):
                        before = done + columns < first + start
                        old = tl.load(dz + done + columns, mask=before, other=0.0).to(tl.float32)
                        store_rounded(dz + done + columns, old * rescale, before)
                largest = top
            exponential = tl.exp(x - largest)
            total += tl.sum(tl.where(start + columns == label, 0.0, exponential), axis=1)
            if WRITE:
                store_rounded(dz + first + start + columns, exponential * derivative, inside)
        tl.store(reference + row, largest)
        tl.store(others + row, sum_before + tl.sum(total, axis=0))
    elif WRITE:
        zero_row(dz + first, width, columns, LANES * VEC)


@triton.jit
def finish_kernel(
    dz, target, row_weight, reference, others, label_logit, logp, lse, factor,
    num_rows, num_classes, stride_dz, ignore_index, softcap, logit_scale,
    HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the rows' states logp and lse, and with WRITE the label's dz and ``factor * dz = d logp / d (W h)``."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    label = tl.load(target + row, mask=inside, other=0)
    kept = inside & (label != ignore_index)
    if HAS_WEIGHT:
        kept = kept & (tl.load(row_weight + row, mask=inside, other=0.0) != 0.0)
    largest = tl.load(reference + row, mask=kept, other=0.0)
    rest = tl.load(others + row, mask=kept, other=1.0)
    z = tl.load(label_logit + row, mask=kept, other=0.0)
    x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
    x = tl.where(label == NO_LABEL, -float("inf"), x)
    exponentials = rest + tl.exp(x - largest)
    log_total = tl.log(exponentials)
    # The maximum and the logarithm apart: their sum would round away digits of a small loss.
    tl.store(logp + row, tl.where(kept, (x - largest) - log_total, 0.0), mask=inside)
    tl.store(lse + row, tl.where(kept, largest + log_total, 0.0), mask=inside)
    if WRITE:
        # 1 - p is the others' share: no difference of two roundings.
        valid = kept & (label >= 0) & (label < num_classes)
        store_rounded(dz + row * stride_dz + label, -rest * derivative, valid)
        tl.store(factor + row, tl.where(kept, -logit_scale / exponentials, 0.0), mask=inside)


@triton.jit
def gradient_kernel(
    logits, dz, bias, target, row_weight, lse, factor,
    first, width, num_classes, stride, stride_dz, ignore_index, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SCALE: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """``dz = d logp / d (W h)`` of a block from the known logsumexp; `factor`: the row's weight, or 1 without SCALE."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    dz += row * stride_dz + first
    columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if is_kept(target, row_weight, row, ignore_index, HAS_WEIGHT):
        label = tl.load(target + row)
        normalizer = tl.load(lse + row)
        for start in range(0, width, LANES * VEC):
            inside = start + columns < width
            z = tl.load(logits + start + columns, mask=inside, other=0.0)
            if HAS_BIAS:
                z += tl.load(bias + first + start + columns, mask=inside, other=0.0)
            x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
            dx = tl.where(first + start + columns == label, 1.0, 0.0) - tl.exp(x - normalizer)
            store_rounded(dz + start + columns, dx * derivative * logit_scale, inside)
        scale = tl.full([], 1.0, tl.float32)
        if SCALE:
            scale = tl.load(row_weight + row)
        known = ((label >= 0) & (label < num_classes)) | (label == NO_LABEL)
        tl.store(factor + row, tl.where(known, scale, float("nan")))
    else:
        tl.store(factor + row, 0.0)
        zero_row(dz, width, columns, LANES * VEC)


def _block(
    z: torch.Tensor,
    dz: torch.Tensor,
    rows: Rows,
    state: torch.Tensor,
    first: int,
    options: Options,
    write: bool,
) -> None:
    lanes, vector = tile(z.shape[1], 8, WARPS, vectors_per_thread=1)
    launch(
        block_kernel, (z.shape[0],),
        z, dz, rows.bias, rows.target, rows.weight, *state, first, z.shape[1], z.stride(0), dz.stride(0),
        *options.numbers,
        num_warps=WARPS, bytes=z.numel() * (4 + write * dz.element_size()), cached=4 * z.numel(),
        HAS_BIAS=rows.bias is not None, HAS_WEIGHT=rows.weight is not None, HAS_SOFTCAP=options.has_softcap,
        FIRST=first == 0, WRITE=write, LAG=LAG, LANES=lanes, VEC=vector,
    )  # fmt: skip


def _finish(
    dz: torch.Tensor,
    rows: Rows,
    state: torch.Tensor,
    logp: torch.Tensor,
    lse: torch.Tensor,
    factor: torch.Tensor,
    options: Options,
    write: bool,
) -> None:
    R = len(logp)
    launch(
        finish_kernel, (cdiv(R, 128),),
        dz, rows.target, rows.weight, *state, logp, lse, factor, R, rows.num_classes, dz.stride(0), *options.numbers,
        num_warps=4, bytes=48 * R, HAS_WEIGHT=rows.weight is not None, HAS_SOFTCAP=options.has_softcap, WRITE=write,
        BLOCK=128,
    )  # fmt: skip


def _gradient(
    z: torch.Tensor,
    dz: torch.Tensor,
    rows: Rows,
    first: int,
    lse: torch.Tensor,
    factor: torch.Tensor,
    options: Options,
    scale: bool,
    cached: bool,
) -> None:
    lanes, vector = tile(z.shape[1], 8, WARPS, vectors_per_thread=1)
    moved = z.numel() * (4 + dz.element_size())
    launch(
        gradient_kernel, (z.shape[0],),
        z, dz, rows.bias, rows.target, rows.weight, lse, factor,
        first, z.shape[1], rows.num_classes, z.stride(0), dz.stride(0), *options.numbers,
        num_warps=WARPS, bytes=moved, cached=4 * z.numel() if cached else 0,
        HAS_BIAS=rows.bias is not None, HAS_WEIGHT=rows.weight is not None, HAS_SOFTCAP=options.has_softcap,
        SCALE=scale, LANES=lanes, VEC=vector,
    )  # fmt: skip


KERNELS = RowKernels(_block, _finish, _gradient, scaled_rows, column_sums)
forward = functools.partial(chunked.forward, KERNELS)
backward_weight = functools.partial(chunked.backward_weight, KERNELS)
