"""Where a class is nearly certain: the definition against a formula that keeps its digits, and what this CPU runs.

The cases named ``sure_*`` hold every backend to the reference in float64; here that reference is held to account,
and the ways through an op that the cases do not take.
"""

import math

import mpmath
import pytest
import torch

import trace_kernels as tk
from trace_kernels.runtime import native
from trace_kernels.testing.cases import Case
from trace_kernels.testing.linear_cases import sure_logits

T, V = 6, 40
LEADS = (0, 5, 20, 30, 50, 80)
BACKENDS = ("reference", "cpu")
ISAS = native.native().available_isas() if native.cpu_unavailable() is None else ()


def inputs(kind, lead):
    target = torch.arange(T) * 7 % V
    case = Case("sure", {"T": T, "V": V}, lambda *_: NotImplemented)
    return sure_logits(case, torch.Generator().manual_seed(1), kind, float(lead), target), target


def exact(logits, target):
    """Log p [T] and d log p / dz [T, V], number by number in Python's floats, without a difference of nearly equals."""
    logp, gradient = [], []
    for row, label in zip(logits.tolist(), target.tolist(), strict=True):
        top = max(range(V), key=row.__getitem__)
        rest = math.fsum(math.exp(z - row[top]) for v, z in enumerate(row) if v != top)
        p = [math.exp(z - row[top]) / (1 + rest) for z in row]
        logp.append(-math.log1p(rest) if label == top else row[label] - row[top] - math.log1p(rest))
        others = math.fsum(p[v] for v in range(V) if v != label)  # 1 - p of the label
        gradient.append([others if v == label else -p[v] for v in range(V)])
    return torch.tensor(logp, dtype=torch.float64), torch.tensor(gradient, dtype=torch.float64)


def worst(got, expected):
    """Relative to the number itself, and for rows to their largest."""
    scale = expected.abs() if expected.dim() < 2 else expected.abs().amax(dim=-1, keepdim=True)
    return ((got.double() - expected).abs() / scale).max().item()


def budget(lead, dtype):
    return 1e-12 if dtype == torch.float64 else 1e-5 + 4 * 2.0**-24 * lead


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("kind", ["target", "wrong", "tie"])
@pytest.mark.parametrize(
    "dtype, backend", [(torch.float64, "reference"), *((torch.float32, name) for name in BACKENDS)]
)
def test_digits(kind, lead, dtype, backend):
    if backend == "cpu" and not ISAS:
        pytest.skip("not built")
    logits, target = inputs(kind, lead)
    logp, dz = exact(logits, target)
    leaf = logits.to(dtype).requires_grad_()
    eye = torch.eye(V, dtype=dtype, requires_grad=True)
    allowed = budget(lead, dtype)

    got = -tk.cross_entropy(leaf, target, reduction="none", backend=backend)
    assert worst(got, logp) <= allowed
    assert worst(torch.autograd.grad(got.sum(), leaf)[0], dz) <= allowed

    bias = torch.zeros(V, dtype=dtype, requires_grad=True)
    upstream = torch.linspace(0.5, 2, T, dtype=dtype)
    dweight, dbias = (dz * upstream.double()[:, None]).T @ logits.double(), (dz.T @ upstream.double())
    for form in ("log_prob", "sum", "stats", "several"):
        if form == "sum":
            total = -tk.linear_cross_entropy(leaf, eye, target, upstream, bias=bias, reduction="sum", backend=backend)
        else:
            if form == "log_prob":
                got = tk.linear_log_prob(leaf, eye, target, bias=bias, backend=backend)
            elif form == "stats":
                got = tk.linear_token_stats(leaf, eye, target, bias=bias, backend=backend).log_prob
            else:
                both = torch.stack([(target + 3) % V, target], dim=1)
                got = tk.linear_log_prob(leaf, eye, both, bias=bias, backend=backend)[:, 1]
            assert worst(got, logp) <= allowed, form
            total = (got * upstream).sum()
        gradients = torch.autograd.grad(total, (leaf, eye, bias))
        for gradient, expected in zip(gradients, (dz * upstream.double()[:, None], dweight, dbias), strict=True):
            assert worst(gradient, expected) <= allowed, form


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [3, 80])
def test_head_gradient_of_every_instruction_set(isa, rows, monkeypatch):
    """The known weights' p of rows beyond the H-th is computed again, of those before it kept."""
    monkeypatch.setenv("TRACE_KERNELS_ISA", isa)
    logits, target = inputs("target", 30)
    logits, target = logits.repeat(rows, 1), target.repeat(rows)
    _, dz = exact(logits, target)
    for reduction in ("sum", "none"):
        eye, bias = torch.eye(V, requires_grad=True), torch.zeros(V, requires_grad=True)
        loss = tk.linear_cross_entropy(logits, eye, target, bias=bias, reduction=reduction, backend="cpu").sum()
        dweight, dbias = torch.autograd.grad(-loss, (eye, bias))
        assert worst(dweight, dz.T @ logits.double()) <= 2e-5
        assert worst(dbias, dz.sum(dim=0)) <= 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lead", [5, 20, 40])
@pytest.mark.parametrize("group", ["one_head", "two_heads"])
def test_divergence_of_two_models_that_are_sure_of_the_same(backend, lead, group):
    if backend == "cpu" and not ISAS:
        pytest.skip("not built")
    logits, target = inputs("target", lead)
    ref_logits, _ = inputs("target", lead + 1)
    ref_logits = ref_logits.flip(1).contiguous()
    ref_logits[torch.arange(T), V - 1 - target] = 0.25
    ref_logits[torch.arange(T), target] = lead + 1.0
    _, dz = exact(logits, target)
    ref_logp, ref_dz = exact(ref_logits, target)
    logp, _ = exact(logits, target)
    difference = ref_dz - dz  # p - q
    difference[torch.arange(T), target] = torch.expm1(logp) - torch.expm1(ref_logp)
    leaf, eye = logits.clone().requires_grad_(), torch.eye(V, requires_grad=True)
    ref_eye = eye.detach() if group == "one_head" else torch.eye(V)
    for reduction in ("sum", "none"):
        kl = tk.linear_kl(leaf, eye, ref_logits, ref_eye, reduction=reduction, backend=backend).sum()
        dhidden, dweight = torch.autograd.grad(kl, (leaf, eye))
        assert worst(dhidden, difference) <= budget(lead, torch.float32)
        assert worst(dweight, difference.T @ logits.double()) <= budget(lead, torch.float32)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("lead", [0, 5, 20, 40, 80])
@pytest.mark.parametrize("same", [True, False], ids=["of_the_same", "of_others"])
def test_divergence_with_a_beta_of_models_that_are_sure(beta, lead, same):
    mpmath.mp.dps = 120
    logits, target = (values[:4] for values in inputs("target", lead))
    ref_logits = logits.flip(1).contiguous()
    ref_logits[torch.arange(4), target if same else (target + 1) % V] = lead + 1.0
    if same:
        ref_logits[torch.arange(4), V - 1 - target] = 0.25
    expected, expected_dz = [], []
    for row, ref_row in zip(logits.tolist(), ref_logits.tolist(), strict=True):
        p, q = ([mpmath.exp(z) for z in some] for some in (row, ref_row))
        p, q = [x / mpmath.fsum(p) for x in p], [x / mpmath.fsum(q) for x in q]
        m = [(1 - mpmath.mpf(beta)) * x + mpmath.mpf(beta) * y for x, y in zip(p, q, strict=True)]
        if beta == 1:
            m, scale = q, 1
        else:
            scale = 1 - mpmath.mpf(beta)
        g = [mpmath.log(x / y) for x, y in zip(p, m, strict=True)]
        kl = mpmath.fsum(x * y for x, y in zip(p, g, strict=True))
        of_ref = 0 if beta == 1 else mpmath.fsum(y * mpmath.log(y / x) for x, y in zip(m, q, strict=True))
        expected.append(float(scale * kl + beta * of_ref))
        expected_dz.append([float(scale * x * (y - kl)) for x, y in zip(p, g, strict=True)])
    leaf, eye = logits.clone().requires_grad_(), torch.eye(V, requires_grad=True)
    value = tk.linear_kl(leaf, eye, ref_logits, torch.eye(V), reduction="none", beta=beta)
    dz, dweight = torch.autograd.grad(value.sum(), (leaf, eye))
    exact_dz = torch.tensor(expected_dz, dtype=torch.float64)
    allowed = budget(lead, torch.float32)
    assert worst(value.detach(), torch.tensor(expected, dtype=torch.float64)) <= allowed
    assert worst(dz, exact_dz) <= allowed
    assert worst(dweight, exact_dz.T @ logits.double()) <= allowed


def test_token_stats_where_a_class_is_nearly_certain():
    logits, target = inputs("wrong", 30)
    stats = tk.linear_token_stats(logits, torch.eye(V), target)
    logp, _ = exact(logits, (target + 1) % V)
    assert not stats.is_top1.any()
    rest = -torch.expm1(logp)
    others = logits.double().scatter(1, ((target + 1) % V)[:, None], -torch.inf)
    share = torch.exp(others - torch.logsumexp(others, 1)[:, None])
    inner = -(share * (share + 1e-300).log()).sum(dim=1)
    entropy = -(1 - rest) * logp + rest * (inner - rest.log())
    assert worst(stats.entropy, entropy) <= 2e-5
    stats = tk.linear_token_stats(logits, torch.eye(V), (target + 1) % V)
    assert stats.is_top1.all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_count_for_the_lowest_index(backend):
    if backend == "cpu" and not ISAS:
        pytest.skip("not built")
    hidden, weight = torch.ones(3, 4), torch.zeros(1000, 4)
    weight[[5, 300, 999]] = 1.0  # in three tiles
    hits = tk.linear_token_stats(hidden, weight, torch.tensor([5, 300, 999]), backend=backend).is_top1
    assert hits.tolist() == [True, False, False]
