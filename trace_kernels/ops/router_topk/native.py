"""Calls of the compiled kernels of `router_topk`."""

from __future__ import annotations

import functools

import torch

from trace_kernels.ops.router_topk.reference import Outputs
from trace_kernels.ops.router_topk.rule import SCORE_FUNCTIONS, Rule
from trace_kernels.runtime import native as compiled
from trace_kernels.runtime import validate
from trace_kernels.runtime.native import address, native, num_threads

__all__ = ["backward_cpu", "cpu_unavailable", "forward_cpu", "refuse_cpu"]

cpu_unavailable = functools.partial(compiled.cpu_unavailable, "router_topk_backward_cpu", "router_topk_cpu")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuse_cpu(
    logits: torch.Tensor,
    rule: Rule,
    selection_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    want_counts: bool,
    weights_dtype: torch.dtype,
    keep: bool,
) -> str | None:
    if not logits.is_cpu:
        return f"logits are on {logits.device}, it serves the cpu only"
    if logits.dtype not in DTYPES:
        return "it computes in float32, logits are float64"
    return None if weights_dtype in DTYPES else "it computes in float32, weights_dtype is float64"


def forward_cpu(
    logits: torch.Tensor,
    rule: Rule,
    selection_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    want_counts: bool,
    weights_dtype: torch.dtype,
    keep: bool,
) -> Outputs:
    outputs, arguments, _alive = prepared(
        logits, rule, selection_bias, token_mask, table, want_counts, weights_dtype, keep
    )
    if not_finite := native().router_topk_cpu(*arguments, num_threads()):
        raise validate.not_finite("table", not_finite, logits.shape[1])
    return outputs


def prepared(
    logits: torch.Tensor,
    rule: Rule,
    selection_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    want_counts: bool,
    weights_dtype: torch.dtype,
    keep: bool,
) -> tuple[Outputs, tuple[float, ...], tuple[torch.Tensor | None, ...]]:
    """What a compiled forward kernel fills, its arguments, and tensors that must outlive the call.

    The outputs are weights, indices and chosen scores [T, k], stats [T, 2], counts [E] and score [T]; what is not
    wanted is empty.
    """
    (T, E), device = logits.shape, logits.device
    bias = None if selection_bias is None else selection_bias.float().contiguous()
    table = None if table is None else table.contiguous()
    weights = torch.empty(T, rule.k, dtype=weights_dtype, device=device)
    indices = torch.empty(T, rule.k, dtype=torch.int64, device=device)
    chosen = torch.empty(T if keep else 0, rule.k, dtype=torch.float32, device=device)
    stats = torch.empty(T if keep and rule.dense_gradient else 0, 2, dtype=torch.float32, device=device)
    counts = torch.zeros(E if want_counts else 0, dtype=torch.int64, device=device)
    score = torch.empty(0 if table is None else T, dtype=torch.float32, device=device)
    arguments = (
        logits.data_ptr(),
        DTYPES[logits.dtype],
        T,
        E,
        *logits.stride(),
        rule.k,
        SCORE_FUNCTIONS.index(rule.score_function),
        rule.renormalize,
        rule.scale,
        rule.eps,
        address(bias),
        rule.num_groups,
        rule.topk_groups,
        rule.group_score == "sum_top2",
        rule.masked_group_value,
        address(token_mask),
        0 if token_mask is None else token_mask.stride(0),
        address(table),
        weights.data_ptr(),
        DTYPES[weights_dtype],
        indices.data_ptr(),
        chosen.data_ptr() if chosen.numel() else 0,
        stats.data_ptr() if stats.numel() else 0,
        counts.data_ptr() if want_counts else 0,
        score.data_ptr() if score.numel() else 0,
    )
    return (weights, indices, chosen, stats, counts, score), arguments, (bias, table)


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
        grad_weights.data_ptr(),
        DTYPES[grad_weights.dtype],
        *grad_weights.stride(),
        address(logits),
        DTYPES[dtype],
        *((0, 0) if logits is None else logits.stride()),
        indices.data_ptr(),
        chosen.data_ptr(),
        stats.data_ptr() if stats.numel() else 0,
        *indices.shape,
        num_experts,
        SCORE_FUNCTIONS.index(rule.score_function),
        rule.renormalize,
        rule.scale,
        rule.eps,
        gradient.data_ptr(),
        num_threads(),
    )
    return gradient
