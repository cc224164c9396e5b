"""Log-probabilities of a head in one Triton product whose epilogue takes the softmax of each tile: no logits in memory.

TRACE_KERNELS_GEMM=fused asks for it, for calls that want no gradient; the default is a library product and a row kernel
(chunked.py). By the model of benchmarks.traffic this moves T * V / 128 pairs of numbers instead of T * V logits, which
is worth 12 % at 8192 tokens and a head of 151936 x 2048 on an H100: it wins where the product itself runs at more
than 0.88 of the library's speed, and loses below. That was not measured.

A gradient by the same scheme (the product again, ``exp(z - lse) W`` in its epilogue) would cost a third pass over the
head where two suffice, 6.5 of 12.9 ms there, to save at most 1.4 ms of row kernels, and a tile's [128, H] sum does not
fit a multiprocessor's registers. So there is none.

Run in Triton's interpreter, where the operands of `tl.dot` are float32, and compiled for sm_80, sm_90 and sm_100: the
product of 16-bit operands was compiled only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trace_kernels.ops.linear_cross_entropy.chunked import Options, Rows
from trace_kernels.runtime.recording import cdiv, size_of
from trace_kernels.shared import losses
from trace_kernels.shared.triton_common import INTERPRETED, LOWEST, launch, transformed

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64
#: Bytes of hidden states that stay in the L2 cache while all of the head passes by.
GROUP_BYTES = 2**24
#: Where the device cannot be asked: an H100's.
PROCESSORS = 132
NO_LABEL = tl.constexpr(losses.NO_LABEL)


@triton.jit
def tile_softmax_kernel(
    hidden, weight, bias, target, maxima, sums, label_x,
    M, V, K, stride_hm, stride_hk, stride_wv, stride_wk, group, softcap, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of each row and each BLOCK_N columns: the largest x, and the sum of ``exp(x - largest)`` without the label's.

    maxima and sums are [tiles, M]; the tile that has a row's label stores its x. Programs walk over the tiles; `group`
    tiles of rows pass by a tile of the head together, so that one of the two is in the cache.
    """
    tiles_m, tiles_v = tl.cdiv(M, BLOCK_M), tl.cdiv(V, BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_v, tl.num_programs(0)):
        band = tile // (group * tiles_v)
        height = tl.minimum(tiles_m - band * group, group)
        inside_band = tile % (group * tiles_v)
        tile_m = band * group + inside_band % height
        tile_v = inside_band // height
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tile_v * BLOCK_N + tl.arange(0, BLOCK_N)
        terms = tl.arange(0, BLOCK_K)
        # Beyond the edge a program computes what it has in part computed before, and leaves it out below.
        from_h = hidden + (rows % M).to(tl.int64)[:, None] * stride_hm + terms[None, :] * stride_hk
        from_w = weight + (columns % V).to(tl.int64)[None, :] * stride_wv + terms[:, None] * stride_wk
        z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            if EVEN_K:
                h, w = tl.load(from_h), tl.load(from_w)
            else:
                h = tl.load(from_h, mask=(start + terms < K)[None, :], other=0.0)
                w = tl.load(from_w, mask=(start + terms < K)[:, None], other=0.0)
            if INTERPRETED:
                h, w = h.to(tl.float32), w.to(tl.float32)
            z = tl.dot(h, w, z, input_precision="ieee")
            from_h += BLOCK_K * stride_hk
            from_w += BLOCK_K * stride_wk
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=columns < V, other=0.0)[None, :]
        x, _ = transformed(z, softcap, logit_scale, HAS_SOFTCAP)
        x = tl.where((columns < V)[None, :], x, -float("inf"))
        label = tl.load(target + rows, mask=rows < M, other=-1)
        is_label = columns[None, :] == label[:, None]
        largest = tl.max(x, axis=1)
        others = tl.sum(tl.where(is_label, 0.0, tl.exp(x - largest[:, None])), axis=1)
        at = tile_v.to(tl.int64) * M + rows
        tl.store(maxima + at, largest, mask=rows < M)
        tl.store(sums + at, others, mask=rows < M)
        has_label = (rows < M) & (label // BLOCK_N == tile_v) & (label >= 0) & (label < V)
        tl.store(label_x + rows, tl.sum(tl.where(is_label, x, 0.0), axis=1), mask=has_label)


@triton.jit
def combine_kernel(
    maxima, sums, label_x, target, row_weight, logp, lse, M, V, tiles, ignore_index,
    HAS_WEIGHT: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Logp and lse of each row from its tiles; 0 in dropped rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < M
    label = tl.load(target + rows, mask=inside, other=0)
    kept = inside & (label != ignore_index)
    if HAS_WEIGHT:
        kept = kept & (tl.load(row_weight + rows, mask=inside, other=0.0) != 0.0)
    largest = tl.full([TILES, ROWS], LOWEST, tl.float32)
    total = tl.zeros([TILES, ROWS], tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        here = (tile < tiles)[:, None] & inside[None, :]
        at = tile.to(tl.int64)[:, None] * M + rows[None, :]
        top = tl.load(maxima + at, mask=here, other=LOWEST)
        larger = tl.maximum(largest, top)
        total = total * tl.exp(largest - larger) + tl.load(sums + at, mask=here, other=0.0) * tl.exp(top - larger)
        largest = larger
    top = tl.max(largest, axis=0)
    rest = tl.sum(total * tl.exp(largest - top[None, :]), axis=0)
    known = (label >= 0) & (label < V)
    x = tl.load(label_x + rows, mask=inside & known, other=0.0)
    x = tl.where(known, x, tl.where(label == NO_LABEL, -float("inf"), float("nan")))
    log_total = tl.log(rest + tl.exp(x - top))
    # The maximum and the logarithm apart: their sum would round away digits of a small loss.
    tl.store(logp + rows, tl.where(kept, (x - top) - log_total, 0.0), mask=inside)
    tl.store(lse + rows, tl.where(kept, top + log_total, 0.0), mask=inside)


def log_prob(
    hidden: torch.Tensor, weight: torch.Tensor, rows: Rows, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logp and lse [T]."""
    (M, K), V = hidden.shape, weight.shape[0]
    tiles_m, tiles_v = cdiv(M, BLOCK_M), cdiv(V, BLOCK_N)
    logp = torch.empty(M, dtype=torch.float32, device=hidden.device)
    lse, label_x = torch.empty_like(logp), torch.empty_like(logp)
    partial = torch.empty((2, tiles_v, M), dtype=torch.float32, device=hidden.device)
    group = max(1, GROUP_BYTES // (BLOCK_M * K * hidden.element_size()))
    bands = cdiv(tiles_m, group)
    ignore_index, *numbers = options.numbers
    launch(
        tile_softmax_kernel, (min(tiles_m * tiles_v, _processors(hidden.device)),),
        hidden, weight, rows.bias, rows.target, *partial, label_x,
        M, V, K, *hidden.stride(), *weight.stride(), group, *numbers,
        num_warps=8, num_stages=3, bytes=size_of(hidden, partial) + bands * size_of(weight), flops=2 * M * K * V,
        HAS_BIAS=rows.bias is not None, HAS_SOFTCAP=options.has_softcap, EVEN_K=K % BLOCK_K == 0,
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    launch(
        combine_kernel, (cdiv(M, 32),),
        *partial, label_x, rows.target, rows.weight, logp, lse, M, V, tiles_v, ignore_index,
        num_warps=4, bytes=size_of(partial, logp, lse, label_x, rows.target),
        HAS_WEIGHT=rows.weight is not None, TILES=16, ROWS=32,
    )  # fmt: skip
    return logp, lse


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS if device.type == "meta" else 3
    return torch.cuda.get_device_properties(device).multi_processor_count
