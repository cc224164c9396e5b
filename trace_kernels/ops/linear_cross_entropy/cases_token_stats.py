"""Inputs of `linear_token_stats` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from trace_kernels.ops.linear_cross_entropy.token_stats import linear_token_stats
from trace_kernels.testing.cases import Case, OpCases, Traffic
from trace_kernels.testing.linear_cases import (
    SMALL,
    benchmark_cases,
    builder,
    compiled,
    eager_logits,
    sure_cases,
    traffic,
)


def _eager(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    logits = eager_logits(F.linear(hidden, weight, bias), softcap, logit_scale)
    ignored = target == ignore_index
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, target.masked_fill(ignored, 0)[..., None])[..., 0]
    entropy = -torch.where(log_p.exp() == 0, 0, log_p.exp() * log_p).sum(-1)
    stats = (logp, entropy, torch.logsumexp(logits, -1))
    hit = (logits.argmax(-1) == target) & ~ignored
    return *(values.masked_fill(ignored, 0) for values in stats), hit


def _torch_compile(*args: Any, **kwargs: Any) -> Any:
    return compiled(_eager)(*args, **kwargs)


def _traffic(case: Case) -> Traffic:
    # A gradient through the entropy needs the logits again, and so does that of a trainable head.
    return traffic(case, passes=4 if "frozen" in case.name else 5)


OP = OpCases(
    function=linear_token_stats,
    cases=(
        *(
            Case(name, SMALL, builder(weights=None, **settings), dtype)
            for name, dtype, settings in (
                ("fp32", torch.float32, {}),
                ("bf16", torch.bfloat16, {}),
                ("fp16", torch.float16, {}),
                ("full_fp32", torch.float32, {"bias": True, "softcap": 3.0, "logit_scale": 0.7}),
                ("full_bf16", torch.bfloat16, {"bias": True, "softcap": 3.0, "logit_scale": 0.7}),
                ("frozen_fp32", torch.float32, {"frozen": True, "bias": True}),
                ("frozen_bf16", torch.bfloat16, {"frozen": True}),
                ("frozen_hidden", torch.float32, {"frozen_hidden": True}),
                ("flat", torch.bfloat16, {"spread": 1e-3}),
                ("peaked", torch.float32, {"spread": 30.0}),
                ("strided", torch.float32, {"strided": True, "bias": True}),
                ("all_ignored", torch.float32, {"ignored": 1.1}),
                ("ignore_index_0", torch.float32, {"ignore_index": 0}),
            )
        ),
        Case("batch", {"T": 36, "H": 24, "V": 101}, builder(weights=None, leading=(3, 3, 4))),
        Case("no_leading_shape", {"T": 1, "H": 24, "V": 101}, builder(weights=None, leading=(), ignored=0.0)),
        Case("empty", {"T": 0, "H": 24, "V": 101}, builder(weights=None)),
        Case("one_class", {"T": 5, "H": 24, "V": 1}, builder(weights=None, ignored=0.0)),
        Case("width_1", {"T": 37, "H": 1, "V": 101}, builder(weights=None)),
        Case("tiles_fp32", {"T": 300, "H": 200, "V": 2100}, builder(weights=None, bias=True)),
        Case("tiles_bf16", {"T": 300, "H": 200, "V": 2100}, builder(weights=None), torch.bfloat16),
        # At an exact tie the entropy's gradient vanishes, and the last bit of a logit decides what is left of it.
        *(case for case in sure_cases(builder) if "tie" not in case.name),
        *benchmark_cases(builder, weights=None),
    ),
    traffic=_traffic,
    eager=_eager,
    peers={"torch_compile": _torch_compile},
)
