"""Matrix products of which the device knows how many rows count.

A library product takes its sizes from the host, which does not know how many tokens a batch drops unless it waits for
the device. These read that number on the device and leave the rest undone, for the backends triton and cuda alike.
TRACE_KERNELS_GEMM=triton asks for them; the default, "library", is better when few tokens are dropped.

Run in Triton's interpreter, where the operands of `tl.dot` are float32, and compiled for sm_80, sm_90 and sm_100: the
product of 16-bit operands was compiled only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trace_kernels.runtime.recording import cdiv, size_of
from trace_kernels.shared.triton_common import INTERPRETED, launch

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64
#: Tiles of neighbouring rows that run together, so that they find each other's columns in the cache.
GROUP = 8


@triton.jit
def matmul_kernel(
    a, b, out, count, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_out,
    COUNT_M: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out (+)= a @ b`` in float32; `count` limits the rows of a with COUNT_M, else the terms of the sum."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + program % (GROUP * tiles_n) % height
    tile_n = program % (GROUP * tiles_n) // height
    limit = tl.load(count)
    depth = K
    if not COUNT_M:
        depth = tl.minimum(K, limit)
    if (not COUNT_M) or tile_m * BLOCK_M < limit:
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        terms = tl.arange(0, BLOCK_K)
        # Beyond the edge a program computes what it has in part computed before, and does not store it.
        from_a = a + (rows % M).to(tl.int64)[:, None] * stride_am
        from_b = b + (columns % N).to(tl.int64)[None, :] * stride_bn
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, depth, BLOCK_K):
            term = start + terms
            x = tl.load(from_a + term.to(tl.int64)[None, :] * stride_ak, mask=(term < depth)[None, :], other=0.0)
            y = tl.load(from_b + term.to(tl.int64)[:, None] * stride_bk, mask=(term < depth)[:, None], other=0.0)
            if INTERPRETED:
                x, y = x.to(tl.float32), y.to(tl.float32)
            total = tl.dot(x, y, total, input_precision="ieee")
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        pointers = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
        if ACCUMULATE:
            total += tl.load(pointers, mask=inside, other=0.0)
        tl.store(pointers, total, mask=inside)


def counted_product(
    a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, count: torch.Tensor, *, rows: bool, accumulate: bool = False
) -> None:
    """``out (+)= a @ b`` with a float32 `out`, of the first `count` rows of a, or terms of the sum without `rows`.

    count: int32, one element, on the device. Rows of `out` from the next multiple of BLOCK_M on keep what they hold.
    """
    (M, K), N = a.shape, b.shape[1]
    launch(
        matmul_kernel, (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),),
        a, b, out, count, M, N, K, *a.stride(), *b.stride(), out.stride(0),
        num_warps=8, num_stages=3, bytes=size_of(a, b, out) + accumulate * size_of(out), flops=2 * M * N * K,
        COUNT_M=rows, ACCUMULATE=accumulate, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP=GROUP,
    )  # fmt: skip
