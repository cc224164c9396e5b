"""`linear_cross_entropy` and `linear_log_prob` in Triton: library products per chunk of rows and one kernel per row.

A chunk's logits ``[R, V]`` are float32. The row kernel reads them once and leaves ``dz`` (up to a factor per row) in
their memory for the products with the head and with the hidden states.

Run in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trace_kernels.triton_common import (
    LOWEST,
    Logits,
    addmm_float32,
    column_sums,
    combined,
    dense,
    launch,
    mm_float32,
    online_softmax,
    scaled_rows,
    store_rounded,
    tile,
    transformed,
    zero_row,
)

WARPS = 8
#: The reference that exponentials are taken from may lag this far behind the row's maximum.
LAG = tl.constexpr(40.0)


@triton.jit
def load_logits(logits, bias, columns, inside, softcap, logit_scale, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    z = tl.load(logits + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias + columns, mask=inside, other=0.0)
    x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
    return tl.where(inside, x, -float("inf")), derivative


@triton.jit
def row_kernel(
    logits, dz, bias, target, row_weight, logp, lse, factor,
    num_classes, stride, stride_dz, ignore_index, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr, ONE_READ: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Per row: logp, lse, and with GRADIENT dz with ``factor * dz = d logp / d (W h)``.

    `dz` may lie in the memory of `logits`, a row at the start of a row: barriers order a tile's reads before its
    writes, and no tile is written where a later one is read. With ONE_READ the exponentials are written relative to
    a reference not far below the maximum as soon as they are known, and the row's sum goes into `factor`: dz needs
    the exponent range of float32. Without, a second read makes dz exact and `factor` 1.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    kept = label != ignore_index
    if HAS_WEIGHT:
        kept = kept & (tl.load(row_weight + row) != 0.0)
    logits += row * stride
    dz += row * stride_dz
    columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if kept:
        valid = (label >= 0) & (label < num_classes)
        z = tl.load(logits + label, mask=valid, other=float("nan"))
        if HAS_BIAS:
            z += tl.load(bias + label, mask=valid, other=0.0)
        label_x, label_derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
        total = tl.zeros([LANES], tl.float32)
        if ONE_READ:
            largest = tl.full([], LOWEST, tl.float32)
            for start in range(0, num_classes, LANES * VEC):
                inside = start + columns < num_classes
                x, derivative = load_logits(
                    logits, bias, start + columns, inside, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP
                )
                top = tl.max(tl.max(x, axis=1), axis=0)
                tl.debug_barrier()
                if top > largest + LAG:
                    # Seldom more than once a row: what is written already moves to the new reference.
                    rescale = tl.exp(largest - top)
                    total *= rescale
                    for done in range(0, start, LANES * VEC):
                        old = tl.load(dz + done + columns).to(tl.float32)
                        store_rounded(dz + done + columns, old * rescale, columns >= 0)
                    largest = top
                exponential = tl.exp(x - largest)
                # The label's own term stays out of the sum: 1 - p must not be the difference of two roundings.
                total += tl.sum(tl.where(start + columns == label, 0.0, exponential), axis=1)
                store_rounded(dz + start + columns, exponential * derivative, inside)
            others = tl.sum(total, axis=0)
            exponentials = others + tl.exp(label_x - largest)
            tl.debug_barrier()
            store_rounded(dz + label, -others * label_derivative, valid)
            tl.store(factor + row, tl.where(valid, -logit_scale / exponentials, float("nan")))
        else:
            maximum = tl.full([LANES], LOWEST, tl.float32)
            for start in range(0, num_classes, LANES * VEC):
                inside = start + columns < num_classes
                x, _ = load_logits(logits, bias, start + columns, inside, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP)
                maximum, total = online_softmax(maximum, total, x)
            largest, exponentials = combined(maximum, total)
        log_total = tl.log(exponentials)
        tl.store(logp + row, (label_x - largest) - log_total)
        tl.store(lse + row, largest + log_total)
        if GRADIENT and not ONE_READ:
            for start in range(0, num_classes, LANES * VEC):
                inside = start + columns < num_classes
                x, derivative = load_logits(
                    logits, bias, start + columns, inside, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP
                )
                dx = tl.where(start + columns == label, 1.0, 0.0) - tl.exp((x - largest) - log_total)
                tl.debug_barrier()
                store_rounded(dz + start + columns, dx * derivative * logit_scale, inside)
            tl.store(factor + row, tl.where(valid, 1.0, float("nan")))
    else:
        tl.store(logp + row, 0.0)
        tl.store(lse + row, 0.0)
        if GRADIENT:
            tl.store(factor + row, 0.0)
            zero_row(dz, num_classes, columns, LANES * VEC)


@triton.jit
def weight_gradient_kernel(
    logits, dz, bias, target, lse, row_grad, factor,
    num_classes, stride, stride_dz, ignore_index, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """``dz = d logp / d (W h)`` from the known logsumexp, and ``factor = row_grad``, 0 in dropped rows."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    gradient = tl.load(row_grad + row)
    logits += row * stride
    dz += row * stride_dz
    columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if (label != ignore_index) & (gradient != 0.0):
        normalizer = tl.load(lse + row)
        for start in range(0, num_classes, LANES * VEC):
            inside = start + columns < num_classes
            x, derivative = load_logits(
                logits, bias, start + columns, inside, softcap, logit_scale, HAS_BIAS, HAS_SOFTCAP
            )
            dx = tl.where(start + columns == label, 1.0, 0.0) - tl.exp(x - normalizer)
            tl.debug_barrier()
            store_rounded(dz + start + columns, dx * derivative * logit_scale, inside)
        tl.store(factor + row, tl.where((label >= 0) & (label < num_classes), gradient, float("nan")))
    else:
        tl.store(factor + row, 0.0)
        zero_row(dz, num_classes, columns, LANES * VEC)


def forward(
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
    (T, H), V = hidden.shape, weight.shape[0]
    weight = dense(weight)
    gradient = want_dhidden or want_dweight
    logp = torch.empty(T, dtype=torch.float32, device=hidden.device)
    lse, factor = torch.empty_like(logp), torch.empty_like(logp)
    dhidden = hidden.new_empty(T if want_dhidden else 0, H)
    dweight = torch.zeros(V if want_dweight else 0, H, dtype=torch.float32, device=hidden.device)
    dbias = logp.new_zeros(V if want_dweight else 0)
    chunks = Logits(hidden, V)
    lanes, vector = tile(V, 8, WARPS, vectors_per_thread=1)
    for rows in chunks.slices():
        z, dz = chunks.logits(rows), chunks.dz(rows)
        mm_float32(hidden[rows], weight.T, z)
        weights = None if row_weight is None else row_weight[rows]
        launch(
            row_kernel, (z.shape[0],),
            z, dz, bias, target[rows], weights, logp[rows], lse[rows], factor[rows],
            V, z.stride(0), dz.stride(0), ignore_index, softcap or 0.0, logit_scale,
            num_warps=WARPS, bytes=chunks.bytes(rows, reads=1 + (gradient and not chunks.wide), writes=int(gradient)),
            HAS_BIAS=bias is not None, HAS_WEIGHT=row_weight is not None, HAS_SOFTCAP=softcap is not None,
            GRADIENT=gradient, ONE_READ=gradient and chunks.wide, LANES=lanes, VEC=vector,
        )  # fmt: skip
        if want_dhidden:
            scaled_rows(chunks.times(dz, weight), factor[rows], out=dhidden[rows])
        if want_dweight:
            scale = factor[rows] if weights is None else factor[rows] * weights
            addmm_float32(dweight, dz.T, scaled_rows(hidden[rows], scale))
            if bias is not None:
                column_sums(dz, scale, dbias)
    return logp, lse, dhidden, dweight.to(weight.dtype), dbias


def backward_weight(
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
    (T, H), V = hidden.shape, weight.shape[0]
    weight = dense(weight)
    factor = torch.empty(T, dtype=torch.float32, device=hidden.device)
    dweight = torch.zeros(V, H, dtype=torch.float32, device=hidden.device)
    dbias = factor.new_zeros(V)
    chunks = Logits(hidden, V)
    lanes, vector = tile(V, 8, WARPS, vectors_per_thread=1)
    for rows in chunks.slices():
        z, dz = chunks.logits(rows), chunks.dz(rows)
        mm_float32(hidden[rows], weight.T, z)
        launch(
            weight_gradient_kernel, (z.shape[0],),
            z, dz, bias, target[rows], lse[rows], row_grad[rows], factor[rows],
            V, z.stride(0), dz.stride(0), ignore_index, softcap or 0.0, logit_scale,
            num_warps=WARPS, bytes=chunks.bytes(rows, reads=1, writes=1),
            HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None, LANES=lanes, VEC=vector,
        )  # fmt: skip
        addmm_float32(dweight, dz.T, scaled_rows(hidden[rows], factor[rows]))
        if bias is not None:
            column_sums(dz, factor[rows], dbias)
    return dweight.to(weight.dtype), dbias
