"""The CUDA row kernels of `linear_kl`; chunked.py runs them between the products."""

from __future__ import annotations

import functools

import torch

from trace_kernels.ops.linear_kl import chunked
from trace_kernels.ops.linear_kl.chunked import Options, Pair, RowKernels
from trace_kernels.runtime.cuda_backend import ELEMENTS, call
from trace_kernels.runtime.native import address
from trace_kernels.shared.rows import scaled_rows


def _pair(logits: Pair, weights: torch.Tensor | None, options: Options) -> tuple[float, ...]:
    policy, reference = logits
    return (
        policy.data_ptr(),
        reference.data_ptr(),
        *policy.shape,
        policy.stride(0),
        address(weights),
        *options.numbers,
    )


def _block(
    logits: Pair,
    weights: torch.Tensor | None,
    state: torch.Tensor,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    first: bool,
    last: bool,
    options: Options,
) -> None:
    addresses = (row.data_ptr() for row in (*state, *outputs))
    call("linear_kl_block_cuda", state.device, *_pair(logits, weights, options), *addresses, first, last)


def _gradient(
    logits: Pair,
    dz: torch.Tensor,
    first: int,
    weights: torch.Tensor | None,
    lse: torch.Tensor,
    ref_lse: torch.Tensor,
    factor: torch.Tensor,
    options: Options,
    cached: bool,
) -> None:
    call(
        "linear_kl_gradient_cuda",
        dz.device,
        *_pair(logits, weights, options),
        dz[:, first:].data_ptr(),
        ELEMENTS[dz.dtype],
        dz.stride(0),
        lse.data_ptr(),
        ref_lse.data_ptr(),
        factor.data_ptr(),
    )


KERNELS = RowKernels(_block, _gradient, scaled_rows)
forward = functools.partial(chunked.forward, KERNELS)
backward_weight = functools.partial(chunked.backward_weight, KERNELS)
forward_split = functools.partial(chunked.forward_split, KERNELS)
