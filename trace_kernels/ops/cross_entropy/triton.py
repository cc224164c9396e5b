"""`cross_entropy` in Triton: one read of the logits forward, one read and one write backward, in place on request.

Run in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trace_kernels.ops.cross_entropy.rows import LogitGradient, Rows
from trace_kernels.runtime.recording import cdiv, size_of
from trace_kernels.shared.linear import unit_stride
from trace_kernels.shared.triton_common import (
    LOWEST,
    combined,
    launch,
    log1p,
    next_power_of_2,
    online_softmax,
    store_rounded,
    tile,
    transformed,
)

WARPS = 8


@triton.jit
def forward_kernel(
    logits, target, logp, lse, num_classes, stride, ignore_index, softcap, logit_scale,
    HAS_SOFTCAP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The label's own term stays out of the sum: where it is nearly certain, what it leaves is all that counts."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    if label == ignore_index:
        tl.store(logp + row, 0.0)
        tl.store(lse + row, 0.0)
    else:
        # Lanes of VEC neighbours: a lane's maximum needs no other thread, and an element one exponential.
        columns = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
        maximum = tl.full([LANES], LOWEST, tl.float32)
        total = tl.zeros([LANES], tl.float32)
        for start in range(0, num_classes, LANES * VEC):
            inside = start + columns < num_classes
            z = tl.load(logits + row * stride + start + columns, mask=inside, other=0.0).to(tl.float32)
            x, _ = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
            other = inside & (start + columns != label)
            maximum, total = online_softmax(maximum, total, tl.where(other, x, -float("inf")))
        largest, others = combined(maximum, total)
        valid = (label >= 0) & (label < num_classes)
        z = tl.load(logits + row * stride + label, mask=valid, other=float("nan")).to(tl.float32)
        x, _ = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
        ahead = (x > largest) & (x < float("inf"))
        loss = log1p(others * tl.exp(tl.where(ahead, largest - x, 0.0)))
        log_sum = tl.log(others + tl.exp(tl.where(ahead, 0.0, x - largest)))
        # log and maximum apart: their sum would round away digits of a small loss.
        tl.store(logp + row, tl.where(ahead, -loss, (x - largest) - log_sum))
        tl.store(lse + row, tl.where(ahead, x + loss, largest + log_sum))


@triton.jit
def backward_kernel(
    logits, target, lse, constant, uniform, at_label, dlogits, num_classes, stride, stride_out, blocks,
    ignore_index, softcap, logit_scale,
    HAS_UNIFORM: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_classes
    label = tl.load(target + row)
    scale = tl.load(constant + row)
    own = tl.load(at_label + row)
    offset = 0.0
    if HAS_UNIFORM:
        offset = tl.load(uniform + row)
    out = dlogits + row * stride_out + columns
    if (label == ignore_index) | ((scale == 0.0) & (own == 0.0) & (offset == 0.0)):
        tl.store(out, tl.zeros([BLOCK], tl.float32).to(dlogits.dtype.element_ty), mask=inside)
    else:
        scale = tl.where((label >= 0) & (label < num_classes), scale, float("nan"))
        z = tl.load(logits + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        x, derivative = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
        dx = tl.where(columns == label, own, tl.exp(x - tl.load(lse + row)) * scale + offset)
        store_rounded(out, dx * derivative * logit_scale, inside)


def forward(logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Logp [T] and lse [T]."""
    logits = unit_stride(logits)
    T, V = logits.shape
    logp = torch.empty(T, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(logp)
    lanes, vector = tile(V, 16 // logits.element_size(), WARPS)
    launch(
        forward_kernel, (T,),
        logits, rows.target, logp, lse, V, logits.stride(0), *rows.numbers,
        num_warps=WARPS, bytes=size_of(logits, rows.target, logp, lse),
        HAS_SOFTCAP=rows.softcap is not None, LANES=lanes, VEC=vector,
    )  # fmt: skip
    return logp, lse


def backward(
    logits: torch.Tensor, rows: Rows, lse: torch.Tensor, gradient: LogitGradient, inplace: bool
) -> torch.Tensor:
    """The gradient [T, V] of `logits`, in their own memory when `inplace`."""
    T, V = logits.shape
    source = unit_stride(logits)
    dlogits = source if inplace else torch.empty((T, V), dtype=logits.dtype, device=logits.device)
    block = min(16 // logits.element_size() * 32 * WARPS * 2, max(256, next_power_of_2(V)))
    blocks = cdiv(V, block)
    launch(
        backward_kernel, (T * blocks,),
        source, rows.target, lse, *gradient, dlogits, V, source.stride(0), dlogits.stride(0), blocks, *rows.numbers,
        num_warps=WARPS, bytes=size_of(source, rows.target, lse, *gradient, dlogits),
        HAS_UNIFORM=gradient.uniform is not None, HAS_SOFTCAP=rows.softcap is not None, BLOCK=block,
    )  # fmt: skip
    return logits.copy_(dlogits) if inplace and source is not logits else dlogits
