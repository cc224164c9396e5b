"""The CUDA row kernels of `linear_kl`; chunked.py runs them between the products."""

from __future__ import annotations

import functools

import torch

from trace_kernels.ops.linear_kl import chunked
from trace_kernels.ops.linear_kl.chunked import Pair, RowKernels
from trace_kernels.runtime.cuda_backend import call as run
from trace_kernels.runtime.native import ELEMENTS, address
from trace_kernels.shared.linear import Call
from trace_kernels.shared.rows import scaled_rows


def _pair(logits: Pair, call: Call, first: int) -> tuple[float, ...]:
    policy, reference = logits
    return (
        policy.data_ptr(),
        reference.data_ptr(),
        *policy.shape,
        policy.stride(0),
        first,
        address(call.row_weight),
        *call.numbers,
    )


def _block(
    logits: Pair,
    call: Call,
    state: torch.Tensor,
    top: torch.Tensor,
    outputs: tuple[torch.Tensor, ...],
    first: int,
    last: bool,
) -> None:
    addresses = (row.data_ptr() for row in (*state, top, *outputs))
    run("linear_kl_block_cuda", state.device, *_pair(logits, call, first), *addresses, last)


def _gradient(
    logits: Pair,
    dz: torch.Tensor,
    call: Call,
    first: int,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    pivot: torch.Tensor,
    difference: torch.Tensor,
    factor: torch.Tensor,
    cached: bool,
) -> None:
    addresses = (row.data_ptr() for row in (lse, ref_lse, pivot, difference, factor))
    begin = dz[:, first:].data_ptr()
    run(
        "linear_kl_gradient_cuda", dz.device, *_pair(logits, call, first), begin, ELEMENTS[dz.dtype], dz.stride(0),
        *addresses,
    )  # fmt: skip


KERNELS = RowKernels(_block, _gradient, scaled_rows)
forward = functools.partial(chunked.forward, KERNELS)
backward_weight = functools.partial(chunked.backward_weight, KERNELS)
