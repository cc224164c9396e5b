"""The CUDA row kernels of `linear_cross_entropy` and `linear_log_prob`; chunked.py runs them between the products."""

from __future__ import annotations

import functools

import torch

from trace_kernels.ops.linear_cross_entropy import chunked
from trace_kernels.ops.linear_cross_entropy.chunked import Options, RowKernels, Rows
from trace_kernels.runtime.cuda_backend import ELEMENTS, call
from trace_kernels.runtime.native import address
from trace_kernels.shared.rows import column_sums, scaled_rows


def _block(
    z: torch.Tensor,
    dz: torch.Tensor,
    rows: Rows,
    state: torch.Tensor,
    first: int,
    options: Options,
    write: bool,
) -> None:
    call(
        "linear_block_cuda", z.device, z.data_ptr(), z.shape[0], z.stride(0),
        dz.data_ptr(), ELEMENTS[dz.dtype], dz.stride(0), write,
        address(rows.bias), rows.target.data_ptr(), address(rows.weight), first, z.shape[1],
        rows.num_classes, *options.numbers, *(part.data_ptr() for part in state),
    )  # fmt: skip


def _finish(
    dz: torch.Tensor,
    rows: Rows,
    state: torch.Tensor,
    logp: torch.Tensor,
    lse: torch.Tensor,
    factor: torch.Tensor,
    options: Options,
    write: bool,
) -> None:
    call(
        "linear_finish_cuda", dz.device, len(logp), dz.data_ptr(), ELEMENTS[dz.dtype], dz.stride(0),
        rows.target.data_ptr(), address(rows.weight), rows.num_classes, *options.numbers,
        *(part.data_ptr() for part in state), logp.data_ptr(), lse.data_ptr(), factor.data_ptr() if write else 0,
    )  # fmt: skip


def _gradient(
    z: torch.Tensor,
    dz: torch.Tensor,
    rows: Rows,
    first: int,
    lse: torch.Tensor,
    factor: torch.Tensor,
    options: Options,
    scale: bool,
    cached: bool,
) -> None:
    call(
        "linear_gradient_cuda", z.device, z.data_ptr(), z.shape[0], z.stride(0),
        dz.data_ptr(), ELEMENTS[dz.dtype], dz.stride(0),
        address(rows.bias), rows.target.data_ptr(), address(rows.weight), first, z.shape[1],
        rows.num_classes, *options.numbers, lse.data_ptr(), factor.data_ptr(), scale,
    )  # fmt: skip


KERNELS = RowKernels(_block, _finish, _gradient, scaled_rows, column_sums)
forward = functools.partial(chunked.forward, KERNELS)
backward_weight = functools.partial(chunked.backward_weight, KERNELS)
