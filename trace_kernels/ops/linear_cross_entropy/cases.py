"""Inputs of `linear_cross_entropy` for tests and benchmarks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from trace_kernels.ops.linear_cross_entropy.op import linear_cross_entropy
from trace_kernels.testing.cases import Call, Case, OpCases, Traffic

#: (dtype, T, H, V) of the benchmarks: small and large vocabularies, and a short batch.
BENCHMARKS = (
    (torch.float32, 1024, 1024, 32000),
    (torch.float32, 1024, 512, 151936),
    (torch.bfloat16, 1024, 1024, 32000),
    (torch.bfloat16, 1024, 2048, 50304),
    (torch.bfloat16, 1024, 1024, 151936),
    (torch.bfloat16, 64, 2048, 151936),
)
SMALL = {"T": 37, "H": 24, "V": 101}


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def states_and_head(case: Case, generator: torch.Generator, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden [T, H] and weight [V, H] whose logits have the standard deviation `spread`."""
    T, H, V = case.sizes["T"], case.sizes["H"], case.sizes["V"]
    hidden = torch.randn(T, H, generator=generator) * spread
    weight = torch.randn(V, H, generator=generator) / max(1, H) ** 0.5
    return hidden.to(case.dtype), weight.to(case.dtype)


def targets(case: Case, generator: torch.Generator, ignored: float, ignore_index: int = -100) -> torch.Tensor:
    T, V = case.sizes["T"], case.sizes["V"]
    target = torch.randint(V, (T,), generator=generator)
    return torch.where(torch.rand(T, generator=generator) < ignored, ignore_index, target)


def gappy(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every stride other than the contiguous one."""
    storage = torch.zeros(*(2 * size + 1 for size in reversed(tensor.shape)), dtype=tensor.dtype)
    view = storage[tuple(slice(1, 2 * size + 1, 2) for size in reversed(tensor.shape))]
    return view.permute(*reversed(range(tensor.dim()))).copy_(tensor)


def builder(
    *,
    weights: str | None = "signed",
    weights_need_gradient: bool = False,
    frozen: bool = False,
    frozen_hidden: bool = False,
    bias: bool = False,
    ignored: float = 0.25,
    spread: float = 1.0,
    strided: bool = False,
    leading: tuple[int, ...] | None = None,
    **options: Any,
) -> Callable[[Case, torch.Generator], Call]:
    def build(case: Case, generator: torch.Generator) -> Call:
        hidden, weight = states_and_head(case, generator, spread)
        target = targets(case, generator, ignored, options.get("ignore_index", -100))
        args: list[torch.Tensor] = [hidden, weight, target]
        T = case.sizes["T"]
        if weights == "signed":
            token_weight = torch.randn(T, generator=generator)
            args.append(torch.where(torch.rand(T, generator=generator) < 0.2, 0, token_weight))
        elif weights == "expanded":
            args.append(torch.tensor(0.7).expand(T))
        elif weights == "cancel":
            args.append(1.0 - 2.0 * (torch.arange(T) % 2))
        if leading is not None:
            args = [args[0].view(*leading, case.sizes["H"]), weight, *(other.view(leading) for other in args[2:])]
        if strided:
            args = [gappy(argument) for argument in args]
        kwargs: dict[str, Any] = dict(options)
        if bias:
            kwargs["bias"] = torch.randn(case.sizes["V"], generator=generator).to(case.dtype)
        differentiable: list[int | str] = [*([] if frozen_hidden else [0]), *([] if frozen else [1])]
        differentiable += [3] if weights_need_gradient else []
        differentiable += ["bias"] if bias and not frozen else []
        floating: list[int | str] = [0, 1, *(["bias"] if bias else [])]
        constant = [key for key in floating if key not in differentiable]
        return Call(tuple(args), kwargs, tuple(differentiable), constant=tuple(constant))

    return build


def eager_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """The head and the log-probability as one writes them: logits in the model's dtype, the loss in float32."""
    return eager_log_prob_of_logits(F.linear(hidden, weight, bias), target, ignore_index, softcap, logit_scale)


def eager_log_prob_of_logits(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int, softcap: float | None, logit_scale: float
) -> torch.Tensor:
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if logits.dtype != torch.float64:
        logits = logits.float()
    rows = logits.reshape(-1, logits.shape[-1])
    nll = F.cross_entropy(rows, target.reshape(-1), ignore_index=ignore_index, reduction="none")
    return -nll.view(target.shape)


def eager(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    nll = -eager_log_prob(hidden, weight, target, ignore_index=ignore_index, **options)
    return eager_reduce(nll, target != ignore_index, token_weight, reduction, normalizer)


def eager_reduce(
    loss: torch.Tensor,
    counted: torch.Tensor,
    token_weight: torch.Tensor | None,
    reduction: str,
    normalizer: float | torch.Tensor | None,
) -> torch.Tensor:
    weights = counted if token_weight is None else token_weight * counted
    loss = loss * weights
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (weights.sum() if normalizer is None else normalizer)


@functools.cache
def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return torch.compile(function)


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


def traffic(case: Case, passes: int) -> Traffic:
    """`passes` GEMM passes of 2 T H V; the head and the rows read once, the gradients written once."""
    T, H, V = case.sizes["T"], case.sizes["H"], case.sizes["V"]
    size = case.dtype.itemsize
    head = V * H * size * (2 if passes == 3 else 1)
    return Traffic(bytes=head + 2 * T * H * size + T * (8 + 4 + 4), flops=2.0 * T * H * V * passes)


def benchmark_cases(build: Callable[..., Callable[[Case, torch.Generator], Call]], **options: Any) -> tuple[Case, ...]:
    return tuple(
        Case(
            f"bench_{dtype_name(dtype)}_{T}x{H}x{V}_{'frozen' if frozen else 'trainable'}",
            {"T": T, "H": H, "V": V},
            build(frozen=frozen, **options),
            dtype,
            benchmark=True,
        )
        for dtype, T, H, V in BENCHMARKS
        for frozen in (True, False)
    )


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
        Case("tiles_fp32", {"T": 300, "H": 200, "V": 2100}, builder(bias=True)),
        Case("tiles_bf16", {"T": 300, "H": 200, "V": 2100}, builder(bias=True), torch.bfloat16),
        Case("tiles_frozen_bf16", {"T": 300, "H": 129, "V": 1033}, builder(frozen=True), torch.bfloat16),
        *benchmark_cases(builder),
    ),
    traffic=_traffic,
    eager=eager,
    peers={"torch_compile": torch_compile, "torch_chunked": torch_chunked},
)
