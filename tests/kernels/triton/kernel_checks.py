"""Checks of single kernels and of paths that only large inputs take; test_kernels.py runs them in the interpreter."""

import contextlib
import json
import os
import sys
import traceback

import pytest
import torch
from no_label import no_label_problems

from trace_kernels.ops.linear_cross_entropy import reference as linear_reference
from trace_kernels.ops.linear_cross_entropy import triton as linear
from trace_kernels.ops.linear_kl import chunked as kl_chunks
from trace_kernels.ops.linear_kl import reference as kl_reference
from trace_kernels.ops.linear_kl import triton as kl
from trace_kernels.shared import chunks as chunk_memory
from trace_kernels.shared.triton_common import scaled_rows

CHECKS = {}
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def check(function):
    CHECKS[function.__name__] = function
    return function


def close(got, expected, dtype=None):
    """Within the rounding of `dtype` or the output's, relative to the largest entry."""
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if other.numel():
            scale = other.abs().max().item()
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE[dtype or one.dtype] * max(scale, 1e-6))


def inputs(dtype, T=9, H=16, V=4400):
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
    return hidden, weight, target, row_weight, torch.randn(V, generator=generator)


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


def linear_cross_entropy(dtype, bias, softcap, linear=linear):
    hidden, weight, target, row_weight, offset = inputs(dtype)
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


def linear_kl(dtype, softcap, kl=kl):
    hidden, weight, _, row_weight, _ = inputs(dtype)
    weight[1500] /= 20
    weight[4399] /= 60
    ref_hidden, ref_weight = hidden.flip(1), weight.flip(1) * 0.5
    arguments = (hidden, weight, ref_hidden, ref_weight, row_weight, softcap, 0.7, True, True)
    row_weight[2] = 0
    expected = kl_reference.forward(*arguments)
    close(kl.forward(*arguments), expected)
    arguments = (hidden, weight, ref_hidden, ref_weight, *expected[1:3], row_weight, softcap, 0.7)
    close([kl.backward_weight(*arguments)], [kl_reference.backward_weight(*arguments)])


@check
def blocks_and_chunks_of_linear_cross_entropy():
    with small_memory(rows=4):
        linear_cross_entropy(torch.bfloat16, bias=True, softcap=None)
        linear_cross_entropy(torch.float32, bias=False, softcap=30.0)
        linear_cross_entropy(torch.float16, bias=False, softcap=30.0)


@check
def a_label_of_another_slice_has_probability_0():
    with small_memory(rows=4):
        for dtype in (torch.bfloat16, torch.float16):
            problems = no_label_problems(linear.forward, linear.backward_weight, dtype)
            assert problems == [], problems


@check
def slices_of_linear_kl_add_up():
    """Two slices of the vocabulary, each told the sums of the whole one after every chunk of rows."""
    hidden, weight, _, row_weight, _ = inputs(torch.bfloat16)
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


@check
def blocks_and_chunks_of_linear_kl():
    with small_memory(rows=20):
        linear_kl(torch.bfloat16, None)
        linear_kl(torch.float32, 30.0)


@check
def scaled_rows_round_once_and_drop_rows_of_factor_0():
    rows = torch.randn(5, 3000).bfloat16()
    rows[3] = float("inf")
    factor = torch.tensor([0.3, -2.0, 1.0, 0.0, 7.0])
    expected = torch.where(factor[:, None] == 0, 0, rows.float() * factor[:, None]).bfloat16()
    assert torch.equal(scaled_rows(rows, factor), expected)
    assert torch.equal(scaled_rows(rows[:2], torch.tensor(0.3)), (rows[:2].float() * 0.3).bfloat16())


@check
def a_wrong_setting_is_an_error():
    os.environ["TRACE_KERNELS_CHUNK_BYTES"] = "many"
    try:
        with pytest.raises(ValueError, match="TRACE_KERNELS_CHUNK_BYTES: got 'many'"):
            linear_cross_entropy(torch.bfloat16, bias=False, softcap=None)
    finally:
        del os.environ["TRACE_KERNELS_CHUNK_BYTES"]


def main():
    torch.manual_seed(0)
    for name in sys.argv[1:] or CHECKS:
        try:
            CHECKS[name]()
            problem = None
        except Exception:
            problem = traceback.format_exc()
        print(json.dumps([name, problem]), flush=True)


if __name__ == "__main__":
    main()
