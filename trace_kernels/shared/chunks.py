"""What the linear losses share on a GPU: products, the memory of a chunk of rows, and the head's gradient."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator

import torch

from trace_kernels.runtime.cuda_backend import processors
from trace_kernels.runtime.recording import cdiv, record_product, size_of


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Without torch's TunableOp, which raises for float32 results of 16-bit operands."""
    enabled = torch.cuda.tunable.is_enabled()
    if enabled:
        torch.cuda.tunable.enable(False)
    try:
        yield
    finally:
        if enabled:
            torch.cuda.tunable.enable(True)


def mm_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out = a @ b`` with float32 products, sums and result: the operands' own dtype on the tensor cores."""
    if record_product(a, b, size_of(a, b, out)):
        return
    if a.device.type == "cpu":
        torch.mm(a.float(), b.float(), out=out)
    elif a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        with untuned():
            torch.mm(a, b, out_dtype=torch.float32, out=out)


def addmm_float32(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``out += a @ b`` with a float32 `out`."""
    if record_product(a, b, size_of(a, b, out, out)):
        return
    if a.device.type == "cpu":
        torch.addmm(out, a.float(), b.float(), out=out)
    elif a.dtype == torch.float32:
        torch.addmm(out, a, b, out=out)
    else:
        with untuned():
            torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)


def dense(matrix: torch.Tensor) -> torch.Tensor:
    """What a product reads without a copy; made once, because each chunk multiplies with it."""
    return matrix if 1 in matrix.stride() and 0 not in matrix.stride() else matrix.contiguous()


#: Bytes of what is kept of one chunk's [R, V], unless TRACE_KERNELS_CHUNK_BYTES says otherwise. With 8192 tokens and a
#: head of 151936 x 2048 it is 2048 rows, and .69 GB with the block of logits. The next smaller chunk that cuts the
#: tokens evenly has 1664 rows and .54 GB: by the model of benchmarks.traffic 2.8 % more time with a frozen head, and
#: twice the launches.
CHUNK_BYTES = 640_000_000


def chunk_rows(num_rows: int, bytes_per_row: int, budget: int) -> int:
    """Rows of a chunk of logits: at most 4096, within the byte budget, a multiple of 128 where it allows one.

    Fewer than some 300 rows would make the products read the head faster than the memory delivers it. A multiple of 4
    at the least: chunks of a vector that start on 16 bytes and others are different kernels to Triton.
    """
    text = os.environ.get("TRACE_KERNELS_CHUNK_BYTES", "")
    try:
        budget = int(float(text)) if text else budget
    except ValueError:
        budget = 0
    if budget <= 0:
        raise ValueError(f"TRACE_KERNELS_CHUNK_BYTES: got {text!r}, allowed is a positive number of bytes")
    rows = min(4096, max(1, budget // max(1, bytes_per_row)))
    rows -= rows % (128 if rows >= 128 else min(4, rows))
    if rows >= num_rows:
        return num_rows
    # Even chunks: a last one of a few rows would cost a whole pass over the head.
    even = cdiv(num_rows, cdiv(num_rows, rows))
    return min(rows, cdiv(even, 128) * 128)


#: Bytes of a block of float32 logits. Twice what the L2 cache of a data-centre GPU holds: by the model of
#: benchmarks.traffic reading the block from memory costs 2 % at 8192 tokens and a head of 151936 x 2048, and blocks of
#: half the size would leave the device waiting for the host, which needs some 45 us for a block's two launches.
BLOCK_BYTES = 2**26
#: A block's columns are a multiple of this, the tile of a row.
BLOCK_STEP = 1024
#: Rows and columns of a library product's tile on the tensor cores of an H100, and its multiprocessors.
TILE_ROWS, TILE_COLUMNS, PROCESSORS = 128, 256, 132


def waves(rows: int, columns: int, num_processors: int = PROCESSORS) -> int:
    """How many tiles of a product [rows, columns] the busiest multiprocessor computes."""
    return cdiv(cdiv(rows, TILE_ROWS) * cdiv(columns, TILE_COLUMNS), num_processors)


@functools.cache
def block_columns(rows: int, num_classes: int, most: int, num_processors: int) -> int:
    """Columns of a block, at most `most`: those for which all blocks' products take the fewest waves, and the most.

    A product of 1.4 waves takes as long as one of two.
    """

    def total(columns: int) -> int:
        whole, rest = divmod(num_classes, columns)
        return whole * waves(rows, columns, num_processors) + waves(rows, rest, num_processors)

    choices = range(BLOCK_STEP, max(most, BLOCK_STEP) + 1, BLOCK_STEP)
    return min(choices, key=lambda columns: (total(columns), -columns))


class Chunks:
    """Memory for a chunk of rows: a block of float32 logits, and `dz` [R, V] in the dtype of the hidden states.

    The vocabulary is walked in blocks of columns: few enough bytes, and tiles that fill the device.

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
        budget: int | None = None,
        rows: int | None = None,
        overwrite: bool = False,
        summed: bool = False,
    ) -> None:
        """`buffers` of logits; with `whole` they keep all blocks of a chunk, because `dz` needs them again.

        rows: of a chunk, whatever memory that takes.
        summed: the head's gradient is summed over chunks, which is read and written with each: twice the rows.
        overwrite: with `whole`, `dz` takes the place of the first of two logits.
        """
        self.num_rows, self.width = hidden.shape
        self.num_classes = num_classes
        self.whole = whole
        # Rows start on 256 bytes: wide loads, whatever the vocabulary's size.
        stride = cdiv(num_classes, 64) * 64
        overwrite = overwrite and whole and gradient
        apart = gradient and not overwrite
        row_bytes = stride * ((hidden.element_size() if apart else 0) + (4 * buffers if whole else 0))
        budget = CHUNK_BYTES * (2 if summed else 1) if budget is None else budget
        self.rows = chunk_rows(self.num_rows, row_bytes, budget) if rows is None else min(rows, self.num_rows)
        # Where all logits of a chunk are kept, one product makes them; without `dz` there is room for larger blocks.
        most = BLOCK_BYTES * (1 if gradient else 2) // (4 * max(1, self.rows) * buffers)
        on = processors(hidden.device) if hidden.device.type == "cuda" else PROCESSORS
        columns = stride if whole else block_columns(self.rows, num_classes, min(most, stride + BLOCK_STEP), on)
        self.columns = min(stride, columns)
        columns = stride if self.whole else self.columns

        def matrix(width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty((self.rows, width), dtype=dtype, device=hidden.device)

        self._logits = [matrix(columns, torch.float32) for _ in range(buffers)]
        self._dz = self._logits[0].view(hidden.dtype) if overwrite else matrix(stride if gradient else 0, hidden.dtype)
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

    def state(self, count: int) -> torch.Tensor:
        """Float32 numbers of the rows, [count, R]: each vector starts on 16 bytes, however many rows there are."""
        whole = torch.empty((count, cdiv(self.rows, 4) * 4), dtype=torch.float32, device=self._dz.device)
        return whole[:, : self.rows]

    def times(self, dz: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``dz @ weight`` [R, H] in float32, in memory that the next logits or the next call use again."""
        if self._result is None:
            logits, size = self._logits[-1], self.rows * self.width
            if logits.numel() >= size:  # the chunk is done with them
                self._result = logits.view(-1)[:size].view(self.rows, self.width)
            else:
                self._result = torch.empty((self.rows, self.width), dtype=torch.float32, device=dz.device)
        out = self._result[: dz.shape[0]]
        mm_float32(dz, weight, out)
        return out


#: (rows [R, H], factor [R], out or None) -> factor_t * rows_t, rounded once, and 0 where the factor is 0.
ScaledRows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class WeightGradient:
    """The float32 sum over chunks of ``dz^T (factor * hidden)`` [V, H]."""

    def __init__(self, scaled_rows: ScaledRows, weight: torch.Tensor, wanted: bool = True) -> None:
        self.scaled_rows = scaled_rows
        self.dtype = weight.dtype
        shape = (weight.shape[0] if wanted else 0, weight.shape[1])
        self.total = torch.empty(shape, dtype=torch.float32, device=weight.device)
        self.empty = True

    def add(self, dz: torch.Tensor, hidden: torch.Tensor, factor: torch.Tensor) -> None:
        rows = self.scaled_rows(hidden, factor, None)
        if self.empty:
            mm_float32(dz.T, rows, self.total)
        else:
            addmm_float32(self.total, dz.T, rows)
        self.empty = False

    def result(self, scale: torch.Tensor | None = None) -> torch.Tensor:
        """Times `scale`, in the weight's dtype."""
        if self.empty:
            self.total.zero_()
        total: torch.Tensor = self.total
        if scale is not None:
            total.mul_(scale)
        return total.to(self.dtype)


def split_scale(factor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Factors [T] of rows of `dtype`, and what to multiply the sum of their products with; None is 1.

    A loss scale, or one over the number of tokens, would take float16 rows out of their range.
    """
    if dtype != torch.float16 or not len(factor):
        return factor, None
    largest = factor.abs().amax()
    largest = torch.where(largest == 0, 1, largest)
    return factor / largest, largest
