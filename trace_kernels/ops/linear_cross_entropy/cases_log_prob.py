"""Inputs of `linear_log_prob` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch

from trace_kernels.ops.linear_cross_entropy.log_prob import linear_log_prob
from trace_kernels.testing.cases import Case, OpCases, Traffic
from trace_kernels.testing.linear_cases import (
    SMALL,
    benchmark_cases,
    builder,
    compiled,
    eager_log_prob,
    sure_cases,
    traffic,
)


def _torch_compile(*args: Any, **kwargs: Any) -> torch.Tensor:
    return compiled(eager_log_prob)(*args, **kwargs)


def _traffic(case: Case) -> Traffic:
    # With a trainable head the logits are needed twice: the gradient from above is known only after the forward.
    return traffic(case, passes=2 if "frozen" in case.name else 4)


OP = OpCases(
    function=linear_log_prob,
    cases=(
        Case("fp32", SMALL, builder(weights=None)),
        Case("bf16", SMALL, builder(weights=None), torch.bfloat16),
        Case("fp16", SMALL, builder(weights=None), torch.float16),
        Case("full_fp32", SMALL, builder(weights=None, bias=True, softcap=3.0, logit_scale=0.7)),
        Case("full_bf16", SMALL, builder(weights=None, bias=True, softcap=3.0, logit_scale=0.7), torch.bfloat16),
        Case("frozen_fp32", SMALL, builder(weights=None, frozen=True, bias=True)),
        Case("frozen_bf16", SMALL, builder(weights=None, frozen=True), torch.bfloat16),
        Case("frozen_hidden", SMALL, builder(weights=None, frozen_hidden=True)),
        Case("flat", SMALL, builder(weights=None, spread=1e-3), torch.bfloat16),
        Case("peaked", SMALL, builder(weights=None, spread=60.0), torch.bfloat16),
        Case("strided", SMALL, builder(weights=None, strided=True, bias=True)),
        Case("batch", {"T": 36, "H": 24, "V": 101}, builder(weights=None, leading=(3, 3, 4))),
        Case("no_leading_shape", {"T": 1, "H": 24, "V": 101}, builder(weights=None, leading=(), ignored=0.0)),
        Case("all_ignored", SMALL, builder(weights=None, ignored=1.1)),
        Case("ignore_index_0", SMALL, builder(weights=None, ignore_index=0)),
        Case("empty", {"T": 0, "H": 24, "V": 101}, builder(weights=None)),
        Case("one_class", {"T": 5, "H": 24, "V": 1}, builder(weights=None, ignored=0.0)),
        Case("width_1", {"T": 37, "H": 1, "V": 101}, builder(weights=None)),
        *(
            Case(f"several_{name}", SMALL, builder(weights=None, several=4, **settings), dtype)
            for name, dtype, settings in (
                ("full_fp32", torch.float32, {"bias": True, "softcap": 3.0, "logit_scale": 0.7}),
                ("bf16", torch.bfloat16, {"bias": True}),
                ("fp16", torch.float16, {}),
                ("frozen_bf16", torch.bfloat16, {"frozen": True}),
                ("frozen_hidden", torch.float32, {"frozen_hidden": True}),
                ("ignored", torch.float32, {"ignored": 1.1}),
                ("peaked", torch.float32, {"spread": 30.0}),
                ("strided", torch.float32, {"strided": True}),
            )
        ),
        Case("several_of_one", SMALL, builder(weights=None, several=1)),
        Case("several_batch", {"T": 36, "H": 24, "V": 101}, builder(weights=None, several=3, leading=(3, 3, 4))),
        Case("several_tiles_fp32", {"T": 300, "H": 200, "V": 2100}, builder(weights=None, several=5, bias=True)),
        Case("tiles_fp32", {"T": 300, "H": 200, "V": 2100}, builder(weights=None, bias=True)),
        Case("tiles_bf16", {"T": 300, "H": 200, "V": 2100}, builder(weights=None), torch.bfloat16),
        *sure_cases(builder),
        *benchmark_cases(builder, weights=None),
    ),
    traffic=_traffic,
    eager=eager_log_prob,
    peers={"torch_compile": _torch_compile},
)
