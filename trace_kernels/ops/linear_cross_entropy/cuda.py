"""The CUDA row kernels of the ops on a language-model head; chunked.py runs them between the products."""

from __future__ import annotations

import functools

import torch

from trace_kernels.ops.linear_cross_entropy import chunked
from trace_kernels.ops.linear_cross_entropy.chunked import RowKernels, State
from trace_kernels.runtime.cuda_backend import call as run
from trace_kernels.runtime.native import ELEMENTS, address
from trace_kernels.shared.linear import Call, Gradient, Stats
from trace_kernels.shared.rows import column_sums, scaled_rows


def _rows(call: Call) -> tuple[float, ...]:
    assert call.target is not None
    return (
        address(call.bias),
        call.target.data_ptr(),
        call.target.shape[1],
        address(call.row_weight),
        call.num_classes,
        call.ignore_index,
        *call.numbers,
    )


def _matrix(z: torch.Tensor, dz: torch.Tensor) -> tuple[int, ...]:
    return z.data_ptr(), z.shape[0], z.stride(0), dz.data_ptr(), ELEMENTS[dz.dtype], dz.stride(0)


def _addresses(*tensors: torch.Tensor) -> tuple[int, ...]:
    """0 for what was not asked for."""
    return tuple(tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors)


def _block(z: torch.Tensor, dz: torch.Tensor, call: Call, state: State, first: int, write: bool, entropy: bool) -> None:
    run(
        "linear_block_cuda", z.device, *_matrix(z, dz), *_rows(call), first, z.shape[1],
        *_addresses(*state.numbers, state.top, state.labels), write, entropy,
    )  # fmt: skip


def _finish(
    dz: torch.Tensor, call: Call, state: State, stats: Stats, factor: torch.Tensor, write: bool, exclude: bool
) -> None:
    run(
        "linear_finish_cuda", dz.device, len(stats.lse), dz.data_ptr(), ELEMENTS[dz.dtype], dz.stride(0), *_rows(call),
        *_addresses(*state.numbers, state.top, state.labels), *_addresses(*stats[:6]),
        factor.data_ptr() if write else 0, exclude,
    )  # fmt: skip


def _gradient(
    z: torch.Tensor,
    dz: torch.Tensor,
    call: Call,
    first: int,
    lse: torch.Tensor,
    gradient: Gradient,
    factor: torch.Tensor,
    cached: bool,
) -> None:
    run(
        "linear_gradient_cuda", z.device, *_matrix(z, dz), *_rows(call), first, z.shape[1], lse.data_ptr(),
        gradient.constant.data_ptr(), address(gradient.log), gradient.targets.data_ptr(), factor.data_ptr(),
    )  # fmt: skip


KERNELS = RowKernels(_block, _finish, _gradient, scaled_rows, column_sums)
forward = functools.partial(chunked.forward, KERNELS)
stats = functools.partial(chunked.stats, KERNELS)
backward = functools.partial(chunked.backward, KERNELS)
