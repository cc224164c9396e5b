"""Inputs of `cross_entropy` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from trace_kernels.ops.cross_entropy.op import cross_entropy
from trace_kernels.testing import linear_cases as linear
from trace_kernels.testing.cases import Call, Case, OpCases, Traffic

SMALL = {"T": 37, "V": 101}


def _builder(
    *, weights_need_gradient: bool = False, apart: bool = False, **options: Any
) -> Callable[[Case, torch.Generator], Call]:
    build_linear = linear.builder(weights_need_gradient=weights_need_gradient, **options)

    def build(case: Case, generator: torch.Generator) -> Call:
        """The linear op's inputs, with logits in the place of its hidden states and head."""
        call = build_linear(Case(case.name, {**case.sizes, "H": 1}, case.build, case.dtype), generator)
        shape = (*call.args[0].shape[:-1], case.sizes["V"])
        logits = (torch.randn(shape, generator=generator) * options.get("spread", 1.0)).to(case.dtype)
        if options.get("strided", False):
            logits = linear.gappy(logits)
        if apart:
            logits = linear.apart(logits)
        differentiable = (0, 2) if weights_need_gradient else (0,)
        return Call((logits, *call.args[2:]), call.kwargs, differentiable)

    return build


def _eager(
    logits: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    inplace: bool = False,
    **options: Any,
) -> torch.Tensor:
    nll = linear.eager_penalised(logits, target, ignore_index, **options)
    return linear.eager_reduce(nll, target != ignore_index, token_weight, reduction, normalizer)


def _torch_compile(*args: Any, **kwargs: Any) -> torch.Tensor:
    return linear.compiled(_eager)(*args, **kwargs)


def _traffic(case: Case) -> Traffic:
    """The logits read twice, for the loss and for the gradient, which is written once."""
    T, V = case.sizes["T"], case.sizes["V"]
    return Traffic(bytes=3 * T * V * case.dtype.itemsize + T * (8 + 4 + 4), flops=8.0 * T * V)


OP = OpCases(
    function=cross_entropy,
    cases=(
        *(
            Case(f"{name}_{reduction}", SMALL, _builder(reduction=reduction, **settings), dtype)
            for reduction in ("mean", "sum", "none")
            for name, dtype, settings in (
                ("fp32", torch.float32, {"weights_need_gradient": True}),
                ("full_fp32", torch.float32, {"softcap": 3.0, "logit_scale": 0.7}),
                ("full_bf16", torch.bfloat16, {"softcap": 3.0, "logit_scale": 0.7}),
                ("fp16", torch.float16, {}),
                ("inplace", torch.bfloat16, {"inplace": True}),
            )
        ),
        *(
            Case(f"penalised_{name}", SMALL, _builder(label_smoothing=0.2, z_loss=0.01, **settings), dtype)
            for name, dtype, settings in (
                ("fp32", torch.float32, {"weights_need_gradient": True}),
                ("bf16", torch.bfloat16, {"softcap": 3.0, "logit_scale": 0.7, "reduction": "none"}),
                ("inplace", torch.bfloat16, {"inplace": True, "reduction": "sum"}),
            )
        ),
        Case("smoothed", SMALL, _builder(label_smoothing=0.1)),
        Case("z_loss", SMALL, _builder(z_loss=0.01, reduction="sum")),
        Case("unweighted", SMALL, _builder(weights=None)),
        Case("expanded_weights", SMALL, _builder(weights="expanded")),
        Case("normalizer", SMALL, _builder(normalizer=7)),
        Case("normalizer_tensor", SMALL, _builder(normalizer=torch.tensor(11), weights_need_gradient=True)),
        Case("normalizer_zero", SMALL, _builder(normalizer=0.0)),
        Case("weights_cancel", {"T": 36, "V": 101}, _builder(weights="cancel", ignored=0.0)),
        Case("all_ignored", SMALL, _builder(ignored=1.1)),
        Case("ignore_index_0", SMALL, _builder(ignore_index=0)),
        Case("flat", SMALL, _builder(spread=1e-3), torch.bfloat16),
        Case("peaked", SMALL, _builder(spread=60.0), torch.bfloat16),
        Case("strided", SMALL, _builder(strided=True)),
        Case("strided_inplace", SMALL, _builder(strided=True, inplace=True, reduction="none"), torch.bfloat16),
        Case("apart", SMALL, _builder(apart=True)),
        Case("apart_inplace", SMALL, _builder(apart=True, inplace=True, reduction="none"), torch.bfloat16),
        Case("batch", {"T": 36, "V": 101}, _builder(leading=(3, 3, 4), reduction="none")),
        Case("no_leading_shape", {"T": 1, "V": 101}, _builder(leading=(), ignored=0.0)),
        Case("empty", {"T": 0, "V": 101}, _builder()),
        Case("one_class", {"T": 5, "V": 1}, _builder(ignored=0.0)),
        Case("tail_fp32", {"T": 130, "V": 5003}, _builder()),
        Case("tail_bf16", {"T": 130, "V": 5003}, _builder(), torch.bfloat16),
        *linear.sure_cases(_builder, reduction="none"),
        *(
            Case(
                f"bench_{linear.dtype_name(dtype)}_{T}x{V}{'_inplace' if inplace else ''}",
                {"T": T, "V": V},
                _builder(inplace=inplace),
                dtype,
                benchmark=True,
            )
            for dtype in (torch.float32, torch.bfloat16)
            for T, V in ((1024, 32000), (1024, 151936))
            for inplace in (False, True)
        ),
    ),
    traffic=_traffic,
    eager=_eager,
    peers={"torch_compile": _torch_compile},
)
