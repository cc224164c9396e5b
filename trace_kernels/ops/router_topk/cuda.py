"""The calls of the CUDA kernels of `router_topk`."""

from __future__ import annotations

import torch

from trace_kernels.ops.router_topk.native import prepared
from trace_kernels.ops.router_topk.reference import Outputs
from trace_kernels.ops.router_topk.rule import Rule
from trace_kernels.runtime.cuda_backend import call, most_blocks
from trace_kernels.runtime.native import ELEMENTS, address

#: What a warp holds in registers (csrc/ops/router_topk/cuda.cu).
MOST_EXPERTS, MOST_CHOSEN = 1024, 64


def refuse(logits: torch.Tensor, rule: Rule, weights_dtype: torch.dtype) -> str | None:
    E = logits.shape[1]
    if E > MOST_EXPERTS or rule.k > MOST_CHOSEN:
        return f"a warp holds up to {MOST_EXPERTS} experts and {MOST_CHOSEN} chosen, not {E} and {rule.k}"
    return None if weights_dtype in ELEMENTS else "it computes in float32, weights_dtype is float64"


def forward(
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
    outputs, arguments, _alive = prepared(
        logits, rule, selection_bias, token_mask, table, given, counts, token_score, weights_dtype, keep
    )
    call("router_topk_cuda", logits.device, *arguments, most_blocks(logits.device, 4))
    return outputs


def backward(
    grad_weights: torch.Tensor,
    logits: torch.Tensor | None,
    indices: torch.Tensor,
    chosen: torch.Tensor,
    stats: torch.Tensor,
    rule: Rule,
    num_experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient [T, E] of the logits in `dtype`; `logits` are needed where `rule.dense_gradient`."""
    gradient = torch.empty((indices.shape[0], num_experts), dtype=dtype, device=indices.device)
    indices, chosen, stats = indices.contiguous(), chosen.contiguous(), stats.contiguous()
    call(
        "router_topk_backward_cuda",
        indices.device,
        rule.compiled,
        grad_weights.data_ptr(),
        ELEMENTS[grad_weights.dtype],
        *grad_weights.stride(),
        address(logits) if rule.dense_gradient else 0,
        ELEMENTS[dtype],
        *((0, 0) if logits is None else logits.stride()),
        indices.data_ptr(),
        chosen.data_ptr(),
        stats.data_ptr() if stats.numel() else 0,
        indices.shape[0],
        num_experts,
        gradient.data_ptr(),
        most_blocks(indices.device, 8),
    )
    return gradient
