"""`router_topk` in Triton: a tile of whole rows in registers, k rounds of a maximum over packed keys.

A key holds the choice in an order-preserving integer and below it the complement of the expert's index: all keys of a
row differ, so a round finds one expert, of equals the lowest, and of NaNs, which rank first, too.

Run in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from trace_kernels.ops.router_topk.reference import Outputs
from trace_kernels.ops.router_topk.rule import SCORE_FUNCTIONS, Rule
from trace_kernels.runtime.recording import cdiv, size_of
from trace_kernels.shared.triton_common import launch, next_power_of_2, store_rounded

SOFTMAX, SIGMOID, SQRTSOFTPLUS, SOFTMAX_TOPK = (tl.constexpr(i) for i in range(len(SCORE_FUNCTIONS)))
WARPS = 4
MOST_EXPERTS = 2048
NONE = tl.constexpr(-(2**63))  # below every key: no expert, or one already chosen
NONE_32 = tl.constexpr(-(2**31))


@triton.jit
def ordered(x):
    """An int32 that orders as float32 `x` does, -0 as 0 and NaN above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@triton.jit
def number_of(order):
    """The float32 that `ordered` was given."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def packed(order, index, inside):
    return tl.where(inside, (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64), NONE)


@triton.jit
def element_score(z, FUNCTION: tl.constexpr):
    if FUNCTION == SIGMOID:
        return tl.sigmoid(z)
    elif FUNCTION == SQRTSOFTPLUS:  # noqa: RET505
        u = tl.exp(-tl.abs(z))
        w = 1.0 + u
        # log1p: what rounding adds to w, the quotient takes away
        log1p = tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0)))
        return tl.sqrt(tl.maximum(z, 0.0) + log1p)
    else:
        return z


# Another number of tokens is no other kernel.
@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    logits, bias, token_mask, table, given, weights, indices, chosen, stats, counts, score,
    num_tokens, stride_t, stride_e, stride_mask, stride_counts, stride_score, scale, eps, masked_value,
    E: tl.constexpr, K: tl.constexpr, FUNCTION: tl.constexpr, RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_TABLE: tl.constexpr, GIVEN: tl.constexpr,
    KEEP: tl.constexpr, STATS: tl.constexpr, COUNT: tl.constexpr, DENSE: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_inside = rows < num_tokens
    # Experts as [group, member]: group sizes need not be powers of two.
    MEMBERS: tl.constexpr = E // GROUPS
    group = tl.arange(0, BLOCK_G)[None, :, None]
    member = tl.arange(0, BLOCK_S)[None, None, :]
    expert = group * MEMBERS + member  # [1, G, S]
    real = (group < GROUPS) & (member < MEMBERS)
    if DENSE:
        offsets = rows[:, None, None] * E + expert
    else:
        offsets = rows[:, None, None] * stride_t + expert.to(tl.int64) * stride_e
    z = tl.load(logits + offsets, mask=row_inside[:, None, None] & real, other=0.0).to(tl.float32)
    inside = (rows >= 0)[:, None, None] & real  # rows beyond the end choose among zeros: their keys stay distinct

    largest = tl.zeros([BLOCK_T], tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    if FUNCTION == SOFTMAX:
        largest = tl.max(tl.max(tl.where(inside, z, -float("inf")), axis=2), axis=1)
        exponential = tl.exp(z - largest[:, None, None])
        total = tl.sum(tl.sum(tl.where(inside, exponential, 0.0), axis=2), axis=1)
        if STATS:
            tl.store(stats + rows * 2, largest, mask=row_inside)
            tl.store(stats + rows * 2 + 1, total, mask=row_inside)

    if GIVEN:
        key = packed(ordered(z), expert, inside)  # is not read
    elif NARROW:
        # bfloat16 and an index fit into 32 bits.
        key = tl.where(inside, ((ordered(z) >> 16) << 16) | (0xFFFF - expert), NONE_32)
    elif HAS_BIAS or GROUPS > 1:
        choice = exponential / total[:, None, None] if FUNCTION == SOFTMAX else element_score(z, FUNCTION)
        if HAS_BIAS:
            choice += tl.load(bias + expert, mask=real, other=0.0).to(tl.float32)
        key = packed(ordered(choice), expert, inside)
        if GROUPS > 1:
            first = tl.max(key, axis=2)  # [T, G]
            order = (first >> 32).to(tl.int32)
            total_best = number_of(order)
            left = key
            for _ in range(GROUP_BEST - 1):
                left = tl.where(left == first[:, :, None], NONE, left)
                first = tl.max(left, axis=2)
                total_best += number_of((first >> 32).to(tl.int32))
            order = ordered(total_best)
            groups = tl.arange(0, BLOCK_G)[None, :]
            group_key = packed(order, groups, (rows >= 0)[:, None] & (groups < GROUPS))
            kept = group_key != group_key
            for _ in range(TOPK_GROUPS):
                best_group = tl.max(group_key, axis=1)[:, None]
                kept = kept | (group_key == best_group)
                group_key = tl.where(group_key == best_group, NONE, group_key)
            key = packed(ordered(tl.where(kept[:, :, None], choice, masked_value)), expert, inside)
    else:
        key = packed(ordered(z), expert, inside)

    key = tl.reshape(key, [BLOCK_T, BLOCK_G * BLOCK_S])
    slots = tl.arange(0, BLOCK_K)[None, :]
    index = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    used = row_inside[:, None] & (slots < K)
    wrong = slots < 0  # of the experts given: no expert, or another slot's
    if GIVEN:
        asked = tl.load(given + rows[:, None] * K + slots, mask=used, other=0)
        wrong = used & ((asked < 0) | (asked >= E))
        index = tl.where(wrong, 0, asked).to(tl.int32)
        for slot in range(K):
            other = tl.sum(tl.where(slots == slot, index, 0), axis=1)[:, None]
            wrong = wrong | (used & (slots != slot) & (index == other))
    else:
        for slot in range(K):
            best = tl.max(key, axis=1)[:, None]
            if NARROW:
                found = 0xFFFF - (best & 0xFFFF)
                key = tl.where(key == best, NONE_32, key)
            else:
                found = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
                key = tl.where(key == best, NONE, key)
            index = tl.where(slots == slot, found, index)

    picked = tl.load(
        logits + rows[:, None] * stride_t + index.to(tl.int64) * stride_e, mask=used, other=0.0
    ).to(tl.float32)  # fmt: skip
    if GIVEN:
        # The host does not wait for the device to raise an error.
        picked = tl.where(wrong, float("nan"), picked)
    if FUNCTION == SOFTMAX:
        value = tl.exp(picked - largest[:, None]) / total[:, None]
    elif FUNCTION == SOFTMAX_TOPK:
        top = tl.max(tl.where(slots < K, picked, -float("inf")), axis=1)
        value = tl.where(slots < K, tl.exp(picked - top[:, None]), 0.0)
        value = value / tl.sum(value, axis=1)[:, None]
    else:
        value = element_score(picked, FUNCTION)
    out = rows[:, None] * K + slots
    if GIVEN:
        tl.store(indices + out, asked, mask=used)
    else:
        tl.store(indices + out, index.to(tl.int64), mask=used)
    if KEEP:
        tl.store(chosen + out, value, mask=used)
    if RENORMALIZE:
        value = value / (tl.sum(tl.where(slots < K, value, 0.0), axis=1) + eps)[:, None]
    store_rounded(weights + out, value * scale, used)
    if HAS_TABLE:
        scores = score + rows * stride_score
        before = tl.load(scores, mask=row_inside, other=0.0)
        added_score = tl.sum(tl.load(table + index, mask=used & ~wrong, other=0.0), axis=1)
        tl.store(scores, before + added_score, mask=row_inside)
    if COUNT:
        counted = used & ~wrong
        if HAS_MASK:
            counted = counted & (tl.load(token_mask + rows * stride_mask, mask=row_inside, other=0) != 0)[:, None]
        bins = tl.arange(0, BINS)
        added = tl.histogram(
            tl.reshape(index, [BLOCK_T * BLOCK_K]), BINS, mask=tl.reshape(counted, [BLOCK_T * BLOCK_K])
        )
        tl.atomic_add(counts + bins * stride_counts, added.to(tl.int64), mask=(bins < E) & (added > 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def backward_kernel(
    grad_weights, logits, indices, chosen, stats, gradient,
    num_tokens, stride_gt, stride_gk, stride_t, stride_e, scale, eps,
    E: tl.constexpr, K: tl.constexpr, FUNCTION: tl.constexpr, RENORMALIZE: tl.constexpr, DENSE_GRADIENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    row_inside = rows < num_tokens
    slots = tl.arange(0, BLOCK_K)[None, :]
    used = row_inside[:, None] & (slots < K)
    s = tl.load(chosen + rows[:, None] * K + slots, mask=used, other=0.0)
    g = tl.load(grad_weights + rows[:, None] * stride_gt + slots * stride_gk, mask=used, other=0.0).to(tl.float32)
    # reference.py says why so
    denominator = tl.full([BLOCK_T], 1.0, tl.float32)
    if RENORMALIZE:
        denominator = tl.where(row_inside, tl.sum(s, axis=1) + eps, 1.0)
        s = s / denominator[:, None]
    mean = tl.sum(s * g, axis=1)
    correction = tl.zeros([BLOCK_T], tl.float32)
    along = scale * mean  # sum_j s_j d s_j
    if RENORMALIZE:
        of_eps = eps / denominator
        correction = tl.sum(s * (g - mean[:, None]), axis=1) - mean * of_eps
        along = scale * (mean + correction) * of_eps
    else:
        mean = tl.zeros([BLOCK_T], tl.float32)
    experts = tl.arange(0, BLOCK_E)[None, :]
    inside = row_inside[:, None] & (experts < E)
    result = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    if DENSE_GRADIENT:
        z = tl.load(logits + rows[:, None] * stride_t + experts.to(tl.int64) * stride_e, mask=inside, other=0.0)
        largest = tl.load(stats + rows * 2, mask=row_inside, other=0.0)
        total = tl.load(stats + rows * 2 + 1, mask=row_inside, other=1.0)
        result = -(tl.exp(z.to(tl.float32) - largest[:, None]) / total[:, None]) * along[:, None]
    for slot in range(K):
        expert = tl.load(indices + rows * K + slot, mask=row_inside, other=0).to(tl.int32)
        s_j = tl.load(chosen + rows * K + slot, mask=row_inside, other=0.0)
        g_j = tl.load(grad_weights + rows * stride_gt + slot * stride_gk, mask=row_inside, other=0.0).to(tl.float32)
        d_logit = s_j / denominator * (g_j - mean - correction) * scale  # of the score's logarithm
        if FUNCTION == SIGMOID:
            d_logit *= 1.0 - s_j
        elif FUNCTION == SQRTSOFTPLUS:
            # s^2 = log(1 + e^z), so d log s / dz = (1 - e^(-s^2)) / (2 s^2). For small s a series instead.
            square = s_j * s_j
            small = 0.5 - square * (0.25 - square * (1.0 / 12.0 - square * (1.0 / 48.0)))
            d_logit *= tl.where(square < 0.05, small, (1.0 - tl.exp(-square)) / (2.0 * square))
        elif FUNCTION == SOFTMAX_TOPK:
            d_logit -= s_j * along
        result += tl.where(experts == expert[:, None], d_logit[:, None], 0.0)
    store_rounded(gradient + rows[:, None] * E + experts, result, inside)


def refuse(logits: torch.Tensor, rule: Rule, weights_dtype: torch.dtype) -> str | None:
    E = logits.shape[1]
    if E > MOST_EXPERTS:
        return f"a program holds a whole row, up to {MOST_EXPERTS} experts; logits have {E}"
    return "it computes in float32, weights_dtype is float64" if weights_dtype == torch.float64 else None


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
    """Weights, indices and chosen scores [T, k], and stats [T, 2]; what is not wanted is empty."""
    T, E = logits.shape
    device, k = logits.device, rule.k
    # Experts that are given need neither.
    bias = None if selection_bias is None or given is not None else selection_bias.contiguous()
    num_groups = rule.num_groups if given is None else 1
    given = None if given is None else given.contiguous()
    table = None if table is None else table.contiguous()
    want_stats = keep and rule.dense_gradient
    weights = torch.empty((T, k), dtype=weights_dtype, device=device)
    indices = torch.empty((T, k), dtype=torch.int64, device=device)
    chosen = torch.empty((T if keep else 0, k), dtype=torch.float32, device=device)
    stats = torch.empty((T if want_stats else 0, 2), dtype=torch.float32, device=device)
    narrow = logits.dtype == torch.bfloat16 and bias is None and num_groups == 1
    block_g, block_s = next_power_of_2(num_groups), next_power_of_2(E // num_groups)
    block_k = next_power_of_2(k)
    block_t = max(1, (4096 if narrow else 2048) // max(block_g * block_s, 2 * block_k))
    launch(
        forward_kernel, (cdiv(T, block_t),),
        logits, bias, token_mask, table, given, weights, indices, chosen, stats, counts, token_score,
        T, *logits.stride(), *(0 if rows is None else rows.stride(0) for rows in (token_mask, counts, token_score)),
        rule.scale, rule.eps, rule.masked_group_value,
        num_warps=WARPS,
        bytes=size_of(
            logits, bias, token_mask, table, given, weights, indices, chosen, stats, counts, counts, token_score,
            token_score,
        ),
        E=E, K=k, FUNCTION=SCORE_FUNCTIONS.index(rule.score_function), RENORMALIZE=rule.renormalize,
        GROUPS=num_groups, TOPK_GROUPS=rule.topk_groups, GROUP_BEST=rule.group_best,
        HAS_BIAS=bias is not None, HAS_MASK=token_mask is not None, HAS_TABLE=table is not None,
        GIVEN=given is not None,
        KEEP=keep, STATS=want_stats, COUNT=counts is not None, DENSE=logits.stride() == (E, 1), NARROW=narrow,
        BLOCK_T=block_t, BLOCK_G=block_g, BLOCK_S=block_s, BLOCK_K=block_k, BINS=max(32, next_power_of_2(E)),
    )  # fmt: skip
    return weights, indices, chosen, stats


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
    T, k = indices.shape
    gradient = torch.empty((T, num_experts), dtype=dtype, device=indices.device)
    block_e, block_k = next_power_of_2(num_experts), next_power_of_2(k)
    block_t = max(1, 1024 // max(block_e, 2 * block_k))
    launch(
        backward_kernel, (cdiv(T, block_t),),
        grad_weights, logits, indices.contiguous(), chosen.contiguous(), stats.contiguous(), gradient,
        T, *grad_weights.stride(), *((0, 0) if logits is None else logits.stride()), rule.scale, rule.eps,
        num_warps=WARPS, bytes=size_of(grad_weights, logits, indices, chosen, stats, gradient),
        E=num_experts, K=k, FUNCTION=SCORE_FUNCTIONS.index(rule.score_function), RENORMALIZE=rule.renormalize,
        DENSE_GRADIENT=rule.dense_gradient, BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_K=block_k,
    )  # fmt: skip
    return gradient
