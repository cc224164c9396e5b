"""`linear_cross_entropy` and `linear_log_prob` on a GPU: library products, and one kernel per row between them.

The logits of a chunk of rows are made in blocks of columns that fit the L2 cache, in float32. A kernel adds each block
to the rows' softmax and leaves ``dz``, up to a factor per row, for the products with the head and the hidden states.
The backends triton and cuda differ in the row kernels only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trace_kernels.shared.chunks import (
    Chunks,
    ScaledRows,
    WeightGradient,
    dense,
    mm_float32,
    split_scale,
)


@dataclass(frozen=True)
class Options:
    """The constants of a call."""

    ignore_index: int
    softcap: float | None
    logit_scale: float

    @property
    def has_softcap(self) -> bool:
        return self.softcap is not None

    @property
    def numbers(self) -> tuple[int, float, float]:
        """As kernels get them: a softcap of 0 is none."""
        return self.ignore_index, self.softcap or 0.0, self.logit_scale


@dataclass(frozen=True)
class Rows:
    """What a kernel knows of a chunk's rows: target [R], weight [R] (0: dropped) or None; V, and bias [V] or None."""

    num_classes: int
    bias: torch.Tensor | None
    target: torch.Tensor
    weight: torch.Tensor | None


@dataclass(frozen=True)
class RowKernels:
    """The kernels of a backend. z is a block of logits [R, columns], float32; dz is [R, V].

    Attributes:
        block: (z, dz, rows, state [3, R], first, options, write): add the columns from `first` on to the rows' states;
            with `write`, leave dz up to a factor.
        finish: (dz, rows, state, logp, lse, factor, options, write): logp and lse of the states, and the factor.
        gradient: (z, dz, rows, first, lse, factor, options, scale, cached): dz of a block from the known lse; factor is
            the row's weight, or 1 without `scale`, and 0 where the row is dropped. `cached`: z was just written.
        scaled_rows: see `ScaledRows`.
        column_sums: (rows [R, V], factor [R], sums [V]): sums += the sum of factor_t * rows_t.
    """

    block: Callable[[torch.Tensor, torch.Tensor, Rows, torch.Tensor, int, Options, bool], None]
    finish: Callable[..., None]
    gradient: Callable[..., None]
    scaled_rows: ScaledRows
    column_sums: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def forward(
    kernels: RowKernels,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    row_weight: torch.Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logp [T], lse [T], dhidden [T, H], dweight [V, H], dbias [V]; those not wanted are empty."""
    options = Options(ignore_index, softcap, logit_scale)
    weight = dense(weight)
    (T, H), V = hidden.shape, weight.shape[0]
    all_rows = Rows(V, bias, target, row_weight)
    gradient = want_dhidden or want_dweight
    # float16 has no exponents for unnormalised exponentials: its logits are kept until the row's sum is known.
    scaled = gradient and hidden.dtype != torch.float16
    twice = gradient and not scaled
    logp = torch.empty(T, dtype=torch.float32, device=hidden.device)
    lse, factor = torch.empty_like(logp), torch.empty_like(logp)
    dhidden = hidden.new_empty(T if want_dhidden else 0, H)
    dweight = WeightGradient(kernels.scaled_rows, weight, want_dweight)
    dbias = logp.new_zeros(V if want_dweight else 0)
    chunks = Chunks(hidden, V, gradient, whole=twice)
    state = torch.empty((3, chunks.rows), dtype=torch.float32, device=hidden.device)
    for chunk in chunks.slices():
        dz, rows = chunks.dz(chunk), _of(all_rows, chunk)
        for block in chunks.blocks():
            z = chunks.logits(chunk, block)
            mm_float32(hidden[chunk], weight[block].T, z)
            kernels.block(z, dz, rows, state, block.start, options, scaled)
        kernels.finish(dz, rows, state, logp[chunk], lse[chunk], factor[chunk], options, scaled)
        if twice:
            z = chunks.logits(chunk, slice(0, V))
            kernels.gradient(z, dz, rows, 0, lse[chunk], factor[chunk], options, False, False)
        if want_dhidden:
            kernels.scaled_rows(chunks.times(dz, weight), factor[chunk], dhidden[chunk])
        if want_dweight:
            scale = factor[chunk] if rows.weight is None else factor[chunk] * rows.weight
            dweight.add(dz, hidden[chunk], scale)
            if rows.bias is not None:
                kernels.column_sums(dz, scale, dbias)
    return logp, lse, dhidden, dweight.result(), dbias


def backward_weight(
    kernels: RowKernels,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    lse: torch.Tensor,
    row_grad: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dweight [V, H] and dbias [V]: sums of row_grad_t * d logp_t; the logits are computed again."""
    T, V = hidden.shape[0], weight.shape[0]
    options = Options(ignore_index, softcap, logit_scale)
    weight = dense(weight)
    row_grad, scale = split_scale(row_grad, hidden.dtype)
    all_rows = Rows(weight.shape[0], bias, target, row_grad)
    factor = torch.empty(T, dtype=torch.float32, device=hidden.device)
    dweight = WeightGradient(kernels.scaled_rows, weight)
    dbias = factor.new_zeros(V)
    chunks = Chunks(hidden, V, gradient=True)
    for chunk in chunks.slices():
        dz, rows = chunks.dz(chunk), _of(all_rows, chunk)
        for block in chunks.blocks():
            z = chunks.logits(chunk, block)
            mm_float32(hidden[chunk], weight[block].T, z)
            kernels.gradient(z, dz, rows, block.start, lse[chunk], factor[chunk], options, True, True)
        dweight.add(dz, hidden[chunk], factor[chunk])
        if bias is not None:
            kernels.column_sums(dz, factor[chunk], dbias)
    return dweight.result(scale), dbias if scale is None else dbias.mul_(scale)


def _of(rows: Rows, chunk: slice) -> Rows:
    return Rows(rows.num_classes, rows.bias, rows.target[chunk], None if rows.weight is None else rows.weight[chunk])
