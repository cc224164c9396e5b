"""What the Triton kernels share: launching, recording launches, device functions, matrix products.

Imports Triton, so nothing but the kernels' own modules may import it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from trace_kernels.triton_backend import interpreting

INTERPRETED = tl.constexpr(interpreting())


@dataclass(frozen=True)
class Launch:
    """One launch that a run on meta tensors would have made.

    Attributes:
        kernel: the `triton.jit` function.
        grid: its programs.
        arguments: by parameter name, tensors and numbers, as launched.
        constants: the constexpr parameters.
        num_warps: warps of a program.
        bytes: global memory that it reads and writes.
        cached: how many of these the launch before left in the L2 cache.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    bytes: int
    cached: int


@dataclass(frozen=True)
class Product:
    """One library matrix product of such a run: what it computes and moves at the least."""

    flops: int
    bytes: int


_recorded: list[Launch | Product] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch | Product]]:
    """Collect launches and products instead of running them: for meta tensors, whose results nobody can see."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, bytes: int, cached: int = 0, **constants: Any
) -> None:
    """Run `kernel`, or record it; an empty grid does nothing."""
    if 0 in grid:
        return
    if _recorded is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        arguments = dict(zip(names, args, strict=True))
        _recorded.append(Launch(kernel, grid, arguments, constants, num_warps, bytes, cached))
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        kernel[grid](*args, num_warps=num_warps, **constants)


def size_of(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements of `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def mm_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out = a @ b`` with float32 products, sums and result: the operands' own dtype on the tensor cores."""
    if _recorded is not None:
        _recorded.append(Product(2 * out.numel() * a.shape[1], size_of(a, b, out)))
    elif a.device.type == "cpu":
        torch.mm(a.float(), b.float(), out=out)
    elif a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def addmm_float32(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``out += a @ b`` with a float32 `out`."""
    if _recorded is not None:
        _recorded.append(Product(2 * out.numel() * a.shape[1], size_of(a, b, out, out)))
    elif a.device.type == "cpu":
        torch.addmm(out, a.float(), b.float(), out=out)
    elif a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out)
    else:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)


#: Bytes of what is kept of one chunk's [R, V], unless TRACE_KERNELS_CHUNK_BYTES says otherwise.
CHUNK_BYTES = 640_000_000


def chunk_rows(num_rows: int, bytes_per_row: int, budget: int = CHUNK_BYTES) -> int:
    """Rows of a chunk of logits: at most 4096, within the byte budget, a multiple of 128 where it allows one.

    Fewer than some 300 rows would make the products read the head faster than the memory delivers it.
    """
    text = os.environ.get("TRACE_KERNELS_CHUNK_BYTES", "")
    try:
        budget = int(float(text)) if text else budget
    except ValueError:
        budget = 0
    if budget <= 0:
        raise ValueError(f"TRACE_KERNELS_CHUNK_BYTES: got {text!r}, allowed is a positive number of bytes")
    rows = min(4096, max(1, budget // max(1, bytes_per_row)))
    if rows >= 128:
        rows -= rows % 128
    if rows >= num_rows:
        return num_rows
    # Even chunks: a last one of a few rows would cost a whole pass over the head.
    even = cdiv(num_rows, cdiv(num_rows, rows))
    return min(rows, cdiv(even, 128) * 128)


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
def scaled_rows_kernel(rows, factor, out, width, stride_row, stride_column, stride_out, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(factor + row)
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
    """``factor_t * rows_t`` rounded once, and 0 where the factor is 0; `out` has a dense last dimension."""
    if out is None:
        out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    R, H = rows.shape
    block = min(2048, max(64, next_power_of_2(H)))
    launch(
        scaled_rows_kernel, (R, cdiv(H, block)),
        rows, factor, out, H, *rows.stride(), out.stride(0),
        num_warps=4, bytes=size_of(rows, factor, out), BLOCK=block,
    )  # fmt: skip
    return out


@triton.jit
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


def dense(matrix: torch.Tensor) -> torch.Tensor:
    """What a product reads without a copy; made once, because each chunk multiplies with it."""
    return matrix if 1 in matrix.stride() and 0 not in matrix.stride() else matrix.contiguous()


#: Bytes of a block of float32 logits that the next kernel finds in the L2 cache of a data-centre GPU (40 MB and more).
BLOCK_BYTES = 2**25
#: A block's columns are a multiple of this, the tile of a row.
BLOCK_STEP = 2048


class Chunks:
    """Memory for a chunk of rows: a block of float32 logits, and `dz` [R, V] in the dtype of the hidden states.

    The vocabulary is walked in blocks so small that the row kernel reads a block's logits from the cache.

    Attributes:
        rows: of a chunk, R.
        columns: of a block.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        num_classes: int,
        gradient: bool,
        buffers: int = 1,
        whole: bool = False,
        budget: int = CHUNK_BYTES,
    ) -> None:
        """`buffers` of logits; with `whole` they keep all blocks of a chunk, because `dz` needs them again."""
        self.num_rows, self.width = hidden.shape
        self.num_classes = num_classes
        self.whole = whole
        # Rows start on 256 bytes: wide loads, whatever the vocabulary's size.
        stride = cdiv(num_classes, 64) * 64
        row_bytes = stride * ((hidden.element_size() if gradient else 0) + (4 * buffers if whole else 0))
        self.rows = chunk_rows(self.num_rows, row_bytes, budget)
        per_row = BLOCK_BYTES // (4 * max(1, self.rows) * buffers)
        self.columns = min(stride, max(BLOCK_STEP, per_row // BLOCK_STEP * BLOCK_STEP))
        columns = stride if self.whole else self.columns

        def matrix(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((self.rows, width), dtype=dtype, device=hidden.device)

        self._logits = [matrix(columns, torch.float32) for _ in range(buffers)]
        self._dz = matrix(stride if gradient else 0, hidden.dtype)
        self._result: torch.Tensor | None = None

    def slices(self) -> Iterator[slice]:
        for start in range(0, self.num_rows, max(1, self.rows)):
            yield slice(start, min(start + self.rows, self.num_rows))

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.num_classes, self.columns):
            yield slice(start, min(start + self.columns, self.num_classes))

    def logits(self, rows: slice, block: slice, buffer: int = 0) -> torch.Tensor:
        """[R, columns of the block] float32."""
        start = block.start if self.whole else 0
        return self._logits[buffer][: rows.stop - rows.start, start : start + block.stop - block.start]

    def dz(self, rows: slice) -> torch.Tensor:
        """[R, V], without columns when no gradient is wanted."""
        return self._dz[: rows.stop - rows.start, : self.num_classes]

    def times(self, dz: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``dz @ weight`` [R, H] in float32, in memory that the next call uses again."""
        if self._result is None:
            self._result = torch.empty((self.rows, self.width), dtype=torch.float32, device=dz.device)
        out = self._result[: dz.shape[0]]
        mm_float32(dz, weight, out)
        return out


class WeightGradient:
    """The float32 sum over chunks of ``dz^T (factor * hidden)`` [V, H]."""

    def __init__(self, weight: torch.Tensor, wanted: bool = True) -> None:
        self.dtype = weight.dtype
        shape = (weight.shape[0] if wanted else 0, weight.shape[1])
        self.total = torch.empty(shape, dtype=torch.float32, device=weight.device)
        self.empty = True

    def add(self, dz: torch.Tensor, hidden: torch.Tensor, factor: torch.Tensor) -> None:
        rows = scaled_rows(hidden, factor)
        if self.empty:
            mm_float32(dz.T, rows, self.total)
        else:
            addmm_float32(self.total, dz.T, rows)
        self.empty = False

    def result(self) -> torch.Tensor:
        """In the weight's dtype."""
        if self.empty:
            self.total.zero_()
        total: torch.Tensor = self.total
        return total.to(self.dtype)
