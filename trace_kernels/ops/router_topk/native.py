"""Calls of the compiled kernels of `router_topk`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from trace_kernels.ops.router_topk.reference import Outputs
from trace_kernels.ops.router_topk.rule import Rule
from trace_kernels.runtime import native as compiled
from trace_kernels.runtime import validate
from trace_kernels.runtime.native import ELEMENTS, address, native, num_threads

__all__ = ["backward_cpu", "cpu_unavailable", "forward_cpu", "refuse_cpu"]

cpu_unavailable = functools.partial(
    compiled.cpu_unavailable, "router_topk_backward_cpu", "router_topk_cpu", "router_topk_first_wrong"
)


def refuse_cpu(logits: torch.Tensor, rule: Rule, weights_dtype: torch.dtype) -> str | None:
    if not logits.is_cpu:
        return f"logits are on {logits.device}, it serves the cpu only"
    if logits.dtype not in ELEMENTS:
        return "it computes in float32, logits are float64"
    return None if weights_dtype in ELEMENTS else "it computes in float32, weights_dtype is float64"


def forward_cpu(
    logits: torch.Tensor,
    rule: Rule,
    selection_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    given: torch.Tensor | None,
    counts: torch.Tensor | None,
    token_score: torch.Tensor | None,
    weights_dtype: torch.dtype,
    keep: bool,
) -> Outputs:
    if given is not None:
        given = given.contiguous()
        wrong = native().router_topk_first_wrong(given.data_ptr(), *given.shape, logits.shape[1])
        if wrong >= 0:
            raise wrong_expert(given, wrong, logits.shape[1])
    outputs, arguments, _alive = prepared(
        logits, rule, selection_bias, token_mask, table, given, counts, token_score, weights_dtype, keep
    )
    if not_finite := native().router_topk_cpu(*arguments, num_threads()):
        raise validate.not_finite("table", not_finite, logits.shape[1])
    return outputs


def wrong_expert(given: torch.Tensor, position: int, num_experts: int) -> ValueError:
    row, slot = divmod(position, given.shape[1])
    return ValueError(
        f"indices: got {int(given[row, slot])} in row {row}, slot {slot}, allowed are different experts in each row, "
        f"0 to {num_experts - 1}"
    )


def prepared(
    logits: torch.Tensor,
    rule: Rule,
    selection_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    given: torch.Tensor | None,
    counts: torch.Tensor | None,
    token_score: torch.Tensor | None,
    weights_dtype: torch.dtype,
    keep: bool,
) -> tuple[Outputs, tuple[Any, ...], tuple[torch.Tensor | None, ...]]:
    """What a compiled forward kernel fills, its arguments, and tensors that must outlive the call.

    The outputs are weights, indices and chosen scores [T, k], and stats [T, 2]; what is not wanted is empty.
    """
    (T, E), device = logits.shape, logits.device
    # Experts that are given need none.
    bias = None if selection_bias is None or given is not None else selection_bias.float().contiguous()
    table = None if table is None else table.contiguous()
    given = None if given is None else given.contiguous()
    weights = torch.empty(T, rule.k, dtype=weights_dtype, device=device)
    indices = torch.empty(T, rule.k, dtype=torch.int64, device=device)
    chosen = torch.empty(T if keep else 0, rule.k, dtype=torch.float32, device=device)
    stats = torch.empty(T if keep and rule.dense_gradient else 0, 2, dtype=torch.float32, device=device)
    arguments = (
        rule.compiled,
        logits.data_ptr(),
        ELEMENTS[logits.dtype],
        T,
        E,
        *logits.stride(),
        address(bias),
        address(token_mask),
        0 if token_mask is None else token_mask.stride(0),
        address(table),
        address(given),
        weights.data_ptr(),
        ELEMENTS[weights_dtype],
        indices.data_ptr(),
        chosen.data_ptr() if chosen.numel() else 0,
        stats.data_ptr() if stats.numel() else 0,
        address(counts),
        0 if counts is None else counts.stride(0),
        address(token_score),
        0 if token_score is None else token_score.stride(0),
    )
    return (weights, indices, chosen, stats), arguments, (bias, table, given)


def backward_cpu(
    grad_weights: torch.Tensor,
    logits: torch.Tensor | None,
    indices: torch.Tensor,
    chosen: torch.Tensor,
    stats: torch.Tensor,
    rule: Rule,
    num_experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    gradient = torch.empty(indices.shape[0], num_experts, dtype=dtype)
    # Saved tensors may come back from a hook with other strides.
    indices, chosen, stats = indices.contiguous(), chosen.contiguous(), stats.contiguous()
    native().router_topk_backward_cpu(
        rule.compiled,
        grad_weights.data_ptr(),
        ELEMENTS[grad_weights.dtype],
        *grad_weights.stride(),
        address(logits),
        ELEMENTS[dtype],
        *((0, 0) if logits is None else logits.stride()),
        indices.data_ptr(),
        chosen.data_ptr(),
        stats.data_ptr() if stats.numel() else 0,
        indices.shape[0],
        num_experts,
        gradient.data_ptr(),
        num_threads(),
    )
    return gradient
