"""What the Triton kernels share: launching, recording launches, device functions, matrix products.

Imports Triton, so nothing but the kernels' own modules may import it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from trace_kernels.runtime.recording import cdiv, is_recording, record, size_of
from trace_kernels.runtime.triton_backend import interpreting

INTERPRETED = tl.constexpr(interpreting())


@dataclass(frozen=True)
class Launch:
    """One launch that a run on meta tensors would have made.

    Attributes:
        kernel: the `triton.jit` function.
        grid: its programs.
        arguments: by parameter name, tensors and numbers, as launched.
        constants: the constexpr parameters.
        options: what Triton's compiler is told, by its own names: `num_warps` of a program, and `maxnreg`, the
            registers that a thread may take, where that is not left to it.
        bytes: global memory that it reads and writes.
        cached: how many of these the launch before left in the L2 cache.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]
    bytes: int
    cached: int


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int,
    bytes: int,
    max_registers: int | None = None,
    cached: int = 0,
    **constants: Any,
) -> None:
    """Run `kernel`, or record it; an empty grid does nothing.

    max_registers: that a thread may take; None leaves it to the compiler.
    """
    if 0 in grid:
        return
    options = {"num_warps": num_warps, **({} if max_registers is None else {"maxnreg": max_registers})}
    if is_recording():
        names = [name for name in kernel.arg_names if name not in constants]
        arguments = dict(zip(names, args, strict=True))
        record(Launch(kernel, grid, arguments, constants, options, bytes, cached))
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, **options, **constants)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@triton.jit
def store_rounded(pointer, value, mask):
    """Store float32 `value` in the pointer's type, rounded to nearest: Triton's interpreter truncates to bfloat16."""
    if INTERPRETED and pointer.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def transformed(logit, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    """``x = softcap * tanh(logit_scale * logit / softcap)`` and ``dx / dlogit / logit_scale``."""
    x = logit * logit_scale
    if HAS_SOFTCAP:
        # With r = 1 - tanh|u|, the derivative 1 - tanh^2 = r (2 - r) keeps its digits where tanh nears 1.
        u = x / softcap
        r = 2.0 / (tl.exp(2.0 * tl.abs(u)) + 1.0)
        derivative = r * (2.0 - r)
        x = tl.where(u < 0, (r - 1.0) * softcap, (1.0 - r) * softcap)
        # Comparisons hide a NaN.
        x = tl.where(u == u, x, u)
    else:
        derivative = 1.0
    return x, derivative


@triton.jit
def padded(width):
    """Columns that a row of logits or dz has room for, in a number that the compiler knows to be a multiple of 16.

    Only with it loads and stores are wide where the vocabulary's size is odd. Nobody uses what is read and written
    beyond the width.
    """
    return (width + 15) // 16 * 16


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, with all its digits where x is small: log(1 + x) has none left there."""
    s = x / (2.0 + x)
    t = s * s
    series = 2.0 * s * (1.0 + t * (1.0 / 3.0 + t * (1.0 / 5.0 + t * (1.0 / 7.0))))
    return tl.where(x < 0.125, series, tl.log(1.0 + x))


@triton.jit
def online_softmax(maximum, total, x):
    """Add a tile ``x [LANES, VEC]`` to each lane's running maximum and sum of exponentials."""
    larger = tl.maximum(maximum, tl.max(x, axis=1))
    total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(x - larger[:, None]), axis=1)
    return larger, total


@triton.jit
def combined(maximum, total):
    """The row's maximum and sum of exponentials from those of its lanes."""
    largest = tl.max(maximum, axis=0)
    return largest, tl.sum(total * tl.exp(maximum - largest), axis=0)


#: Where running maxima start: finite, so that a difference of two is never NaN.
LOWEST = tl.constexpr(-1e30)


def tile(num_columns: int, vector: int, num_warps: int = 8, vectors_per_thread: int = 2) -> tuple[int, int]:
    """Lanes and vector length of the tile in which a program walks over a row; short rows get a smaller one."""
    lanes = min(32 * num_warps * vectors_per_thread, next_power_of_2(cdiv(num_columns, vector)))
    return max(32, lanes), vector


@triton.jit
def zero_row(out, num_columns, columns, STEP: tl.constexpr):
    """Write zeros to `num_columns` elements; `columns` is a tile of STEP of them."""
    for start in range(0, num_columns, STEP):
        zeros = tl.zeros(columns.shape, tl.float32).to(out.dtype.element_ty)
        tl.store(out + start + columns, zeros, mask=start + columns < num_columns)


@triton.jit
def scaled_rows_kernel(
    rows, factor, out, width, stride_row, stride_column, stride_factor, stride_out, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(factor + row * stride_factor)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    out += row * stride_out
    if scale != 0.0:
        value = tl.load(rows + row * stride_row + columns.to(tl.int64) * stride_column, mask=inside, other=0.0)
        store_rounded(out + columns, value.to(tl.float32) * scale, inside)
    else:
        # A dropped row may hold anything, also what is not finite.
        tl.store(out + columns, tl.zeros([BLOCK], tl.float32).to(out.dtype.element_ty), mask=inside)


def scaled_rows(rows: torch.Tensor, factor: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``factor_t * rows_t`` rounded once, and 0 where the factor is 0; `out` has a dense last dimension.

    factor: [R] or 0-d, float32.
    """
    if out is None:
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    R, H = rows.shape
    factor = factor.expand(R)
    block = min(2048, max(64, next_power_of_2(H)))
    launch(
        scaled_rows_kernel, (R, cdiv(H, block)),
        rows, factor, out, H, *rows.stride(), factor.stride(0), out.stride(0),
        num_warps=4, bytes=size_of(rows, factor, out), BLOCK=block,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def column_sums_kernel(rows, factor, sums, num_rows, width, stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < width
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, num_rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        scale = tl.load(factor + row, mask=row < num_rows, other=0.0)
        offsets = row.to(tl.int64)[:, None] * stride + columns[None, :]
        value = tl.load(rows + offsets, mask=(scale != 0.0)[:, None] & inside[None, :], other=0.0)
        total += value.to(tl.float32) * scale[:, None]
    tl.store(sums + columns, tl.load(sums + columns, mask=inside, other=0.0) + tl.sum(total, axis=0), mask=inside)


def column_sums(rows: torch.Tensor, factor: torch.Tensor, sums: torch.Tensor) -> None:
    """``sums += sum over t of factor_t * rows_t``, in float32."""
    R, V = rows.shape
    launch(
        column_sums_kernel, (cdiv(V, 128),),
        rows, factor, sums, R, V, rows.stride(0),
        num_warps=4, bytes=size_of(rows, factor, sums, sums), BLOCK_R=16, BLOCK_C=128,
    )  # fmt: skip
