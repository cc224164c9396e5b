"""`linear_kl` on a GPU: library products and kernels per row, for ``KL(reference || policy)``.

Both logits are made in blocks of columns that fit the L2 cache, in float32; a kernel adds each block to the rows' sums.
The gradient, a difference of two softmaxes, needs both sums first: with it all blocks of a chunk of rows are kept, and
``dz`` takes the place of the policy's. The backends triton and cuda differ in the row kernels only.

By the model of benchmarks.traffic this takes 1.31 of the floor at 8192 tokens and a head of 151936 x 2048, and a row
kernel can do little about it. Of the 6.0 ms beside the products 1.8 read the blocks from the cache, and 4.2 read them
again from memory (8 bytes an element) and write dz (2). Keeping less of them, one exponential and the difference of the
logits in 16 bits each, would make it 5.2 ms and 1.27, at a loss of digits where the two models agree. Two exponentials
would need no second reading, but two products with the head: a fourth pass. Both sums known before would leave 2.5 ms
and 1.13, but only the reference's could be stored with the data.
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

#: A row needs four times the memory of one of `linear_cross_entropy`; half its rows keep the products efficient.
BUDGET = 2 * CHUNK_BYTES

#: Rows of a chunk where the vocabulary is split: the same in every process, whatever the size of its slice.
SPLIT_ROWS = 512

#: A block of the policy's logits and the same of the reference's, [R, columns] float32 with the same strides.
Pair = tuple[torch.Tensor, torch.Tensor]
#: (kl, lse, ref_lse) of rows, which it changes in place from those of a slice to those of the whole vocabulary.
Exchange = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class Options:
    """The constants of a call."""

    softcap: float | None
    logit_scale: float

    @property
    def has_softcap(self) -> bool:
        return self.softcap is not None

    @property
    def numbers(self) -> tuple[float, float]:
        """As kernels get them: a softcap of 0 is none."""
        return self.softcap or 0.0, self.logit_scale


@dataclass(frozen=True)
class RowKernels:
    """The kernels of a backend. weights [R]: 0 drops a row; None keeps all.

    Attributes:
        block: (logits, weights, state [5, R], (kl, lse, ref_lse), first, last, options): add a block to the rows'
            states; the last one writes the outputs.
        gradient: (logits, dz [R, V], first, weights, lse, ref_lse, factor, options, cached): d kl / d (W h) of the
            columns from `first` on; factor becomes the row's weight, 0 if dropped. `cached`: the logits were just made.
        scaled_rows: see `ScaledRows`.
    """

    block: Callable[
        [Pair, torch.Tensor | None, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor], bool, bool, Options],
        None,
    ]
    gradient: Callable[..., None]
    scaled_rows: ScaledRows


@dataclass(frozen=True)
class _Sides:
    """Hidden states and head of the policy and of the reference."""

    hidden: torch.Tensor
    weight: torch.Tensor
    ref_hidden: torch.Tensor
    ref_weight: torch.Tensor

    def logits(self, chunks: Chunks, rows: slice, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
        policy, reference = chunks.logits(rows, block, 0), chunks.logits(rows, block, 1)
        mm_float32(self.hidden[rows], self.weight[block].T, policy)
        mm_float32(self.ref_hidden[rows], self.ref_weight[block].T, reference)
        return policy, reference


def forward(
    kernels: RowKernels,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    want_dweight: bool,
    exchange: Exchange | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kl [T], lse [T], ref_lse [T], dhidden [T, H], dweight [V, H]; gradients that are not wanted are empty.

    With `exchange` the weights are slices, and it makes the sums of the whole vocabulary out of a chunk's.
    """
    (T, H), V = hidden.shape, weight.shape[0]
    options = Options(softcap, logit_scale)
    sides = _Sides(hidden, dense(weight), ref_hidden, dense(ref_weight))
    gradient = want_dhidden or want_dweight
    kl = torch.empty(T, dtype=torch.float32, device=hidden.device)
    lse, ref_lse, factor = torch.empty_like(kl), torch.empty_like(kl), torch.empty_like(kl)
    dhidden = hidden.new_empty(T if want_dhidden else 0, H)
    dweight = WeightGradient(kernels.scaled_rows, sides.weight, want_dweight)
    chunk_rows = None if exchange is None else SPLIT_ROWS
    chunks = Chunks(hidden, V, gradient, buffers=2, whole=gradient, budget=BUDGET, rows=chunk_rows, overwrite=True)
    state = torch.empty((5, chunks.rows), dtype=torch.float32, device=hidden.device)
    for rows in chunks.slices():
        weights = None if row_weight is None else row_weight[rows]
        outputs = kl[rows], lse[rows], ref_lse[rows]
        for block in chunks.blocks():
            logits = sides.logits(chunks, rows, block)
            kernels.block(logits, weights, state, outputs, block.start == 0, block.stop == V, options)
        if exchange is not None:
            exchange(*outputs)
        if not gradient:
            continue
        dz, whole = chunks.dz(rows), slice(0, V)
        logits = chunks.logits(rows, whole, 0), chunks.logits(rows, whole, 1)
        kernels.gradient(logits, dz, 0, weights, lse[rows], ref_lse[rows], factor[rows], options, False)
        if want_dhidden:
            kept = torch.ones_like(kl[rows]) if weights is None else (weights != 0).float()
            kernels.scaled_rows(chunks.times(dz, sides.weight), kept, dhidden[rows])
        if want_dweight:
            dweight.add(dz, hidden[rows], factor[rows])
    return kl, lse, ref_lse, dhidden, dweight.result()


def forward_split(
    kernels: RowKernels,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    row_weight: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    exchange: Exchange,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kl, lse and ref_lse [T] of the whole vocabulary, and the part [T, H] of dhidden of this process's slice."""
    return forward(
        kernels, hidden, weight, ref_hidden, ref_weight, row_weight, softcap, logit_scale, True, False, exchange
    )[:4]


def backward_weight(
    kernels: RowKernels,
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
    options = Options(softcap, logit_scale)
    row_grad, scale = split_scale(row_grad, hidden.dtype)
    sides = _Sides(hidden, dense(weight), ref_hidden, dense(ref_weight))
    factor = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    dweight = WeightGradient(kernels.scaled_rows, sides.weight)
    chunks = Chunks(hidden, weight.shape[0], gradient=True, buffers=2)
    for rows in chunks.slices():
        dz = chunks.dz(rows)
        for block in chunks.blocks():
            logits = sides.logits(chunks, rows, block)
            kernels.gradient(
                logits, dz, block.start, row_grad[rows], lse[rows], ref_lse[rows], factor[rows], options, True
            )
        dweight.add(dz, hidden[rows], factor[rows])
    return dweight.result(scale)
