"""Inputs of `router_topk` for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from trace_kernels.ops.router_topk.op import router_topk
from trace_kernels.testing.cases import Call, Case, OpCases, Traffic

Fill = Callable[[Case, torch.Generator], torch.Tensor]

#: The options with which the routers of these families are reproduced.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"weights_dtype": torch.float32},
    "qwen3_moe": {},
    "olmoe": {"renormalize": False},
    "deepseek_v2": {"renormalize": False, "scale": 1.5, "num_groups": 4, "topk_groups": 2},
    "deepseek_v3": {
        "score_function": "sigmoid",
        "eps": 1e-20,
        "scale": 2.5,
        "num_groups": 4,
        "topk_groups": 2,
        "group_score": "sum_top2",
        "masked_group_value": float("-inf"),
    },
    "deepseek_v4": {"score_function": "sqrtsoftplus", "eps": 1e-20, "scale": 1.5},
    "gpt_oss": {"score_function": "softmax_topk"},
}
BIASED = ("deepseek_v3", "deepseek_v4")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _normal(case: Case, generator: torch.Generator) -> torch.Tensor:
    return (2 * torch.randn(case.sizes["T"], case.sizes["E"], generator=generator)).to(case.dtype)


def _build(fill: Fill = _normal, bias: float = 0.0, differentiable: bool = True, **options: Any):  # type: ignore[no-untyped-def]
    """A call with the options that counts, masks and scores; `bias` is the spread of the selection bias."""

    def build(case: Case, generator: torch.Generator) -> Call:
        T, E = case.sizes["T"], case.sizes["E"]
        if bias:
            options["selection_bias"] = bias * torch.randn(E, generator=generator)
        recording = {
            "token_mask": torch.rand(T, generator=generator) < 0.7,
            "counts": torch.arange(E),
            "table": torch.randn(E, generator=generator),
            "token_score": torch.randn(T, generator=generator),
        }
        return Call(
            (fill(case, generator), case.sizes["k"]),
            {**options, **recording},
            differentiable=(0,) if differentiable else (),
            mutated=("counts", "token_score"),
        )

    return build


def _given(dtype: torch.dtype = torch.int64, strided: bool = False, **options: Any):  # type: ignore[no-untyped-def]
    """A call whose experts were chosen before, in any order and by other logits."""

    def build(case: Case, generator: torch.Generator) -> Call:
        call: Call = _build(**options)(case, generator)
        T, E, k = case.sizes["T"], case.sizes["E"], case.sizes["k"]
        given = torch.rand(T, E, generator=generator).argsort(dim=1)[:, :k].to(dtype)
        if strided:
            given = torch.zeros(k, 2 * T, dtype=dtype)[:, ::2].t().copy_(given)
        call.kwargs["indices"] = given
        return call

    return build


def _plain(case: Case, generator: torch.Generator) -> Call:
    return Call((_normal(case, generator), case.sizes["k"]), differentiable=(0,))


def _ties(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Few distinct numbers, among them both zeros, and a row of equal ones."""
    logits = torch.randint(-2, 3, (case.sizes["T"], case.sizes["E"]), generator=generator).to(case.dtype)
    logits[0] = 1.0
    return torch.where((logits == 0) & (torch.arange(case.sizes["E"]) % 2 == 1), -logits, logits)


def _not_finite(case: Case, generator: torch.Generator) -> torch.Tensor:
    logits = _normal(case, generator)
    logits[0] = float("nan")
    logits[1, 5:9] = float("nan")
    logits[2] = float("inf")
    logits[3, 7] = float("inf")
    logits[4] = float("-inf")
    logits[5, 3:] = float("-inf")
    logits[6, ::2] = float("-inf")
    return logits


def _scaled(factor: float) -> Fill:
    return lambda case, generator: _normal(case, generator) * factor


def _strided(case: Case, generator: torch.Generator) -> torch.Tensor:
    T, E = case.sizes["T"], case.sizes["E"]
    return torch.zeros(2 * T, 3 * E, dtype=case.dtype)[::2, 1::3].copy_(_normal(case, generator))


def _transposed(case: Case, generator: torch.Generator) -> torch.Tensor:
    return _normal(case, generator).t().contiguous().t()


def _strided_recording(case: Case, generator: torch.Generator) -> Call:
    T, E = case.sizes["T"], case.sizes["E"]
    return Call(
        (_strided(case, generator), case.sizes["k"]),
        {
            "renormalize": False,
            "selection_bias": torch.randn(2 * E, generator=generator)[::2],
            "token_mask": (torch.rand(T, 3, generator=generator) < 0.5)[:, 1],
            "counts": torch.zeros(E, 2, dtype=torch.int64)[:, 1],
            "table": torch.randn(2 * E, generator=generator)[::2],
            "token_score": torch.randn(T, 2, generator=generator)[:, 0],
        },
        differentiable=(0,),
        mutated=("counts", "token_score"),
    )


def _eager(
    logits: torch.Tensor,
    k: int,
    *,
    score_function: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    eps: float = 0.0,
    selection_bias: torch.Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    masked_group_value: float = 0.0,
    token_mask: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    token_score: torch.Tensor | None = None,
    weights_dtype: torch.dtype | None = None,
    indices: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the models write it, with autograd's gradient; a stable sort in place of topk, whose ties are arbitrary."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = z
    if score_function == "softmax":
        scores = z.softmax(dim=1)
    elif score_function == "sigmoid":
        scores = z.sigmoid()
    elif score_function == "sqrtsoftplus":
        scores = F.softplus(z).sqrt()
    choice = z if selection_bias is None and num_groups == 1 else scores.detach()
    if selection_bias is not None:
        choice = choice + selection_bias
    if num_groups > 1:
        groups = choice.view(len(choice), num_groups, choice.shape[1] // num_groups)
        count = {"max": 1, "sum_top2": 2, "sum_topk": k // topk_groups}[group_score]
        best = groups.topk(count, dim=2).values.sum(dim=2)
        kept = best.sort(dim=1, descending=True, stable=True).indices[:, :topk_groups]
        out = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        choice = groups.masked_fill(out[:, :, None], masked_group_value).flatten(1)
    if indices is None:
        indices = choice.sort(dim=1, descending=True, stable=True).indices[:, :k]
    indices = indices.long()
    return _finish(
        scores.gather(1, indices), indices, score_function, renormalize, scale, eps, token_mask, counts, table,
        token_score, logits.dtype if weights_dtype is None else weights_dtype,
    )  # fmt: skip


def torch_chain(logits: torch.Tensor, k: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What Mixtral's and Qwen's routers do: softmax, topk, renormalise; then bincount and gather-sum."""
    recording = {name: options.pop(name, None) for name in ("token_mask", "counts", "table", "token_score")}
    if options:
        raise NotImplementedError(f"the chain has no {', '.join(options)}")
    values, indices = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float), k, dim=-1)
    return _finish(values, indices, "softmax", True, 1.0, 0.0, **recording, dtype=logits.dtype)


def _finish(
    values: torch.Tensor,
    indices: torch.Tensor,
    score_function: str,
    renormalize: bool,
    scale: float,
    eps: float,
    token_mask: torch.Tensor | None,
    counts: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    if score_function == "softmax_topk":
        values = values.softmax(dim=1)
    if renormalize:
        values = values / (values.sum(dim=1, keepdim=True) + eps)
    if counts is not None:
        counts += torch.bincount(
            (indices if token_mask is None else indices[token_mask]).flatten(), minlength=len(counts)
        )
    if table is not None and token_score is not None:
        token_score += table[indices].sum(1)
    return (values * scale).to(dtype), indices


def _traffic(case: Case) -> Traffic:
    """Logits read; weights, indices, mask, score, table and counts; with `backward` in the name also its part."""
    T, E, k = case.sizes["T"], case.sizes["E"], case.sizes["k"]
    forward = T * (E * case.dtype.itemsize + k * (case.dtype.itemsize + 8) + 9) + 20 * E
    backward = T * (E * case.dtype.itemsize + k * (case.dtype.itemsize + 12)) if "backward" in case.name else 0
    return Traffic(bytes=forward + backward, flops=T * (E + 4 * k))


_SMALL = {"T": 37, "E": 64, "k": 6}

OP = OpCases(
    function=router_topk,
    cases=(
        *(Case(name, _SMALL, _build(bias=0.3 * (name in BIASED), **options)) for name, options in FAMILIES.items()),
        *(
            Case(f"{name}_{_name(dtype)}", _SMALL, _build(bias=0.3 * (name in BIASED), **options), dtype)
            for name, options in FAMILIES.items()
            for dtype in (torch.bfloat16, torch.float16)
        ),
        Case("plain", _SMALL, _plain),
        Case("float64", _SMALL, _plain, torch.float64),
        Case("float64_weights", _SMALL, _build(weights_dtype=torch.float64)),
        Case("softmax_eps", _SMALL, _build(eps=0.05, scale=3.0)),
        Case("softmax_bias", _SMALL, _build(bias=0.02, renormalize=False)),
        Case("softmax_topk_bias", _SMALL, _build(score_function="softmax_topk", bias=1.0, renormalize=False)),
        Case("sigmoid_raw", _SMALL, _build(score_function="sigmoid", renormalize=False)),
        Case("sqrtsoftplus_wide", _SMALL, _build(_scaled(20.0), score_function="sqrtsoftplus")),
        # A masked group's 0 beats a negative score of a kept one.
        Case("groups_masked_wins", _SMALL, _build(bias=1.0, score_function="sigmoid", num_groups=8, topk_groups=1)),
        Case("groups_sum_top2_zero", _SMALL, _build(num_groups=4, topk_groups=2, group_score="sum_top2", eps=1e-20)),
        Case("groups_more_than_kept", {"T": 37, "E": 16, "k": 9},
             _build(num_groups=4, topk_groups=2, score_function="sigmoid", masked_group_value=float("-inf"))),
        Case("groups_all_kept", _SMALL, _build(num_groups=4, topk_groups=4, masked_group_value=float("-inf"))),
        Case("groups_sum_topk", _SMALL,
             _build(num_groups=8, topk_groups=2, group_score="sum_topk", score_function="sigmoid", bias=0.3,
                    masked_group_value=float("-inf"))),
        Case("groups_sum_topk_uneven", {"T": 37, "E": 60, "k": 11},
             _build(num_groups=6, topk_groups=2, group_score="sum_topk", renormalize=False), torch.bfloat16),
        Case("groups_sum_topk_ties", _SMALL, _build(_ties, num_groups=4, topk_groups=1, group_score="sum_topk")),
        Case("groups_sum_topk_not_finite", _SMALL,
             _build(_not_finite, num_groups=4, topk_groups=2, group_score="sum_topk", score_function="sigmoid")),
        *(
            Case(f"given_{name}", _SMALL, _given(bias=0.3 * (name in BIASED), **options), dtype)
            for (name, options), dtype in zip(
                FAMILIES.items(),
                (torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.bfloat16,
                 torch.float32),
                strict=True,
            )
        ),
        Case("given_float64", _SMALL, _given(renormalize=False), torch.float64),
        Case("given_uint8_strided", _SMALL, _given(torch.uint8, strided=True)),
        Case("given_40_of_40", {"T": 9, "E": 40, "k": 40}, _given(renormalize=False, eps=0.0)),
        Case("given_empty", {"T": 0, "E": 8, "k": 2}, _given(renormalize=False)),
        Case("given_many_experts", {"T": 23, "E": 3001, "k": 100}, _given()),
        Case("ties", _SMALL, _build(_ties)),
        Case("ties_bfloat16", _SMALL, _build(_ties, renormalize=False), torch.bfloat16),
        Case("ties_groups", _SMALL, _build(_ties, num_groups=8, topk_groups=3, group_score="sum_top2")),
        Case("peaked", _SMALL, _build(_scaled(30.0))),
        Case("peaked_raw", _SMALL, _build(_scaled(30.0), renormalize=False)),
        Case("flat", _SMALL, _build(_scaled(1e-3), renormalize=False)),
        Case("far_from_zero", _SMALL, _build(lambda c, g: _normal(c, g) + 300.0, renormalize=False)),
        Case("not_finite", _SMALL, _build(_not_finite)),
        Case("not_finite_raw", _SMALL, _build(_not_finite, renormalize=False)),
        Case("not_finite_sigmoid", _SMALL, _build(_not_finite, bias=0.3, **FAMILIES["deepseek_v3"])),
        Case("strided", _SMALL, _build(_strided)),
        Case("strided_recording", _SMALL, _strided_recording),
        Case("transposed_bfloat16", _SMALL, _build(_transposed, renormalize=False), torch.bfloat16),
        Case("empty", {"T": 0, "E": 8, "k": 2}, _build(renormalize=False)),
        Case("one_expert", {"T": 5, "E": 1, "k": 1}, _build(renormalize=False)),
        Case("all_experts", {"T": 9, "E": 8, "k": 8}, _build()),
        Case("all_experts_raw", {"T": 9, "E": 40, "k": 40}, _build(renormalize=False)),
        Case("odd_sizes", {"T": 41, "E": 61, "k": 7}, _build(renormalize=False)),
        # Every number of experts that a warp holds in its lanes' registers, up to the most; groups of any size.
        Case("experts_200", {"T": 9, "E": 200, "k": 8}, _build(renormalize=False), torch.bfloat16),
        Case("experts_512", {"T": 9, "E": 512, "k": 33}, _build(), torch.bfloat16),
        Case("experts_1024", {"T": 5, "E": 1024, "k": 64}, _build(bias=0.3, **FAMILIES["deepseek_v3"])),
        Case("experts_1000_groups", {"T": 5, "E": 1000, "k": 20},
             _build(score_function="sigmoid", num_groups=100, topk_groups=40, masked_group_value=float("-inf"))),
        Case("many_experts", {"T": 23, "E": 3001, "k": 100}, _build()),
        Case("many_tokens", {"T": 5003, "E": 60, "k": 6}, _build()),
        *(
            Case(f"bench_{T}x{E}_{_name(dtype)}{part}", {"T": T, "E": E, "k": 8},
                 _build(differentiable=bool(part)), dtype, benchmark=True)
            for T, E in ((2048, 128), (16384, 64), (16384, 128), (16384, 256))
            for dtype in (torch.float32, torch.bfloat16)
            for part in ("", "_backward")
        ),
    ),
    traffic=_traffic,
    eager=_eager,
    peers={"torch_chain": torch_chain},
)  # fmt: skip
