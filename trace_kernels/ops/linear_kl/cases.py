"""Inputs of `linear_kl` for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from trace_kernels.ops.linear_kl.op import linear_kl
from trace_kernels.testing.cases import Call, Case, OpCases, Traffic
from trace_kernels.testing.linear_cases import (
    SMALL,
    benchmark_cases,
    builder,
    compiled,
    eager_reduce,
    gappy,
    traffic,
)


def _builder(
    *,
    masked: bool = True,
    ref_width: int | None = None,
    ref_dtype: torch.dtype | None = None,
    same: bool = False,
    strided: bool = False,
    **options: Any,
) -> Callable[[Case, torch.Generator], Call]:
    build_linear = builder(strided=strided, **{"weights": "signed", **options})

    def build(case: Case, generator: torch.Generator) -> Call:
        call = build_linear(case, generator)
        hidden, weight, target, *token_weight = call.args
        width = ref_width or case.sizes["H"]
        ref_hidden = torch.randn(*hidden.shape[:-1], width, generator=generator) * options.get("spread", 1.0)
        ref_weight = torch.randn(case.sizes["V"], width, generator=generator) / width**0.5
        reference = [tensor.to(ref_dtype or case.dtype) for tensor in (ref_hidden, ref_weight)]
        if same:
            reference = [hidden.clone(), weight.clone()]
        if strided:
            reference = [gappy(tensor) for tensor in reference]
        kwargs = {key: value for key, value in call.kwargs.items() if key != "ignore_index"}
        if masked:
            kwargs["mask"] = target != -100
        args = (hidden, weight, *reference, *token_weight)
        # A weight is argument 4 here, 3 there.
        differentiable = tuple(4 if key == 3 else key for key in call.differentiable)
        return Call(args, kwargs, differentiable, constant=(*call.constant, 2, 3))

    return build


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None, logit_scale: float, dtype: torch.dtype
) -> torch.Tensor:
    logits = F.linear(hidden, weight) * logit_scale
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).to(dtype)


def _eager(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    beta: float = 0.0,
) -> torch.Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    log_p = _logits(hidden, weight, softcap, logit_scale, dtype).log_softmax(-1)
    with torch.no_grad():
        log_q = _logits(ref_hidden, ref_weight, softcap, logit_scale, dtype).log_softmax(-1)
    kl = divergence(log_p, log_q, beta)
    counted = torch.ones_like(kl, dtype=torch.bool) if mask is None else mask
    return eager_reduce(kl, counted, token_weight, reduction, normalizer)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    def kl(log_m: torch.Tensor, log_of: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_m, log_of, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    return beta * kl(log_m, log_q) + (1 - beta) * kl(log_m, log_p)


def _torch_compile(*args: Any, **kwargs: Any) -> torch.Tensor:
    return compiled(_eager)(*args, **kwargs)


def _traffic(case: Case) -> Traffic:
    policy = traffic(case, passes=2 if "frozen" in case.name else 3)
    T, H, V = case.sizes["T"], case.sizes["H"], case.sizes["V"]
    return Traffic(bytes=policy.bytes + (T + V) * H * case.dtype.itemsize, flops=policy.flops + 2.0 * T * H * V)


OP = OpCases(
    function=linear_kl,
    cases=(
        *(
            Case(f"{name}_{reduction}", SMALL, _builder(reduction=reduction, **settings), dtype)
            for reduction in ("mean", "sum", "none")
            for name, dtype, settings in (
                ("full_fp32", torch.float32, {"softcap": 3.0, "logit_scale": 0.7}),
                ("full_bf16", torch.bfloat16, {"softcap": 3.0, "logit_scale": 0.7}),
                ("fp16", torch.float16, {}),
                ("frozen_bf16", torch.bfloat16, {"frozen": True}),
                ("frozen_hidden", torch.float32, {"frozen_hidden": True}),
                ("weights_need_gradient", torch.float32, {"weights_need_gradient": True}),
            )
        ),
        Case("unweighted", SMALL, _builder(weights=None)),
        Case("unweighted_sum", SMALL, _builder(weights=None, reduction="sum")),
        Case("unweighted_none", SMALL, _builder(weights=None, reduction="none")),
        Case("unmasked", SMALL, _builder(masked=False)),
        Case("unmasked_unweighted_sum", SMALL, _builder(masked=False, weights=None, reduction="sum")),
        Case("expanded_weights", SMALL, _builder(weights="expanded")),
        Case("normalizer", SMALL, _builder(normalizer=7)),
        Case("normalizer_zero", SMALL, _builder(normalizer=0.0)),
        Case("weights_cancel", {**SMALL, "T": 36}, _builder(weights="cancel", ignored=0.0)),
        Case("all_masked", SMALL, _builder(ignored=1.1)),
        Case("ref_width", SMALL, _builder(ref_width=7)),
        Case("ref_dtype", SMALL, _builder(ref_dtype=torch.bfloat16)),
        Case("same_as_reference", SMALL, _builder(same=True, reduction="none")),
        Case("flat", SMALL, _builder(spread=1e-3), torch.bfloat16),
        Case("peaked", SMALL, _builder(spread=60.0), torch.bfloat16),
        Case("strided", SMALL, _builder(strided=True)),
        Case("batch", {"T": 36, "H": 24, "V": 101}, _builder(leading=(3, 3, 4), reduction="none")),
        Case("no_leading_shape", {"T": 1, "H": 24, "V": 101}, _builder(leading=(), ignored=0.0)),
        Case("empty", {"T": 0, "H": 24, "V": 101}, _builder()),
        Case("one_class", {"T": 5, "H": 24, "V": 1}, _builder(ignored=0.0)),
        Case("width_1", {"T": 37, "H": 1, "V": 101}, _builder()),
        Case("tiles_fp32", {"T": 300, "H": 200, "V": 2100}, _builder()),
        Case("tiles_bf16", {"T": 300, "H": 200, "V": 2100}, _builder(frozen=True), torch.bfloat16),
        *(
            Case(f"beta_{beta}_{name}", sizes, _builder(beta=beta, **settings), dtype)
            for beta in (0.1, 0.5, 1.0)
            for name, sizes, dtype, settings in (
                ("full_fp32", SMALL, torch.float32, {"softcap": 3.0, "logit_scale": 0.7}),
                ("full_bf16", SMALL, torch.bfloat16, {"softcap": 3.0, "logit_scale": 0.7, "reduction": "none"}),
                ("fp16", SMALL, torch.float16, {"reduction": "sum"}),
                ("frozen", SMALL, torch.bfloat16, {"frozen": True, "ref_width": 7}),
                ("weights_need_gradient", SMALL, torch.float32, {"weights_need_gradient": True}),
                ("peaked", SMALL, torch.float32, {"spread": 60.0, "reduction": "none"}),
                ("same", SMALL, torch.float32, {"same": True, "reduction": "none"}),
                ("all_masked", SMALL, torch.float32, {"ignored": 1.1}),
                ("strided", SMALL, torch.float32, {"strided": True, "leading": (37,)}),
                ("empty", {"T": 0, "H": 24, "V": 101}, torch.float32, {}),
                ("one_class", {"T": 5, "H": 24, "V": 1}, torch.float32, {"ignored": 0.0}),
                ("tiles", {"T": 300, "H": 200, "V": 2100}, torch.bfloat16, {}),
            )
        ),
        *benchmark_cases(_builder),
    ),
    traffic=_traffic,
    eager=_eager,
    peers={"torch_compile": _torch_compile},
)
