"""`linear_kl` in Triton: library products per chunk of rows and one kernel per row, for ``KL(reference || policy)``.

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


@triton.jit
def load_pair(policy, reference, columns, inside, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    z = tl.load(policy + columns, mask=inside, other=0.0)
    x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
    z = tl.load(reference + columns, mask=inside, other=0.0)
    y, _ = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
    return tl.where(inside, x, -float("inf")), tl.where(inside, y, -float("inf")), derivative


@triton.jit
def row_kernel(
    policy, reference, dz, row_weight, kl, lse, ref_lse, factor,
    num_classes, stride, stride_dz, softcap, logit_scale,
    HAS_WEIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, KNOWN_LSE: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Per row: kl, both logsumexps, and with GRADIENT ``dz = d kl / d (W h)`` in the memory of `policy`.

    With KNOWN_LSE the logsumexps are read and kl is not touched. `factor` becomes the row's weight, 0 if dropped.
    """
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHT:
        weight = tl.load(row_weight + row)
    policy += row * stride
    reference += row * stride
    dz += row * stride_dz
    columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if weight != 0.0:
        if KNOWN_LSE:
            normalizer = tl.load(lse + row)
            ref_normalizer = tl.load(ref_lse + row)
        else:
            maximum = tl.full([LANES], LOWEST, tl.float32)
            ref_maximum = tl.full([LANES], LOWEST, tl.float32)
            total = tl.zeros([LANES], tl.float32)
            ref_total = tl.zeros([LANES], tl.float32)
            gap = tl.zeros([LANES], tl.float32)  # sum of exp(y - ref_maximum) * (y - x)
            for start in range(0, num_classes, LANES * VEC):
                inside = start + columns < num_classes
                x, y, _ = load_pair(policy, reference, start + columns, inside, softcap, logit_scale, HAS_SOFTCAP)
                maximum, total = online_softmax(maximum, total, x)
                larger = tl.maximum(ref_maximum, tl.max(y, axis=1))
                rescale = tl.exp(ref_maximum - larger)
                exponential = tl.exp(y - larger[:, None])
                ref_total = ref_total * rescale + tl.sum(exponential, axis=1)
                # What the reference excludes adds nothing, also where the policy excludes it too.
                gap = gap * rescale + tl.sum(tl.where(exponential == 0.0, 0.0, exponential * (y - x)), axis=1)
                ref_maximum = larger
            largest, exponentials = combined(maximum, total)
            ref_largest, ref_exponentials = combined(ref_maximum, ref_total)
            gap_sum = tl.sum(gap * tl.exp(ref_maximum - ref_largest), axis=0)
            normalizer = largest + tl.log(exponentials)
            ref_normalizer = ref_largest + tl.log(ref_exponentials)
            shift = (largest - ref_largest) + tl.log(exponentials / ref_exponentials)
            tl.store(kl + row, gap_sum / ref_exponentials + shift)
            tl.store(lse + row, normalizer)
            tl.store(ref_lse + row, ref_normalizer)
        if GRADIENT:
            for start in range(0, num_classes, LANES * VEC):
                inside = start + columns < num_classes
                x, y, derivative = load_pair(
                    policy, reference, start + columns, inside, softcap, logit_scale, HAS_SOFTCAP
                )
                dx = tl.exp(x - normalizer) - tl.exp(y - ref_normalizer)
                tl.debug_barrier()
                store_rounded(dz + start + columns, dx * derivative * logit_scale, inside)
            tl.store(factor + row, weight)
    else:
        if not KNOWN_LSE:
            tl.store(kl + row, 0.0)
            tl.store(lse + row, 0.0)
            tl.store(ref_lse + row, 0.0)
        if GRADIENT:
            tl.store(factor + row, 0.0)
            zero_row(dz, num_classes, columns, LANES * VEC)


def _chunk(
    chunks: Logits,
    rows: slice,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    row_weight: torch.Tensor | None,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    softcap: float | None,
    logit_scale: float,
    gradient: bool,
    known_lse: bool,
) -> torch.Tensor:
    """Both products and the row kernel on one chunk; dz."""
    hidden, weight, ref_hidden, ref_weight = heads
    policy, reference, dz = chunks.logits(rows, 0), chunks.logits(rows, 1), chunks.dz(rows)
    mm_float32(hidden[rows], weight.T, policy)
    mm_float32(ref_hidden[rows], ref_weight.T, reference)
    lanes, vector = tile(weight.shape[0], 8, WARPS, vectors_per_thread=1)
    launch(
        row_kernel, (policy.shape[0],),
        policy, reference, dz, None if row_weight is None else row_weight[rows],
        *(output[rows] for output in outputs),
        weight.shape[0], policy.stride(0), dz.stride(0), softcap or 0.0, logit_scale,
        num_warps=WARPS, bytes=chunks.bytes(rows, reads=2 * ((not known_lse) + gradient), writes=int(gradient)),
        HAS_WEIGHT=row_weight is not None, HAS_SOFTCAP=softcap is not None, GRADIENT=gradient, KNOWN_LSE=known_lse,
        LANES=lanes, VEC=vector,
    )  # fmt: skip
    return dz


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
    heads = (hidden, dense(weight), ref_hidden, dense(ref_weight))
    gradient = want_dhidden or want_dweight
    kl = torch.empty(T, dtype=torch.float32, device=hidden.device)
    lse, ref_lse, factor = torch.empty_like(kl), torch.empty_like(kl), torch.empty_like(kl)
    dhidden = hidden.new_empty(T if want_dhidden else 0, H)
    dweight = torch.zeros(V if want_dweight else 0, H, dtype=torch.float32, device=hidden.device)
    chunks = Logits(hidden, V, buffers=2)
    outputs = (kl, lse, ref_lse, factor)
    for rows in chunks.slices():
        dz = _chunk(chunks, rows, heads, row_weight, outputs, softcap, logit_scale, gradient, known_lse=False)
        if want_dhidden:
            kept = torch.ones_like(kl[rows]) if row_weight is None else (row_weight[rows] != 0).float()
            scaled_rows(chunks.times(dz, heads[1]), kept, out=dhidden[rows])
        if want_dweight:
            addmm_float32(dweight, dz.T, scaled_rows(hidden[rows], factor[rows]))
    return kl, lse, ref_lse, dhidden, dweight.to(weight.dtype)


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
    T, H = hidden.shape
    heads = (hidden, dense(weight), ref_hidden, dense(ref_weight))
    factor = torch.empty(T, dtype=torch.float32, device=hidden.device)
    dweight = torch.zeros(weight.shape[0], H, dtype=torch.float32, device=hidden.device)
    chunks = Logits(hidden, weight.shape[0], buffers=2)
    outputs = (factor, lse, ref_lse, factor)
    for rows in chunks.slices():
        dz = _chunk(chunks, rows, heads, row_grad, outputs, softcap, logit_scale, gradient=True, known_lse=True)
        addmm_float32(dweight, dz.T, scaled_rows(hidden[rows], factor[rows]))
    return dweight.to(weight.dtype)
