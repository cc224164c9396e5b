"""`router_topk`: from router logits to expert weights, indices, counts and token scores in one pass."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from trace_kernels.ops.record_routing.op import check_recording, recording_fits
from trace_kernels.ops.router_topk import cuda, native, reference
from trace_kernels.ops.router_topk.rule import GROUP_SCORES, SCORE_FUNCTIONS, Rule
from trace_kernels.runtime import cuda_backend, light_op, triton_backend, validate
from trace_kernels.runtime.backends import OpBackends

backends = OpBackends("router_topk")
backends.register("reference", forward=reference.forward, backward=reference.backward)
backends.register(
    "cpu",
    unavailable=native.cpu_unavailable,
    refuse=native.refuse_cpu,
    forward=native.forward_cpu,
    backward=native.backward_cpu,
)
triton_backend.register(backends, __package__, "forward", "backward")
cuda_backend.register(backends, cuda, "forward", "backward")


def router_topk(
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
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Choose k experts for each token and weigh them; count the choices and score the tokens in the same pass.

    .. math::
        s_t = \text{score\_function}(z_t), \qquad
        I_t = \operatorname{topk}_e(s_{te} + b_e), \qquad
        w_{tj} = \text{scale} \cdot \frac{s_{t, I_{tj}}}{\sum_i s_{t, I_{ti}} + \text{eps}}

    With `num_groups` > 1, the experts are split into groups of E / num_groups neighbours; the `topk_groups` groups
    with the best group score are kept, and in the others s + b is replaced by `masked_group_value` before the
    choice. Without bias and groups the choice is by the logits themselves, which orders as every score function does
    and has no rounding. Groups and experts that tie: the lowest index first; a NaN counts as the largest. A row with
    a NaN gets valid, distinct indices and, where the NaN reaches the scores, NaN weights.

    With `indices` nothing is chosen: weights, counts and token scores are those of the experts that it names, such as
    those of an earlier forward (route replay). The gradient is that of their weights.

    All arithmetic is in float32 (float64 for float64 logits). The gradient is kept as [T, k] scores; only a softmax
    that is not renormalised, or with `eps`, keeps the logits too. Source: the routers of Mixtral, Qwen3-MoE, OLMoE
    (softmax), DeepSeek-V2 (softmax, groups by max, 0.0), DeepSeek-V3 (sigmoid, bias, groups by sum_top2, -inf,
    eps 1e-20), DeepSeek-V4 (sqrtsoftplus) and gpt-oss (softmax_topk).

    Args:
        logits: [T, E] floating, any strides.
        k: experts for each token, in [1, E].
        score_function: "softmax" over all experts, "sigmoid", "sqrtsoftplus" (the square root of log(1 + e^z)), or
            "softmax_topk": choose by the logits, then softmax over the k chosen.
        renormalize: divide the k scores by their sum plus `eps`.
        scale: finite; multiplies the weights.
        eps: finite, at least 0; used when renormalising.
        selection_bias: [E] floating, added to the scores for the choice only: weights and gradients do not see it.
        num_groups: a divisor of E.
        topk_groups: groups to keep, in [1, num_groups].
        group_score: "max" of a group's s + b; "sum_top2", the sum of its two largest; or "sum_topk", that of its
            k // topk_groups largest, as in Megatron and TransformerEngine.
        masked_group_value: 0.0 or -inf.
        token_mask: [T] bool, the tokens that count; all by default. It touches `counts` only.
        counts: [E] int64, added to in place: how many counting tokens chose each expert.
        table: [E] float32, finite; goes with `token_score`.
        token_score: [T] float32, added to in place: token_score[t] += sum_j table[indices[t, j]].
        weights_dtype: dtype of the weights; the dtype of `logits` by default.
        indices: [T, k] integer, different experts in each row, which take the place of the choice; neither bias nor
            groups matter then. On a GPU, where values are not looked at, an entry outside [0, E) or a repeated one
            gets a weight of NaN and is neither counted nor scored.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Returns:
        weights [T, k] and indices [T, k] int64, best first. The weights are differentiable once in `logits`; a
        second-order gradient and forward-mode differentiation raise RuntimeError.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, or a non-finite table (on a GPU, values are
            looked at only with TRACE_KERNELS_DEBUG=1); the message names the argument.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, trace_kernels as tk
        >>> counts = torch.zeros(4, dtype=torch.int64)
        >>> logits = torch.tensor([[1.0, 3.0, 1.0, 3.0], [0.0, 0.0, 9.0, 0.0]])
        >>> weights, indices = tk.router_topk(logits, 2, counts=counts)
        >>> indices.tolist(), counts.tolist()
        ([[1, 3], [2, 0]], [1, 1, 1, 1])
        >>> weights[0].tolist()
        [0.5, 0.5]
    """
    validate.check_dtype("logits", logits, validate.FLOAT_DTYPES)
    validate.check_ndim("logits", logits, 2, "[T, E]")
    num_tokens, num_experts = logits.shape
    constants = (
        logits.dtype, num_experts, k, score_function, renormalize, scale, eps, num_groups, topk_groups, group_score,
        masked_group_value,
    )  # fmt: skip
    rule = _rule(*constants) if is_dynamo_compiling() else _rule_of(constants)
    if selection_bias is not None:
        validate.check_dtype("selection_bias", selection_bias, validate.FLOAT_DTYPES)
        validate.check_shape("selection_bias", selection_bias, (num_experts,), "[E]")
        validate.check_device("selection_bias", selection_bias, logits.device, "logits")
        selection_bias = selection_bias.detach()
    rows, experts = logits.shape[:1], logits.shape[1:]
    if counts is not None and not validate.fits(counts, torch.int64, experts, logits.device):
        validate.check_dtype("counts", counts, (torch.int64,))
        validate.check_shape("counts", counts, (num_experts,), "[E]")
        validate.check_device("counts", counts, logits.device, "logits")
    if not recording_fits(rows, experts, logits.device, token_mask, table, token_score):
        check_recording(num_tokens, num_experts, logits.device, token_mask, table, token_score, of="logits")
    if weights_dtype is None:
        weights_dtype = logits.dtype
    else:
        validate.check_choice("weights_dtype", weights_dtype, validate.FLOAT_DTYPES)
    if indices is not None:
        validate.check_dtype("indices", indices, validate.INTEGER_DTYPES)
        validate.check_shape("indices", indices, (num_tokens, k), "[T, k]")
        validate.check_device("indices", indices, logits.device, "logits")
        indices = indices.to(torch.int64)

    validate.check_no_tangent("logits", logits, "router_topk")
    keep = logits.requires_grad and torch.is_grad_enabled()
    tensors = (selection_bias, token_mask, table, indices)
    recorded = counts, token_score
    # A score that wants a gradient is autograd's business, which has its own words for what is not allowed.
    if not (token_score is not None and token_score.requires_grad) and light_op.bypasses(logits, *tensors, *recorded):
        rest = (*tensors, *recorded, weights_dtype, keep)
        if keep:
            outputs = _RouterTopk.apply(logits, rule, rest, backend)  # type: ignore[no-untyped-call]
        else:
            _, outputs = _run(backend, logits, rule, *rest)
        light_op.written(*recorded)
        return outputs[0], outputs[1]
    if table is not None:
        table = table.detach()
    outputs = _router_topk(
        logits, selection_bias, token_mask, table, indices, rule.k, rule.score_function, rule.renormalize, rule.scale,
        rule.eps, rule.num_groups, rule.topk_groups, rule.group_score, rule.masked_group_value, counts is not None,
        weights_dtype, keep, backend,
    )  # fmt: skip
    weights, indices, _, _, counted, score = outputs
    # Here and not in the op: an op that writes to its arguments has no autograd.
    if counts is not None:
        counts += counted
    if token_score is not None:
        token_score += score.detach()
    return weights, indices


def _rule(
    dtype: torch.dtype,
    num_experts: int,
    k: int,
    score_function: str,
    renormalize: bool,
    scale: float,
    eps: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    masked_group_value: float,
) -> Rule:
    """The constants of a call, checked."""
    _check_integer("k", k, 1, num_experts, "E, the number of experts")
    validate.check_choice("score_function", score_function, SCORE_FUNCTIONS)
    validate.check_choice("group_score", group_score, GROUP_SCORES)
    validate.check_choice("masked_group_value", masked_group_value, (0.0, float("-inf")))
    _check_number("scale", scale)
    _check_number("eps", eps, at_least_0=True)
    _check_integer("num_groups", num_groups, 1, num_experts, "E, the number of experts")
    _check_integer("topk_groups", topk_groups, 1, num_groups, "num_groups")
    if num_experts % num_groups != 0:
        raise ValueError(f"num_groups: got {num_groups}, allowed is a divisor of the {num_experts} experts")
    members = num_experts // num_groups
    if group_score == "sum_top2" and num_groups > 1 and members < 2:
        raise ValueError(f"num_groups: got {num_groups}, allowed for 'sum_top2' are groups of 2 experts or more")
    if group_score == "sum_topk" and num_groups > 1 and not 1 <= k // topk_groups <= members:
        raise ValueError(
            f"k: got {k} with topk_groups={topk_groups}, allowed for 'sum_topk' is a k // topk_groups of 1 to "
            f"{members}, the experts of a group"
        )
    return Rule.of(
        dtype, k, score_function, bool(renormalize), float(scale), float(eps), num_groups, topk_groups, group_score,
        float(masked_group_value),
    )  # fmt: skip


_kept_rule = functools.lru_cache(maxsize=256, typed=True)(_rule)


def _rule_of(constants: tuple[Any, ...]) -> Rule:
    """Calls of a layer bring the same constants every time: to check them again takes longer than the kernel."""
    try:
        return _kept_rule(*constants)
    except TypeError:  # what cannot be hashed, such as a symbolic number, or is no number at all
        return _rule(*constants)


def _check_integer(name: str, value: object, low: int, high: int, high_name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is an int")
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, allowed is {low} to {high} ({high_name})")


def _check_number(name: str, value: object, *, at_least_0: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is a number")
    if not (0 if at_least_0 else -math.inf) <= value < math.inf or value == -math.inf:
        raise ValueError(f"{name}: got {value}, allowed is a finite number{', 0 or larger' if at_least_0 else ''}")


def _run(backend: str, *args: Any) -> tuple[SimpleNamespace, reference.Outputs]:
    """The functions of the backend that takes the call, and what its forward gives; `args` are the forward's."""
    logits, rule, _, _, table, given, _, _, weights_dtype, _ = args
    functions = backends.select(backend, logits.device, logits, rule, weights_dtype)
    # The cpu backend looks at them itself.
    if functions.forward is not native.forward_cpu and validate.check_values_on(logits.device):
        if table is not None:
            validate.check_finite("table", table)
        wrong = reference.wrong_experts(given, logits.shape[1])
        if given is not None and wrong is not None and wrong.any():
            raise native.wrong_expert(given, int(wrong.flatten().nonzero()[0]), logits.shape[1])
    return functions, functions.forward(*args)


def _forward(
    logits: torch.Tensor,
    selection_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    indices: torch.Tensor | None,
    k: int,
    score_function: str,
    renormalize: bool,
    scale: float,
    eps: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    masked_group_value: float,
    want_counts: bool,
    weights_dtype: torch.dtype,
    keep: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rule = Rule.of(
        logits.dtype, k, score_function, renormalize, scale, eps, num_groups, topk_groups, group_score,
        masked_group_value,
    )  # fmt: skip
    counts = logits.new_zeros(logits.shape[1], dtype=torch.int64) if want_counts else None
    score = None if table is None else logits.new_zeros(logits.shape[0], dtype=torch.float32)
    _, outputs = _run(
        backend, logits, rule, selection_bias, token_mask, table, indices, counts, score, weights_dtype, keep
    )
    return (
        *outputs,
        logits.new_empty(0, dtype=torch.int64) if counts is None else counts,
        logits.new_empty(0, dtype=torch.float32) if score is None else score,
    )


def _fake(
    logits: torch.Tensor,
    selection_bias: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    indices: torch.Tensor | None,
    k: int,
    score_function: str,
    renormalize: bool,
    scale: float,
    eps: float,
    num_groups: int,
    topk_groups: int,
    group_score: str,
    masked_group_value: float,
    want_counts: bool,
    weights_dtype: torch.dtype,
    keep: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    T, E = logits.shape
    rule = Rule.of(
        logits.dtype, k, score_function, renormalize, scale, eps, num_groups, topk_groups, group_score,
        masked_group_value,
    )  # fmt: skip
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(T, k, dtype=weights_dtype),
        logits.new_empty(T, k, dtype=torch.int64),
        logits.new_empty(T if keep else 0, k, dtype=compute),
        logits.new_empty(T if keep and rule.dense_gradient else 0, 2, dtype=compute),
        logits.new_empty(E if want_counts else 0, dtype=torch.int64),
        logits.new_empty(0 if table is None else T, dtype=torch.float32),
    )


_router_topk = light_op.define("router_topk", _forward, _fake)


def _gradient(
    grad_weights: torch.Tensor,
    logits: torch.Tensor | None,
    indices: torch.Tensor,
    chosen: torch.Tensor,
    stats: torch.Tensor,
    score_function: str,
    renormalize: bool,
    scale: float,
    eps: float,
    num_experts: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    rule = Rule(indices.shape[1], score_function, renormalize, scale, eps, 1, 1, "max", 0.0)
    # What a backend refuses is decided by the logits' dtype, which the saved scores tell.
    functions = backends.select(backend, indices.device, chosen, rule, grad_weights.dtype)
    gradient: torch.Tensor = functions.backward(grad_weights, logits, indices, chosen, stats, rule, num_experts, dtype)
    return gradient


def _fake_gradient(
    grad_weights: torch.Tensor,
    logits: torch.Tensor | None,
    indices: torch.Tensor,
    chosen: torch.Tensor,
    stats: torch.Tensor,
    score_function: str,
    renormalize: bool,
    scale: float,
    eps: float,
    num_experts: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    return indices.new_empty(indices.shape[0], num_experts, dtype=dtype)


_router_topk_backward = light_op.define("router_topk_backward", _gradient, _fake_gradient)


def _refuse_second_order(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("second-order gradients of router_topk are not implemented")


torch.library.register_autograd("trace_kernels::router_topk_backward", _refuse_second_order, lib=light_op.LIBRARY)


def _save(ctx: Any, logits: torch.Tensor, rule: Rule, backend: str, outputs: tuple[torch.Tensor, ...]) -> None:
    _, indices, chosen, stats = outputs[:4]
    ctx.rule, ctx.num_experts, ctx.dtype, ctx.backend = rule, logits.shape[1], logits.dtype, backend
    ctx.save_for_backward(*((logits,) if rule.dense_gradient else ()), indices, chosen, stats)
    ctx.set_materialize_grads(False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, _, _, _, _, k, score_function, renormalize, scale, eps = inputs[:10]
    rule = Rule.of(logits.dtype, k, score_function, renormalize, scale, eps, 1, 1, "max", 0.0)
    _save(ctx, logits, rule, inputs[-1], output)


def _backward(ctx: Any, grad_weights: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad_weights is None:
        return (None,) * 18
    *logits, indices, chosen, stats = ctx.saved_tensors
    rule = ctx.rule
    gradient = _router_topk_backward(
        grad_weights, logits[0] if logits else None, indices, chosen, stats, rule.score_function, rule.renormalize,
        rule.scale, rule.eps, ctx.num_experts, ctx.dtype, ctx.backend,
    )  # fmt: skip
    return (gradient, *(None,) * 17)


torch.library.register_autograd(
    "trace_kernels::router_topk", _backward, setup_context=_setup_context, lib=light_op.LIBRARY
)


class _RouterTopk(torch.autograd.Function):
    """The same for calls past the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, rule: Rule, rest: tuple[Any, ...], backend: str
    ) -> tuple[torch.Tensor, ...]:
        ctx.functions, outputs = _run(backend, logits, rule, *rest)
        _save(ctx, logits, rule, backend, outputs)
        # Not the chosen scores: through them the gradient hangs on the logits, so that differentiating it again raises.
        ctx.mark_non_differentiable(outputs[1], outputs[3])
        return outputs

    @staticmethod
    def backward(
        ctx: Any, grad_weights: torch.Tensor | None, *_: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, None, None, None]:
        # With grad mode on, a graph of the backward is asked for: the other way says that there is none.
        if grad_weights is None or torch.is_grad_enabled() or not light_op.bypasses(grad_weights):
            return _backward(ctx, grad_weights)[0], None, None, None
        *logits, indices, chosen, stats = ctx.saved_tensors
        gradient = ctx.functions.backward(
            grad_weights, logits[0] if logits else None, indices, chosen, stats, ctx.rule, ctx.num_experts, ctx.dtype
        )
        return gradient, None, None, None
