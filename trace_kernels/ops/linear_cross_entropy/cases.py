"""Inputs of `linear_cross_entropy` for tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from trace_kernels.ops.linear_cross_entropy.op import linear_cross_entropy
from trace_kernels.testing.cases import Case, OpCases, Traffic
from trace_kernels.testing.linear_cases import (
    SMALL,
    benchmark_cases,
    builder,
    compiled,
    eager_penalised,
    eager_reduce,
    sure_cases,
    traffic,
)


def eager(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    nll = eager_penalised(F.linear(hidden, weight, bias), target, ignore_index, **options)
    return eager_reduce(nll, target != ignore_index, token_weight, reduction, normalizer)


def torch_compile(*args: Any, **kwargs: Any) -> torch.Tensor:
    return compiled(eager)(*args, **kwargs)


def torch_chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """The chunked op of torch; it has no token weights, so they multiply its unreduced loss."""
    from torch.nn import LinearCrossEntropyOptions

    plain = token_weight is None and normalizer is None and reduction == "mean"
    loss = F.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        target.reshape(-1),
        linear_bias=bias,
        ignore_index=ignore_index,
        reduction="mean" if plain else "none",
        options=LinearCrossEntropyOptions(),
    )
    if plain:
        return loss
    return eager_reduce(loss.view(target.shape), target != ignore_index, token_weight, reduction, normalizer)


def _traffic(case: Case) -> Traffic:
    return traffic(case, passes=2 if "frozen" in case.name else 3)


OP = OpCases(
    function=linear_cross_entropy,
    cases=(
        *(
            Case(f"{name}_{reduction}", SMALL, builder(reduction=reduction, **settings), dtype)
            for reduction in ("mean", "sum", "none")
            for name, dtype, settings in (
                ("full_fp32", torch.float32, {"bias": True, "softcap": 3.0, "logit_scale": 0.7}),
                ("full_bf16", torch.bfloat16, {"bias": True, "softcap": 3.0, "logit_scale": 0.7}),
                ("fp16", torch.float16, {}),
                ("frozen_fp32", torch.float32, {"frozen": True}),
                ("frozen_bf16", torch.bfloat16, {"frozen": True, "bias": True}),
                ("frozen_hidden", torch.float32, {"frozen_hidden": True}),
                ("weights_need_gradient", torch.float32, {"weights_need_gradient": True}),
            )
        ),
        Case("unweighted", SMALL, builder(weights=None)),
        Case("unweighted_sum", SMALL, builder(weights=None, reduction="sum", bias=True)),
        Case("frozen_weights_need_gradient", SMALL, builder(weights_need_gradient=True, frozen=True), torch.bfloat16),
        Case("expanded_weights", SMALL, builder(weights="expanded", weights_need_gradient=False)),
        Case("normalizer", SMALL, builder(normalizer=7)),
        Case("normalizer_tensor", SMALL, builder(normalizer=torch.tensor(11), weights_need_gradient=True)),
        Case("normalizer_zero", SMALL, builder(normalizer=0.0)),
        Case("weights_cancel", {**SMALL, "T": 36}, builder(weights="cancel", ignored=0.0)),
        Case("all_ignored", SMALL, builder(ignored=1.1, bias=True)),
        Case("all_ignored_none", SMALL, builder(ignored=1.1, reduction="none")),
        Case("none_ignored", SMALL, builder(ignored=-1.0)),
        Case("ignore_index_0", SMALL, builder(ignore_index=0)),
        Case("flat", SMALL, builder(spread=1e-3), torch.bfloat16),
        Case("peaked", SMALL, builder(spread=60.0), torch.bfloat16),
        Case("strided", SMALL, builder(strided=True, bias=True)),
        Case("strided_none_bf16", SMALL, builder(strided=True, reduction="none"), torch.bfloat16),
        Case("batch", {"T": 36, "H": 24, "V": 101}, builder(leading=(3, 3, 4), reduction="none")),
        Case("no_leading_shape", {"T": 1, "H": 24, "V": 101}, builder(leading=(), ignored=0.0)),
        Case("empty", {"T": 0, "H": 24, "V": 101}, builder(bias=True)),
        Case("empty_none", {"T": 0, "H": 24, "V": 101}, builder(reduction="none", leading=(2, 0))),
        Case("one_token", {"T": 1, "H": 24, "V": 101}, builder(weights=None, ignored=0.0)),
        Case("one_class", {"T": 5, "H": 24, "V": 1}, builder(ignored=0.0)),
        Case("width_1", {"T": 37, "H": 1, "V": 101}, builder()),
        *(
            Case(f"penalised_{name}", SMALL, builder(label_smoothing=0.2, z_loss=0.01, bias=True, **settings), dtype)
            for name, dtype, settings in (
                ("fp32", torch.float32, {}),
                ("bf16", torch.bfloat16, {"frozen": True}),
                ("none", torch.float32, {"reduction": "none", "logit_scale": 0.7, "weights_need_gradient": True}),
                ("softcap", torch.float32, {"softcap": 3.0, "weights": None}),
            )
        ),
        Case("smoothed", SMALL, builder(label_smoothing=0.1)),
        Case("z_loss", SMALL, builder(z_loss=0.01, reduction="sum")),
        Case("tiles_fp32", {"T": 300, "H": 200, "V": 2100}, builder(bias=True)),
        Case("tiles_bf16", {"T": 300, "H": 200, "V": 2100}, builder(bias=True), torch.bfloat16),
        Case("tiles_frozen_bf16", {"T": 300, "H": 129, "V": 1033}, builder(frozen=True), torch.bfloat16),
        *sure_cases(builder, reduction="none"),
        *benchmark_cases(builder),
    ),
    traffic=_traffic,
    eager=eager,
    peers={"torch_compile": torch_compile, "torch_chunked": torch_chunked},
)
