r"""`linear_kl` with a beta: the generalised Jensen-Shannon divergence, in plain torch, some rows at a time.

With p the policy, q the reference, u = log p - log q and m = (1 - beta) p + beta q,

    d = beta KL(q || m) + (1 - beta) KL(p || m),    d d / d z_v = (1 - beta) p_v (log(p_v / m_v) - KL(p || m));

with beta = 1, KL(p || q) and p_v (u_v - KL(p || q)). log(p / m) and log(q / m) are made of u alone, by log1p and expm1:
where both models are sure of the same class, nothing is a difference of nearly equal numbers. There the class's own
gradient is minus the sum of all others'. Where the two are sure of different classes, log(p / m) is nearly
-log(1 - beta) wherever p is not small; a constant added to it leaves the gradient as it is, so that one is left out.

It runs on every device and behind every backend. Logits are float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import math

import torch

from trace_kernels.shared import vocabulary
from trace_kernels.shared.kept import kept_rows, spread
from trace_kernels.shared.linear import Call
from trace_kernels.shared.losses import compute_dtype
from trace_kernels.shared.softmax import slope, softmax, softplus, transform

#: Logits of one model that exist at a time, and how many of them a step works on: in a CPU's cache, or enough of a GPU.
LOGITS, STEP, STEP_ON_GPU = 2**25, 2**18, 2**23
#: Rows at a time where the vocabulary is split: the same in every process.
SPLIT_ROWS = 256
#: Columns of a head in half precision that are widened at a time.
COLUMNS = 8192


def forward(
    policy: Call, ref: Call, beta: float, want_dhidden: bool, want_dweight: bool, group_name: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The divergence [T], dhidden [T, H] and dweight [V, H], as in reference.py."""
    index = kept_rows(policy.kept()) if group_name is None else None
    if index is not None:
        found = _forward_of_all(policy.rows(index), ref.rows(index), beta, want_dhidden, want_dweight, None)
        value, dhidden = (spread(values, index, len(policy.hidden)) for values in found[:2])
        return value, dhidden, found[2]
    return _forward_of_all(policy, ref, beta, want_dhidden, want_dweight, group_name)


def _forward_of_all(
    policy: Call, ref: Call, beta: float, want_dhidden: bool, want_dweight: bool, group_name: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (T, H), V = policy.hidden.shape, policy.num_classes
    dtype, kept = compute_dtype(policy.hidden.dtype), policy.kept()
    value = policy.hidden.new_zeros(T, dtype=dtype)
    dhidden = policy.hidden.new_empty(T if want_dhidden else 0, H)
    dweight = value.new_zeros(V if want_dweight else 0, H)
    height = SPLIT_ROWS if group_name is not None else max(64, min(1024, LOGITS // V))
    for rows in (slice(start, start + height) for start in range(0, T, height)):
        of_rows, keeps = policy.rows(rows), kept[rows]
        block = _Block(of_rows, ref.rows(rows), keeps, dtype, beta)
        value[rows] = block.value(group_name).masked_fill(~keeps, 0)
        if not (want_dhidden or want_dweight):
            continue
        dz = block.gradient().masked_fill_(~keeps[:, None], 0)
        if want_dhidden:
            dhidden[rows] = _times(dz, policy.weight)
        if want_dweight:
            scaled = dz if of_rows.row_weight is None else dz.mul_(of_rows.row_weight[:, None])
            dweight.addmm_(scaled.T, _clean(of_rows.hidden, keeps, dtype))
    return value, dhidden, dweight.to(policy.weight.dtype)


class _Block:
    """Some rows: first their logits, then what the gradient is made of in the same memory, then the gradient."""

    def __init__(self, policy: Call, ref: Call, kept: torch.Tensor, dtype: torch.dtype, beta: float) -> None:
        self.beta = beta
        self.options = (policy.softcap, policy.logit_scale)
        self.z = _logits(_clean(policy.hidden, kept, dtype), policy.weight)
        self.ref_z = _logits(_clean(ref.hidden, kept, dtype), ref.weight)
        rows, width = self.z.shape
        step = max(1, (STEP_ON_GPU if self.z.is_cuda else STEP) // width)
        self.steps = [slice(start, start + step) for start in range(0, rows, step)]

    def value(self, group_name: str | None) -> torch.Tensor:
        """[R], and z becomes slope p g, ref_z slope p, with g = (1 - beta) log(p / m)."""
        tops, top_logp, lse, ref_tops, ref_top_logp, ref_lse, below = map(
            torch.cat, zip(*map(self._softmax, self.steps), strict=True)
        )
        shares = torch.zeros_like(torch.stack([lse, ref_lse]))
        rank = 0
        if group_name is not None:
            # The log-probabilities of a slice fall by that of the slice.
            rank = vocabulary.rank_in(group_name)
            all_lse = vocabulary.gathered(torch.stack([lse, ref_lse]), group_name).transpose(0, 1)
            shares = torch.stack([-softplus(vocabulary.others(some, rank) - some[rank]) for some in all_lse])
        top_logp, ref_top_logp = top_logp + shares[0], ref_top_logp + shares[1]
        apart = top_logp - (below + ref_top_logp)  # u of the policy's largest class
        if group_name is not None:
            both = vocabulary.gathered(torch.stack([top_logp, apart]), group_name)
            apart = both[:, 1].gather(0, both[:, 0].argmax(dim=0)[None])[0]
        value, own, rest = torch.empty_like(lse), torch.empty_like(lse), torch.empty_like(lse)
        for rows in self.steps:
            of_policy, of_ref = (tops[rows], top_logp[rows]), (ref_tops[rows], ref_top_logp[rows])
            value[rows], own[rows], rest[rows] = self._terms(rows, of_policy, of_ref, apart[rows] > 1)
        # Of the gradient, sum over v of p_v g_v but for the row's own largest class, in all slices.
        self.mean, self.rest = own + rest, rest
        if group_name is not None:
            sums = vocabulary.gathered(torch.stack([value, self.mean]), group_name)
            value = sums[:, 0].sum(dim=0)
            ranks = torch.arange(len(sums), device=sums.device)[:, None]
            self.rest = rest + sums[:, 1].masked_fill(ranks == rank, 0).sum(dim=0)
            self.mean = sums[:, 1].sum(dim=0)
        self.top, self.top_logp = tops[:, None], top_logp
        return value

    def _softmax(self, rows: slice) -> tuple[torch.Tensor, ...]:
        z, ref_z = (transform(logits[rows], *self.options) for logits in (self.z, self.ref_z))
        mine, other = softmax(z), softmax(ref_z)
        gap = ref_z.gather(1, mine.top[:, None]) - ref_z.gather(1, other.top[:, None])
        return mine.top, mine.top_logp, mine.lse, other.top, other.top_logp, other.lse, gap[:, 0]

    def _terms(
        self, rows: slice, policy: tuple[torch.Tensor, ...], ref: tuple[torch.Tensor, ...], apart: torch.Tensor
    ) -> list[torch.Tensor]:
        slopes = slope(self.z[rows], *self.options)
        log_p, log_q = (
            _log_softmax(transform(logits[rows], *self.options), *of)
            for logits, of in ((self.z, policy), (self.ref_z, ref))
        )
        p, q, beta = log_p.exp(), log_q.exp(), self.beta
        u = log_p - log_q
        if beta == 1:
            p_ratio, terms = u, torch.where(p == 0, 0, p * u)
            g = u
        else:
            positive = u >= 0
            # torch.where of two numbers would be of the default dtype.
            share = torch.full_like(u, 1 - beta).masked_fill_(positive, beta)
            mixed = torch.log1p(share * torch.expm1(-u.abs()))
            p_ratio = u.clamp(max=0) - mixed
            q_ratio = -u.clamp(min=0) - mixed
            terms = torch.where(p == 0, 0, (1 - beta) * p * p_ratio) + torch.where(q == 0, 0, beta * q * q_ratio)
            without_constant = -softplus(math.log(beta / (1 - beta)) - u)
            g = (1 - beta) * torch.where(apart[:, None], without_constant, p_ratio)
        pg = torch.where(p == 0, 0, p * g)
        top = policy[0][:, None]
        own = pg.gather(1, top)[:, 0]
        self.z[rows], self.ref_z[rows] = pg * slopes, p * slopes
        return [terms.sum(dim=1), own, pg.scatter(1, top, 0).sum(dim=1)]

    def gradient(self) -> torch.Tensor:
        """[R, V] d value / d (W h)."""
        # p slope and p g slope of the largest class: p slope (g (1 - p) - rest).
        own, share = self.z.gather(1, self.top), self.ref_z.gather(1, self.top)
        at_top = -own * torch.expm1(self.top_logp)[:, None] - share * self.rest[:, None]
        return self.z.sub_(self.ref_z.mul_(self.mean[:, None])).scatter_(1, self.top, at_top)


def _log_softmax(z: torch.Tensor, top: torch.Tensor, top_logp: torch.Tensor) -> torch.Tensor:
    """From the largest logit and its log-probability: a logsumexp would bring its rounding."""
    return z - z.gather(1, top[:, None]) + top_logp[:, None]


def _clean(hidden: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What dropped rows hold stays out of every sum."""
    return hidden.to(dtype).masked_fill(~kept[:, None], 0)


def _columns(weight: torch.Tensor) -> list[slice]:
    V = weight.shape[0]
    step = V if weight.dtype == compute_dtype(weight.dtype) else COLUMNS
    return [slice(start, start + step) for start in range(0, V, max(1, step))]


def _logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for columns in _columns(weight):
        out[:, columns] = hidden @ weight[columns].to(hidden.dtype).T
    return out


def _times(dz: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = dz.new_zeros(dz.shape[0], weight.shape[1])
    for columns in _columns(weight):
        out.addmm_(dz[:, columns], weight[columns].to(dz.dtype))
    return out
