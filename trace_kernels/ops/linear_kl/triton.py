"""`linear_kl` in Triton: library products and kernels per row, for ``KL(reference || policy)``.

Both logits are made in blocks of columns that fit the L2 cache, in float32; a kernel adds each block to the rows' sums.
The gradient, a difference of two softmaxes, needs both sums first: with it all blocks of a chunk of rows are kept.

Run in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trace_kernels.triton_common import (
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
from trace_kernels.triton_linear import CHUNK_BYTES, Chunks, WeightGradient, dense, product
from trace_kernels.triton_matmul import KeptFirst, counting

WARPS = 8
#: A row needs five times the memory of one of `linear_cross_entropy`; half its rows keep the products efficient.
BUDGET = 2 * CHUNK_BYTES


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
    """``dz = d kl / d (W h)`` of a block from both logsumexps; `factor` becomes the row's weight, 0 if dropped."""
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
            store_rounded(dz + start + columns, dx * derivative * logit_scale, inside)
    else:
        zero_row(dz, width, columns, LANES * VEC)


class _Sides:
    """Hidden states and head of the policy and of the reference.

    Attributes:
        order: of the rows of all others, when the kept ones were put first.
        row_weight, others: [T] each.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        ref_hidden: torch.Tensor,
        ref_weight: torch.Tensor,
        row_weight: torch.Tensor | None,
        *others: torch.Tensor,
    ) -> None:
        self.order = None
        self.row_weight, self.others = row_weight, others
        if row_weight is not None and counting(hidden, weight) and counting(ref_hidden, ref_weight):
            self.order = KeptFirst(row_weight != 0)
            hidden, ref_hidden = self.order.gathered(hidden), self.order.gathered(ref_hidden)
            self.row_weight = self.order.gathered(row_weight)
            self.others = tuple(self.order.gathered(other) for other in others)
        self.hidden, self.weight = hidden, dense(weight)
        self.ref_hidden, self.ref_weight = ref_hidden, dense(ref_weight)

    def count(self, rows: slice) -> torch.Tensor | None:
        return None if self.order is None else self.order.in_chunk(rows)

    def logits(
        self, chunks: Chunks, rows: slice, block: slice, count: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        policy, reference = chunks.logits(rows, block, 0), chunks.logits(rows, block, 1)
        product(self.hidden[rows], self.weight[block].T, policy, count)
        product(self.ref_hidden[rows], self.ref_weight[block].T, reference, count)
        return policy, reference

    def in_order(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a result, in the order that the inputs came in."""
        return rows if self.order is None else self.order.scattered(rows)


def _gradient(
    logits: tuple[torch.Tensor, torch.Tensor],
    dz: torch.Tensor,
    first: int,
    vectors: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor],
    softcap: float | None,
    logit_scale: float,
    cached: bool,
) -> None:
    R, width = logits[0].shape
    lanes, vector = tile(width, 8, WARPS, vectors_per_thread=1)
    launch(
        gradient_kernel, (R,),
        *logits, dz, *vectors, first, width, logits[0].stride(0), dz.stride(0), softcap or 0.0, logit_scale,
        num_warps=WARPS, bytes=R * width * (8 + dz.element_size()), cached=8 * R * width if cached else 0,
        HAS_WEIGHT=vectors[0] is not None, HAS_SOFTCAP=softcap is not None, LANES=lanes, VEC=vector,
    )  # fmt: skip


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kl [T], lse [T], ref_lse [T], dhidden [T, H], dweight [V, H]; gradients that are not wanted are empty."""
    (T, H), V = hidden.shape, weight.shape[0]
    sides = _Sides(hidden, weight, ref_hidden, ref_weight, row_weight)
    gradient = want_dhidden or want_dweight
    kl = torch.empty(T, dtype=torch.float32, device=hidden.device)
    lse, ref_lse, factor = torch.empty_like(kl), torch.empty_like(kl), torch.empty_like(kl)
    dhidden = hidden.new_empty(T if want_dhidden else 0, H)
    dweight = WeightGradient(sides.weight, want_dweight)
    chunks = Chunks(hidden, V, gradient, buffers=2, whole=gradient, budget=BUDGET)
    state = torch.empty((5, chunks.rows), dtype=torch.float32, device=hidden.device)
    for rows in chunks.slices():
        weights = None if sides.row_weight is None else sides.row_weight[rows]
        count = sides.count(rows)
        for block in chunks.blocks():
            logits = sides.logits(chunks, rows, block, count)
            (R, width), stride = logits[0].shape, logits[0].stride(0)
            lanes, vector = tile(width, 8, WARPS, vectors_per_thread=1)
            launch(
                block_kernel, (R,),
                *logits, weights, *state, kl[rows], lse[rows], ref_lse[rows],
                width, stride, softcap or 0.0, logit_scale,
                num_warps=WARPS, bytes=8 * R * width, cached=8 * R * width,
                HAS_WEIGHT=weights is not None, HAS_SOFTCAP=softcap is not None,
                FIRST=block.start == 0, LAST=block.stop == V, LANES=lanes, VEC=vector,
            )  # fmt: skip
        if not gradient:
            continue
        dz, whole = chunks.dz(rows), slice(0, V)
        logits = chunks.logits(rows, whole, 0), chunks.logits(rows, whole, 1)
        vectors = (weights, lse[rows], ref_lse[rows], factor[rows])
        _gradient(logits, dz, 0, vectors, softcap, logit_scale, cached=False)
        if want_dhidden:
            kept = torch.ones_like(kl[rows]) if weights is None else (weights != 0).float()
            scaled_rows(chunks.times(dz, sides.weight, count), kept, out=dhidden[rows])
        if want_dweight:
            dweight.add(dz, sides.hidden[rows], factor[rows], count)
    kl, lse, ref_lse, dhidden = (sides.in_order(rows) for rows in (kl, lse, ref_lse, dhidden))
    return kl, lse, ref_lse, dhidden, dweight.result()


def backward_weight(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    row_grad: torch.Tensor,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    """Dweight [V, H]: the sum of row_grad_t * d kl_t; both logits are computed again."""
    sides = _Sides(hidden, weight, ref_hidden, ref_weight, row_grad, lse, ref_lse)
    lse, ref_lse = sides.others
    factor = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    dweight = WeightGradient(sides.weight)
    chunks = Chunks(hidden, weight.shape[0], gradient=True, buffers=2)
    for rows in chunks.slices():
        dz = chunks.dz(rows)
        count = sides.count(rows)
        weights = None if sides.row_weight is None else sides.row_weight[rows]
        vectors = (weights, lse[rows], ref_lse[rows], factor[rows])
        for block in chunks.blocks():
            logits = sides.logits(chunks, rows, block, count)
            _gradient(logits, dz, block.start, vectors, softcap, logit_scale, cached=True)
        dweight.add(dz, sides.hidden[rows], factor[rows], count)
    return dweight.result()
