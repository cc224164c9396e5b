"""What the cases of the losses share: inputs, the computation in plain torch, the floor and the benchmarks' sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from trace_kernels.testing.cases import Call, Case, Traffic

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


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous rows with a gap between them: what a kernel takes without a copy."""
    storage = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)
    return storage[..., 1:-2].copy_(tensor)


def sure_logits(case: Case, generator: torch.Generator, kind: str, lead: float, target: torch.Tensor) -> torch.Tensor:
    """[T, V] logits without any rounding: the target, the class after it ("wrong") or both ("tie") lead all others."""
    T, V = case.sizes["T"], case.sizes["V"]
    logits = torch.randint(-64, 65, (T, V), generator=generator) / 64.0
    rows, known = torch.arange(T), target.clamp(min=0)
    if kind != "wrong":
        logits[rows, known] = lead
    if kind != "target":
        logits[rows, (known + 1) % V] = lead
    return logits


#: (name, kind, lead, options) of cases in which a class is nearly certain.
SURE = (
    *((f"{kind}_{lead}", kind, float(lead), {}) for kind in ("target", "wrong", "tie") for lead in (5, 20, 40, 80)),
    ("target_30_softcap", "target", 30.0, {"softcap": 40.0, "logit_scale": 1.5}),
    ("target_25_scaled", "target", 25.0, {"logit_scale": 1.25}),
)


def sure_cases(build: Callable[..., Callable[[Case, torch.Generator], Call]], **options: Any) -> tuple[Case, ...]:
    """With the identity for a head. What rounding the logits explains is allowed: a few times 2^-24 of the largest."""
    return tuple(
        Case(
            f"sure_{name}",
            {"T": 7, "H": 40, "V": 40},
            build(sure=(kind, lead), weights=None, **more, **options),
            relative=1e-5 + 4 * 2.0**-24 * lead * more.get("logit_scale", 1.0),
        )
        for name, kind, lead, more in SURE
    )


def _leading(rows: torch.Tensor, leading: tuple[int, ...]) -> torch.Tensor:
    return rows.view((*leading, *rows.shape[1:]))


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
    several: int | None = None,
    sure: tuple[str, float] | None = None,
    **options: Any,
) -> Callable[[Case, torch.Generator], Call]:
    def build(case: Case, generator: torch.Generator) -> Call:
        hidden, weight = states_and_head(case, generator, spread)
        target = targets(case, generator, ignored, options.get("ignore_index", -100))
        if sure is not None:
            target = torch.arange(len(target)) * 5 % case.sizes["V"]
            target[-1] = options.get("ignore_index", -100)
            hidden, weight = sure_logits(case, generator, *sure, target), torch.eye(case.sizes["V"])
        if several is not None:
            target = torch.stack([targets(case, generator, ignored) for _ in range(several)], dim=1)
            if several > 1:
                target[::2, 1] = target[::2, 0]  # the same one twice
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
            args = [weight if i == 1 else _leading(rows, leading) for i, rows in enumerate(args)]
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


def eager_logits(logits: torch.Tensor, softcap: float | None, logit_scale: float) -> torch.Tensor:
    """In the model's dtype, then float32."""
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if logits.dtype == torch.float64 else logits.float()


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
    """The head and the log-probability of [...] or [..., K] targets as one writes them."""
    logits = eager_logits(F.linear(hidden, weight, bias), softcap, logit_scale)
    if target.dim() == hidden.dim():
        ignored = target == ignore_index
        return logits.log_softmax(-1).gather(-1, target.masked_fill(ignored, 0)).masked_fill(ignored, 0)
    return -eager_penalised(logits, target, ignore_index)


def eager_penalised(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> torch.Tensor:
    """Torch's cross-entropy per token, and a multiple of the squared logsumexp."""
    logits = eager_logits(logits, softcap, logit_scale)
    rows = logits.reshape(-1, logits.shape[-1])
    options: Any = {"ignore_index": ignore_index, "reduction": "none", "label_smoothing": label_smoothing}
    loss = F.cross_entropy(rows, target.reshape(-1), **options).view(target.shape)
    return loss + z_loss * torch.logsumexp(logits, dim=-1).square() if z_loss else loss


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
