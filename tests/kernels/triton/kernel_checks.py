"""Checks of single kernels and of paths that only large inputs take; test_kernels.py runs them in the interpreter."""

import json
import os
import sys
import traceback

import blocks
import pytest
import torch
from no_label import no_label_problems

from trace_kernels.ops.linear_cross_entropy import triton as linear
from trace_kernels.ops.linear_kl import triton as kl
from trace_kernels.shared.chunks import Chunks
from trace_kernels.shared.triton_common import scaled_rows

CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


@check
def blocks_and_chunks_of_linear_cross_entropy():
    blocks.linear_cross_entropies(linear)


@check
def a_wrong_chunk_boundary_is_found():
    right = Chunks.slices

    def one_row_short(self):
        for rows in right(self):
            yield slice(rows.start, max(rows.start + 1, rows.stop - 1))

    Chunks.slices = one_row_short
    try:
        with pytest.raises(AssertionError):
            blocks.linear_cross_entropies(linear)
        with pytest.raises(AssertionError):
            blocks.linear_kls(kl)
    finally:
        Chunks.slices = right


@check
def a_label_of_another_slice_has_probability_0():
    with blocks.small_memory(rows=4):
        for dtype in (torch.bfloat16, torch.float16):
            problems = no_label_problems(linear.forward, linear.backward, dtype)
            assert problems == [], problems


@check
def slices_of_linear_kl_add_up():
    blocks.slices_of_linear_kl(kl)


@check
def blocks_and_chunks_of_linear_kl():
    blocks.linear_kls(kl)


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
            blocks.linear_cross_entropy(linear, torch.bfloat16, bias=False, softcap=None)
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
