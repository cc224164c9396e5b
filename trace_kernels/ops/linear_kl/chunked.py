"""`linear_kl` on a GPU: library products and kernels per row, for ``KL(reference || policy)``.

Both logits are made in blocks of columns that fit the L2 cache, in float32; a kernel adds each block to the rows' sums.
The gradient, a difference of two softmaxes, needs both sums first: with it all blocks of a chunk of rows are kept, and
``dz`` takes the place of the policy's. The backends triton and cuda differ in the row kernels only.

By the model of benchmarks.traffic this takes 1.31 of the floor at 8192 tokens and a head of 151936 x 2048, and a row
kernel can do little about it. Of the 6.0 ms beside the products 1.8 read the blocks from the cache, and 4.2 read them
again from memory (8 bytes per element) and write dz (2). Keeping less of them, one exponential and the difference of
the logits in 16 bits each, would make it 5.2 ms and 1.27, at a loss of digits where the two models agree. Two
exponentials would need no second reading, but two products with the head: a fourth pass. Both sums known before would
leave 2.5 ms and 1.13, but only the reference's could be stored with the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trace_kernels.shared.chunks import (
    CHUNK_BYTES,
    Chunks,
    ScaledRows,
    WeightGradient,
    dense,
    mm_float32,
    split_scale,
)
from trace_kernels.shared.kept import kept_rows, spread
from trace_kernels.shared.linear import Call

#: A row needs four times the memory of one of `linear_cross_entropy`; half its rows keep the products efficient.
BUDGET = 2 * CHUNK_BYTES

#: Rows of a chunk where the vocabulary is split: the same in every process, whatever the size of its slice.
SPLIT_ROWS = 512

#: A block of the policy's logits and the same of the reference's, [R, columns] float32 with the same strides.
Pair = tuple[torch.Tensor, torch.Tensor]
#: See reference.py.
Exchange = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class RowKernels:
    """The kernels of a backend. The policy's call [R] has the weights of the rows: 0 drops a row.

    Attributes:
        block: (logits, policy, state [7, R], top [R] int64, outputs, first, last): add the columns from `first` on to
            the rows' states; the last one writes the outputs: kl, lse, ref_lse, logp and ref_logp of the pivot `top`.
        gradient: (logits, dz [R, V], policy, first, lse, ref_lse, pivot, difference, factor, cached): d kl / d (W h) of
            the columns from `first` on; factor becomes the row's weight, 0 if dropped. `cached`: the logits were just
            made.
        scaled_rows: see `ScaledRows`.
    """

    block: Callable[[Pair, Call, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], int, bool], None]
    gradient: Callable[..., None]
    scaled_rows: ScaledRows


def forward(
    kernels: RowKernels, policy: Call, ref: Call, want_dhidden: bool, want_dweight: bool, exchange: Exchange | None
) -> tuple[torch.Tensor, ...]:
    """Kl, lse, ref_lse, pivot and difference [T], dhidden [T, H], dweight [V, H]: see reference.py."""
    # Processes that share a vocabulary exchange the sums of the same rows.
    index = None if exchange is not None else kept_rows(policy.kept())
    if index is None:
        return _forward_of_all(kernels, policy, ref, want_dhidden, want_dweight, exchange)
    *found, dweight = _forward_of_all(
        kernels, policy.rows(index), ref.rows(index), want_dhidden, want_dweight, exchange
    )
    return *(spread(values, index, len(policy.hidden)) for values in found), dweight


def _forward_of_all(
    kernels: RowKernels, policy: Call, ref: Call, want_dhidden: bool, want_dweight: bool, exchange: Exchange | None
) -> tuple[torch.Tensor, ...]:
    (T, H), V = policy.hidden.shape, policy.num_classes
    policy, ref = (call._replace(weight=dense(call.weight)) for call in (policy, ref))
    gradient = want_dhidden or want_dweight
    kl = torch.empty(T, dtype=torch.float32, device=policy.hidden.device)
    lse, ref_lse, logp, ref_logp, difference, factor = (torch.empty_like(kl) for _ in range(6))
    top = torch.empty_like(kl, dtype=torch.int64)
    dhidden = policy.hidden.new_empty(T if want_dhidden else 0, H)
    dweight = WeightGradient(kernels.scaled_rows, policy.weight, want_dweight)
    rows_each = None if exchange is None else SPLIT_ROWS
    chunks = Chunks(
        policy.hidden, V, gradient, buffers=2, whole=gradient, budget=BUDGET, rows=rows_each, overwrite=True
    )
    state = chunks.state(7)
    for rows in chunks.slices():
        mine, outputs = policy.rows(rows), tuple(values[rows] for values in (kl, lse, ref_lse, logp, ref_logp))
        for block in chunks.blocks():
            logits = _logits(chunks, policy, ref, rows, block)
            kernels.block(logits, mine, state, top[rows], outputs, block.start, block.stop == V)
        if exchange is not None:
            exchange(*outputs)
        torch.sub(torch.expm1(outputs[3]), torch.expm1(outputs[4]), out=difference[rows])
        if not gradient:
            continue
        dz, whole = chunks.dz(rows), slice(0, V)
        logits = chunks.logits(rows, whole, 0), chunks.logits(rows, whole, 1)
        kernels.gradient(
            logits, dz, mine, 0, lse[rows], ref_lse[rows], top[rows], difference[rows], factor[rows], False
        )
        if want_dhidden:
            weights = mine.row_weight
            kept = torch.ones_like(kl[rows]) if weights is None else (weights != 0).float()
            kernels.scaled_rows(chunks.times(dz, policy.weight), kept, dhidden[rows])
        if want_dweight:
            dweight.add(dz, mine.hidden, factor[rows])
    return kl, lse, ref_lse, top, difference, dhidden, dweight.result()


def backward_weight(
    kernels: RowKernels,
    policy: Call,
    ref: Call,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    pivot: torch.Tensor,
    difference: torch.Tensor,
) -> torch.Tensor:
    """Dweight [V, H]: the sum of row_weight_t * d kl_t; both logits are computed again."""
    assert policy.row_weight is not None
    if (index := kept_rows(policy.kept())) is not None:
        policy, ref = policy.rows(index), ref.rows(index)
        lse, ref_lse, pivot, difference = (values[index] for values in (lse, ref_lse, pivot, difference))
    assert policy.row_weight is not None
    row_grad, scale = split_scale(policy.row_weight, policy.hidden.dtype)
    policy, ref = (call._replace(weight=dense(call.weight), row_weight=row_grad) for call in (policy, ref))
    factor = torch.empty(policy.hidden.shape[0], dtype=torch.float32, device=policy.hidden.device)
    dweight = WeightGradient(kernels.scaled_rows, policy.weight)
    chunks = Chunks(policy.hidden, policy.num_classes, gradient=True, buffers=2, summed=True)
    for rows in chunks.slices():
        dz, mine = chunks.dz(rows), policy.rows(rows)
        for block in chunks.blocks():
            logits = _logits(chunks, policy, ref, rows, block)
            known = (lse[rows], ref_lse[rows], pivot[rows], difference[rows])
            kernels.gradient(logits, dz, mine, block.start, *known, factor[rows], True)
        dweight.add(dz, mine.hidden, factor[rows])
    return dweight.result(scale)


def _logits(chunks: Chunks, policy: Call, ref: Call, rows: slice, block: slice) -> Pair:
    pair = chunks.logits(rows, block, 0), chunks.logits(rows, block, 1)
    for call, logits in zip((policy, ref), pair, strict=True):
        mm_float32(call.hidden[rows], call.weight[block].T, logits)
    return pair
