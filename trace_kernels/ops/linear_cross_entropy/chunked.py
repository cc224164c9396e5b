"""The ops on a language-model head on a GPU: library products, and one kernel per row between them.

The logits of a chunk of rows are made in blocks of columns that fit the L2 cache, in float32. A kernel adds each block
to the rows' softmax and leaves ``dz``, up to a factor per row, for the products with the head and the hidden states.
The backends triton and cuda differ in the row kernels only.

The largest class, the pivot, stays out of the rows' sums: where it is nearly certain, what it leaves to the others is
a sum of small numbers instead of a difference of two that are nearly equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trace_kernels.shared.chunks import (
    Chunks,
    ScaledRows,
    WeightGradient,
    dense,
    mm_float32,
    split_scale,
)
from trace_kernels.shared.kept import kept_rows, spread
from trace_kernels.shared.linear import Call, Gradient, Stats


class State(NamedTuple):
    """Of each row of a chunk, kept from one block of columns to the next.

    Attributes:
        numbers: [4, R]: what exponentials are relative to, their sum without the pivot, the pivot's logit, and the sum
            of ``exp(x - reference) (x - reference)``.
        top: [R] int64, the pivot.
        labels: [R, K] raw logits of the targets.
    """

    numbers: torch.Tensor
    top: torch.Tensor
    labels: torch.Tensor

    def rows(self, count: int) -> State:
        return State(self.numbers[:, :count], self.top[:count], self.labels[:count])


@dataclass(frozen=True)
class RowKernels:
    """The kernels of a backend. z is a block of logits [R, columns], float32; dz is [R, V]; targets are [R, K].

    Attributes:
        block: (z, dz, call, state, first, write, entropy): add the columns from `first` on to the rows' states; with
            `write`, leave dz up to a factor.
        finish: (dz, call, state, stats, factor, write, exclude): write the stats of the states. With `write`, the
            factor, and dz at the targets: of d logp, or with `exclude` 0.
        gradient: (z, dz, call, first, lse, gradient, factor, cached): dz of a block; factor is the row's weight, and 0
            where the row is dropped. `cached`: z was just written.
        scaled_rows: see `ScaledRows`.
        column_sums: (rows [R, V], factor [R], sums [V]): sums += the sum of factor_t * rows_t.
    """

    block: Callable[[torch.Tensor, torch.Tensor, Call, State, int, bool, bool], None]
    finish: Callable[[torch.Tensor, Call, State, Stats, torch.Tensor, bool, bool], None]
    gradient: Callable[..., None]
    scaled_rows: ScaledRows
    column_sums: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def forward(
    kernels: RowKernels, call: Call, want_dhidden: bool, want_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logp [T], lse [T], dhidden [T, H], dweight [V, H], dbias [V]; those not wanted are empty."""
    assert call.target is not None
    call = call._replace(target=call.target[:, None])
    found, dweight, dbias = _pass(kernels, call, want_dhidden, want_dweight, entropy=False, exclude=False)
    return found.logp[:, 0], found.lse, found.others, dweight, dbias


def stats(kernels: RowKernels, call: Call, want_others: bool, want_entropy: bool) -> Stats:
    return _pass(kernels, call, want_others, False, want_entropy, exclude=True)[0]


def _pass(
    kernels: RowKernels, call: Call, want_dhidden: bool, want_dweight: bool, entropy: bool, exclude: bool
) -> tuple[Stats, torch.Tensor, torch.Tensor]:
    """Stats, whose `others` are d logp / d hidden unless `exclude`; and dweight and dbias."""
    if (index := kept_rows(call.kept())) is None:
        return _pass_of_all(kernels, call, want_dhidden, want_dweight, entropy, exclude)
    found, dweight, dbias = _pass_of_all(kernels, call.rows(index), want_dhidden, want_dweight, entropy, exclude)
    return Stats(*(spread(values, index, len(call.hidden)) for values in found)), dweight, dbias


def _pass_of_all(
    kernels: RowKernels, call: Call, want_dhidden: bool, want_dweight: bool, entropy: bool, exclude: bool
) -> tuple[Stats, torch.Tensor, torch.Tensor]:
    weight, hidden, target = dense(call.weight), call.hidden, call.target
    assert target is not None
    (T, H), V, K = hidden.shape, call.num_classes, target.shape[1]
    gradient = want_dhidden or want_dweight
    # float16 has no exponents for unnormalised exponentials: its logits are kept until the row's sum is known.
    scaled = gradient and hidden.dtype != torch.float16
    twice = gradient and not scaled
    lse = torch.empty(T, dtype=torch.float32, device=hidden.device)
    factor = torch.empty_like(lse)
    found = Stats(
        lse.new_empty(T, K),
        lse,
        target.new_empty(T if entropy else 0),
        lse.new_empty(T if entropy else 0),
        lse.new_empty(T if entropy else 0),
        lse.new_empty(T if exclude else 0, K),
        hidden.new_empty(T if want_dhidden else 0, H),
    )
    dweight = WeightGradient(kernels.scaled_rows, weight, want_dweight)
    dbias = lse.new_zeros(V if want_dweight else 0)
    chunks = Chunks(hidden, V, gradient, whole=twice, summed=want_dweight)
    numbers = chunks.state(4)
    state = State(numbers, target.new_empty(chunks.rows), numbers.new_empty(chunks.rows, K))
    for chunk in chunks.slices():
        dz, rows, mine = chunks.dz(chunk), call.rows(chunk), state.rows(chunk.stop - chunk.start)
        for block in chunks.blocks():
            z = chunks.logits(chunk, block)
            mm_float32(rows.hidden, weight[block].T, z)
            kernels.block(z, dz, rows, mine, block.start, scaled, entropy)
        part = Stats(*(values[chunk] for values in found))
        kernels.finish(dz, rows, mine, part, factor[chunk], scaled, exclude)
        if twice:
            one = torch.ones_like(part.lse)
            unit = Gradient(one, None, torch.zeros_like(part.logp)) if exclude else of_log_prob(part.logp)
            z, unweighted = chunks.logits(chunk, slice(0, V)), rows
            if rows.row_weight is not None:
                unweighted = rows._replace(row_weight=(rows.row_weight != 0).float())
            kernels.gradient(z, dz, unweighted, 0, part.lse, unit, factor[chunk], False)
        if want_dhidden:
            kernels.scaled_rows(chunks.times(dz, weight), factor[chunk], part.others)
        if want_dweight:
            scale = factor[chunk] if rows.row_weight is None else factor[chunk] * rows.row_weight
            dweight.add(dz, rows.hidden, scale)
            if call.bias is not None:
                kernels.column_sums(dz, scale, dbias)
    return found, dweight.result(), dbias


def of_log_prob(logp: torch.Tensor) -> Gradient:
    """Of log-probabilities [R, 1] themselves."""
    return Gradient(torch.full_like(logp[:, 0], -1), None, -torch.expm1(logp))


def backward(
    kernels: RowKernels, call: Call, lse: torch.Tensor, gradient: Gradient, want_dhidden: bool, want_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dhidden [T, H], dweight [V, H] and dbias [V]; the logits are computed again."""
    if (index := kept_rows(call.kept())) is None:
        return _backward_of_all(kernels, call, lse, gradient, want_dhidden, want_dweight)
    log = None if gradient.log is None else gradient.log[index]
    few = Gradient(gradient.constant[index], log, gradient.targets[index])
    dhidden, dweight, dbias = _backward_of_all(kernels, call.rows(index), lse[index], few, want_dhidden, want_dweight)
    return spread(dhidden, index, len(call.hidden)), dweight, dbias


def _backward_of_all(
    kernels: RowKernels, call: Call, lse: torch.Tensor, gradient: Gradient, want_dhidden: bool, want_dweight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (T, H), V = call.hidden.shape, call.num_classes
    weight, scale, hidden = dense(call.weight), None, call.hidden
    row_weight = call.row_weight
    if row_weight is not None and want_dweight:
        row_weight, scale = split_scale(row_weight, hidden.dtype)
    call = call._replace(row_weight=row_weight)
    factor = torch.empty(T, dtype=torch.float32, device=hidden.device)
    dhidden = hidden.new_empty(T if want_dhidden else 0, H)
    dweight = WeightGradient(kernels.scaled_rows, weight, want_dweight)
    dbias = factor.new_zeros(V if want_dweight else 0)
    chunks = Chunks(hidden, V, gradient=True, summed=want_dweight)
    for chunk in chunks.slices():
        dz, rows = chunks.dz(chunk), call.rows(chunk)
        log = None if gradient.log is None else gradient.log[chunk]
        part = Gradient(gradient.constant[chunk], log, gradient.targets[chunk])
        for block in chunks.blocks():
            z = chunks.logits(chunk, block)
            mm_float32(rows.hidden, weight[block].T, z)
            kernels.gradient(z, dz, rows, block.start, lse[chunk], part, factor[chunk], True)
        if want_dhidden:
            rescaled = factor[chunk] if scale is None else factor[chunk] * scale
            kernels.scaled_rows(chunks.times(dz, weight), rescaled, dhidden[chunk])
        if want_dweight:
            dweight.add(dz, rows.hidden, factor[chunk])
            if call.bias is not None:
                kernels.column_sums(dz, factor[chunk], dbias)
    return dhidden, dweight.result(scale), dbias if scale is None else dbias.mul_(scale)
