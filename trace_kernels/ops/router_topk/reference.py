"""The definition of `router_topk`, in plain torch, with its gradient."""

from __future__ import annotations

import torch

from trace_kernels.ops.router_topk.rule import Rule

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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
    """Weights [T, k], indices [T, k], chosen [T, k], stats [T, 2]; counts [E] and token_score [T] are added to.

    `chosen` are the scores of the chosen experts and `stats` the row's maximum m and sum of e^(z - m), a logsumexp in
    two parts: what the gradient needs. Both are empty without `keep`. `given` are experts [T, k] instead of a choice.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    stats = z.new_empty(0, 2)
    if rule.score_function == "softmax":
        top = z.amax(dim=1, keepdim=True)
        stats = torch.cat([top, (z - top).exp().sum(dim=1, keepdim=True)], dim=1)
        scores = softmax(z, stats)
    elif rule.score_function == "sigmoid":
        scores = torch.sigmoid(z)
    elif rule.score_function == "sqrtsoftplus":
        scores = (z.clamp(min=0) + torch.log1p(torch.exp(-z.abs()))).sqrt()
    else:
        scores = z
    # A stable sort: NaN first, then the largest, among equals the lowest index.
    if given is None:
        ranking = _choice(z, scores, rule, selection_bias).sort(dim=1, descending=True, stable=True)
        indices = ranking.indices[:, : rule.k].contiguous()
    else:
        indices = given.clone()
    wrong, experts = wrong_experts(given, logits.shape[1]), indices
    if wrong is not None:
        experts = torch.where(wrong, 0, indices)
    chosen = scores.gather(1, experts)
    if wrong is not None:
        chosen = chosen.masked_fill(wrong, float("nan"))
    if rule.score_function == "softmax_topk":
        chosen = chosen.softmax(dim=1)
    weights = chosen / (chosen.sum(dim=1, keepdim=True) + rule.eps) if rule.renormalize else chosen
    weights = (weights * rule.scale).to(weights_dtype)
    if weights.data_ptr() == chosen.data_ptr():  # outputs of a custom op share no memory
        weights = weights.clone()

    real = torch.ones_like(indices, dtype=torch.bool) if wrong is None else ~wrong
    if counts is not None:
        counted = real if token_mask is None else real & token_mask[:, None]
        counts.index_add_(0, experts.flatten(), counted.flatten().long())
    if table is not None and token_score is not None:
        token_score += torch.where(real, table[experts], 0).sum(dim=1)
    if not keep:
        chosen = chosen[:0].clone()
    if not (keep and rule.dense_gradient):
        stats = stats[:0].clone()
    return weights, indices, chosen, stats


def wrong_experts(given: torch.Tensor | None, num_experts: int) -> torch.Tensor | None:
    """[T, k]: which of the experts given are none, or stand in another slot of their row too; None without any."""
    if given is None:
        return None
    same = (given[:, :, None] == given[:, None, :]).sum(dim=2) > 1
    return same | (given < 0) | (given >= num_experts)


def softmax(z: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    return (z - stats[:, :1]).exp() / stats[:, 1:]


def _choice(z: torch.Tensor, scores: torch.Tensor, rule: Rule, selection_bias: torch.Tensor | None) -> torch.Tensor:
    """What the experts are ranked by, [T, E]."""
    if selection_bias is None and rule.num_groups == 1:
        return z  # every score function is increasing: where scores round to the same number, logits still differ
    choice = scores if selection_bias is None else scores + selection_bias.to(scores.dtype)
    if rule.num_groups == 1:
        return choice
    grouped = choice.view(choice.shape[0], rule.num_groups, choice.shape[1] // rule.num_groups)
    group_scores = sum_of_best(grouped, rule.group_best)
    ranking = group_scores.sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, ranking[:, : rule.topk_groups], True)
    return grouped.masked_fill(~kept[:, :, None], rule.masked_group_value).flatten(1)


def sum_of_best(groups: torch.Tensor, count: int) -> torch.Tensor:
    """The sum of the `count` largest of the last dimension, from the largest on: the order that every backend has."""
    if count == 1:
        return groups.amax(dim=-1)
    best = groups.topk(count, dim=-1).values
    total = best[..., 0]
    for place in range(1, count):
        total = total + best[..., place]
    return total


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
    """The gradient of the logits, [T, E] in `dtype`; `logits` are needed where `rule.dense_gradient`.

    With s the chosen scores, D = sum s + eps, p = s / D and g the upstream gradient:
    s_j d s_j = scale p_j (g_j - sum_i p_i g_i) renormalised, else scale s_j g_j.
    """
    g = grad_weights.to(chosen.dtype)
    if rule.renormalize:
        denominator = chosen.sum(dim=1, keepdim=True) + rule.eps
        # No number over a tensor, which torch takes for a product with one over it: that overflows for a small sum.
        share, of_eps = chosen / denominator, torch.full_like(denominator, rule.eps) / denominator
        mean = (share * g).sum(dim=1, keepdim=True)
        difference = g - mean
        # Where one score is nearly the sum of all, its difference is what rounding left of its gradient and the mean.
        # The mean of what is left, which would be of_eps of the first, says how far off that was.
        correction = (share * difference).sum(dim=1, keepdim=True) - mean * of_eps
        d_chosen = rule.scale * share * (difference - correction)
        along = rule.scale * (mean + correction) * of_eps  # sum_j s_j d s_j without the cancellation
    else:
        d_chosen = rule.scale * chosen * g
        along = d_chosen.sum(dim=1, keepdim=True)
    # Up to here d / d log s.
    if rule.score_function == "sigmoid":
        d_chosen *= 1 - chosen
    elif rule.score_function == "sqrtsoftplus":
        square = chosen * chosen  # log(1 + e^z), so d log s / dz = (1 - e^(-s^2)) / (2 s^2)
        d_chosen *= torch.where(square == 0, 0.5, -torch.expm1(-square) / (2 * square))
    elif rule.score_function == "softmax_topk":
        d_chosen -= chosen * along
    if rule.dense_gradient:
        assert logits is not None
        d_logits = -softmax(logits.to(chosen.dtype), stats) * along
    else:
        d_logits = chosen.new_zeros(indices.shape[0], num_experts)
    return d_logits.scatter_add_(1, indices.clamp(0, num_experts - 1), d_chosen).to(dtype)
