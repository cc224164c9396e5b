"""The linear ops of a GPU backend's module where several blocks of columns and chunks of rows make a call.

Without a GPU the kernels run in Triton's interpreter or in emulation.h's; the checks take a device, too.
"""

import contextlib
import os

import torch

from trace_kernels.ops.linear_cross_entropy import reference as linear_reference
from trace_kernels.ops.linear_kl import chunked as kl_chunks
from trace_kernels.ops.linear_kl import reference as kl_reference
from trace_kernels.shared import chunks as chunk_memory

TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def close(got, expected, dtype=None):
    """Within the rounding of `dtype` or the output's, relative to the largest entry."""
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if other.numel():
            scale = other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype or one.dtype] * max(scale, 1e-6))


def inputs(dtype, device="cpu", T=9, H=16, V=4400):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, H, generator=generator).to(dtype)
    weight = torch.randn(V, H, generator=generator).to(dtype)
    # A maximum that grows by more than the reference may lag, twice in a row and in the last block.
    weight[1500] *= 30
    weight[4399] *= 90
    target = torch.randint(V, (T,), generator=generator)
    target[2], target[5], target[6] = -100, 4399, 0
    row_weight = torch.randn(T, generator=generator)
    row_weight[3] = 0
    hidden[2:4] = float("nan")  # rows that do not count may hold anything
    made = hidden, weight, target, row_weight, torch.randn(V, generator=generator)
    return tuple(tensor.to(device) for tensor in made)


@contextlib.contextmanager
def small_memory(rows):
    """Blocks of 2048 columns, and chunks of so many rows of 4400 columns of a 16-bit dz."""
    before = chunk_memory.BLOCK_BYTES
    chunk_memory.BLOCK_BYTES = 1
    os.environ["TRACE_KERNELS_CHUNK_BYTES"] = str(2 * 4416 * rows)
    try:
        yield
    finally:
        chunk_memory.BLOCK_BYTES = before
        del os.environ["TRACE_KERNELS_CHUNK_BYTES"]


def linear_cross_entropy(linear, dtype, bias, softcap, device="cpu"):
    hidden, weight, target, row_weight, offset = inputs(dtype, device)
    offset = offset if bias else None
    arguments = (hidden, weight, offset, target, row_weight, -100, softcap, 0.7, True, True)
    expected = linear_reference.forward(*arguments)
    got = linear.forward(*arguments)
    close(got[:4], expected[:4])
    if bias:  # sums a rounded dz
        close(got[4:], expected[4:], dtype)
    arguments = (hidden, weight, offset, target, expected[1], row_weight, -100, softcap, 0.7)
    got, expected = linear.backward_weight(*arguments), linear_reference.backward_weight(*arguments)
    close(got[:1], expected[:1])
    if bias:
        close(got[1:], expected[1:], dtype)
    arguments = (hidden, weight, offset, target, row_weight, -100, softcap, 0.7, False, False)
    close(linear.forward(*arguments), linear_reference.forward(*arguments))


def linear_kl(kl, dtype, softcap, device="cpu"):
    hidden, weight, _, row_weight, _ = inputs(dtype, device)
    weight[1500] /= 20
    weight[4399] /= 60
    ref_hidden, ref_weight = hidden.flip(1), weight.flip(1) * 0.5
    arguments = (hidden, weight, ref_hidden, ref_weight, row_weight, softcap, 0.7, True, True)
    row_weight[2] = 0
    expected = kl_reference.forward(*arguments)
    close(kl.forward(*arguments), expected)
    # With a gradient one block has all columns.
    close(kl.forward(*arguments[:-2], False, False)[:3], expected[:3])
    arguments = (hidden, weight, ref_hidden, ref_weight, *expected[1:3], row_weight, softcap, 0.7)
    close([kl.backward_weight(*arguments)], [kl_reference.backward_weight(*arguments)])


def linear_cross_entropies(linear, device="cpu"):
    with small_memory(rows=4):
        linear_cross_entropy(linear, torch.bfloat16, True, None, device)
        linear_cross_entropy(linear, torch.float32, False, 30.0, device)
        linear_cross_entropy(linear, torch.float16, False, 30.0, device)


def linear_kls(kl, device="cpu"):
    with small_memory(rows=20):
        linear_kl(kl, torch.bfloat16, None, device)
        linear_kl(kl, torch.float32, 30.0, device)


def slices_of_linear_kl(kl, device="cpu"):
    """Two slices of the vocabulary, each told the sums of the whole one after every chunk of rows."""
    hidden, weight, _, row_weight, _ = inputs(torch.bfloat16, device)
    weight[1500] /= 20
    weight[4399] /= 60
    ref_hidden, ref_weight = hidden.flip(1), weight.flip(1) * 0.5
    row_weight[2] = 0
    options = (row_weight, 30.0, 0.7)
    whole = kl_reference.forward(hidden, weight, ref_hidden, ref_weight, *options, True, False)
    before, kl_chunks.SPLIT_ROWS = kl_chunks.SPLIT_ROWS, 4
    parts, seen = [], []
    try:
        for part in (slice(0, 2500), slice(2500, 4400)):
            start = 0

            def exchange(*rows):
                nonlocal start
                for mine, all_rows in zip(rows, whole[:3], strict=True):
                    mine.copy_(all_rows[start : start + len(mine)])
                start += len(rows[0])

            with small_memory(rows=4):
                slices = (hidden, weight[part], ref_hidden, ref_weight[part])
                parts.append(kl.forward_split(*slices, *options, exchange)[3].float())
            seen.append(start)
    finally:
        kl_chunks.SPLIT_ROWS = before
    assert seen == [9, 9]
    close([sum(parts)], [whole[3].float()], torch.bfloat16)
