"""The loss ops against a float64 formula in plain torch, over shapes, strides, dtypes, values and options.

The budget is the error of the same formula in the inputs' own dtype, times a small factor.
"""

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trace_kernels as tk
from trace_kernels.ops.linear_kl.cases import divergence
from trace_kernels.testing.conformance import ROUNDING

FACTOR = 2.0
BACKENDS = ("auto", "reference")

fuzz = settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def reduce(loss, counted, token_weight, reduction, normalizer):
    weights = counted.to(loss.dtype) if token_weight is None else torch.where(counted, token_weight, 0)
    loss = weights * torch.where(counted, loss, 0)
    if reduction == "none":
        return loss
    denominator = 1 if reduction == "sum" else weights.sum() if normalizer is None else normalizer
    return loss.sum() / denominator


def head(hidden, weight, bias, softcap, logit_scale):
    logits = (F.linear(hidden, weight) + (0 if bias is None else bias.to(hidden.dtype))) * logit_scale
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    return logits if logits.dtype == torch.float64 else logits.float()


def nll(logits, target, ignore_index):
    rows = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(rows, target.reshape(-1), ignore_index=ignore_index, reduction="none").view(target.shape)


@st.composite
def problems(draw):
    """Everything that a call of any of the losses may vary."""
    leading = draw(st.sampled_from([(), (0,), (1,), (5,), (37,), (2, 3), (2, 0), (3, 1, 4), (130,)]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    H, V = draw(st.sampled_from([1, 2, 17, 64])), draw(st.sampled_from([1, 2, 63, 300, 1025]))
    spread = draw(st.sampled_from([0.0, 1e-3, 1.0, 20.0]))
    strides = draw(st.sampled_from(["contiguous", "transposed", "gaps"]))

    def tensor(*shape, scale=1.0, kind=dtype):
        values = torch.randn(shape, generator=g, dtype=torch.float64).to(kind) * scale
        if strides == "transposed" and len(shape) > 1:
            return values.transpose(0, -1).contiguous().transpose(0, -1)
        if strides == "gaps" and shape:
            return torch.stack([values, torch.full_like(values, 7)], -1)[..., 0]
        return values

    ignore_index = draw(st.sampled_from([-100, -1, 0, 5000]))
    target = torch.randint(V, leading, generator=g)
    ignored = torch.rand(leading, generator=g) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    token_weight = None
    kind = draw(st.sampled_from(["none", "positive", "signed", "zeros", "expanded"]))
    if kind != "none":
        token_weight = tensor(*leading, kind=torch.float64 if dtype == torch.float64 else torch.float32)
        if kind == "positive":
            token_weight = token_weight.abs()
        elif kind == "zeros":
            token_weight = torch.where(token_weight > 0, token_weight, 0)
        elif kind == "expanded":
            token_weight = torch.tensor(0.6, dtype=token_weight.dtype).expand(leading)
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    normalizer = draw(st.sampled_from([None, None, 3, 2.5, torch.tensor(7)])) if reduction == "mean" else None
    return {
        "hidden": tensor(*leading, H, scale=spread),
        "weight": tensor(V, H, scale=H**-0.5),
        "bias": tensor(V) if draw(st.booleans()) else None,
        "ref_hidden": tensor(*leading, 3, scale=spread),
        "ref_weight": tensor(V, 3),
        "logits": tensor(*leading, V, scale=spread),
        "target": torch.where(ignored, ignore_index, target),
        "ignore_index": ignore_index,
        "token_weight": token_weight,
        "reduction": reduction,
        "normalizer": normalizer,
        "softcap": draw(st.sampled_from([None, None, 1.5, 30.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.3, -2.0])),
        "needs": {
            name: draw(st.booleans()) for name in ("hidden", "weight", "bias", "token_weight", "logits")
        },
    }  # fmt: skip


def evaluate(loss, problem, names, dtype=None):
    """The loss and its gradients, under names; `dtype`: what to convert the inputs to."""
    p = dict(problem)
    leaves = {}
    for name in names:
        if p[name] is not None:
            p[name] = p[name].detach() if dtype is None else p[name].detach().to(dtype)
            if p["needs"].get(name, False):
                p[name] = p[name].clone(memory_format=torch.preserve_format).requires_grad_()
                leaves[name] = p[name]
    value = loss(p)
    results = {"loss": value.detach()}
    if leaves and value.requires_grad:
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        gradients = torch.autograd.grad((value.double() * upstream).sum(), list(leaves.values()), allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            results[name] = torch.zeros_like(leaf) if gradient is None else gradient
            assert results[name].dtype == leaf.dtype
    return results


def condition(problem, counted, *logits):
    """How much one rounding of a logit may become: (in the loss and its gradients, relative to the loss)."""
    if not counted.any():
        return 0.0, 0.0
    weights = counted.double() if problem["token_weight"] is None else counted * problem["token_weight"].double()
    total = weights.abs().sum().item()
    relative = total / max(abs(weights.sum().item()), 1e-300) if problem["reduction"] == "mean" else 1.0
    if problem["reduction"] == "none":
        total = weights.abs().max().item()
    elif problem["reduction"] == "mean":
        total = relative if problem["normalizer"] is None else total / problem["normalizer"]
    size = max(z[counted].abs().max().item() for z in logits)
    factor = max(1.0, *(problem[name].abs().max().item() for name in ("hidden", "weight") if problem[name].numel()))
    return (1 + size) * factor * float(total), relative


def check(ours, plain, problem, names, counted, *logits):
    truth = evaluate(plain, problem, names, torch.float64)
    eager = evaluate(plain, problem, names)
    absolute, relative = condition(problem, counted, *logits)
    for backend in BACKENDS:
        results = evaluate(lambda p: ours(p, backend), problem, names)  # noqa: B023
        assert results.keys() == truth.keys()
        epsilon = torch.finfo(results["loss"].dtype).eps
        for name, expected in truth.items():
            got = results[name]
            assert got.shape == expected.shape
            if not expected.numel():
                continue
            if not torch.isfinite(expected).all():
                # Only a denominator of 0 does that here: the promise is 0 where the formula gives NaN.
                assert problem["reduction"] == "mean"
                assert not got.any()
                continue
            eager_error = (eager[name].double() - expected).abs().max().item()
            budget = FACTOR * eager_error + ROUNDING[got.dtype] * expected.abs().max().item() + relative * epsilon
            budget += 2 * epsilon * absolute * (1 + relative)
            error = (got.double() - expected).abs().max().item()
            assert error <= budget, f"{backend}, {name}: error {error:.3g}, allowed {budget:.3g}"


def options(p, *names):
    return {name: p[name] for name in (*names, "softcap", "logit_scale")}


@fuzz
@given(problems())
def test_linear_cross_entropy(p):
    counted = p["target"] != p["ignore_index"]

    def ours(p, backend):
        arguments = (p["hidden"], p["weight"], p["target"], p["token_weight"])
        kwargs = options(p, "bias", "ignore_index", "reduction", "normalizer")
        return tk.linear_cross_entropy(*arguments, **kwargs, backend=backend)

    def plain(p):
        logits = head(p["hidden"], p["weight"], p["bias"], p["softcap"], p["logit_scale"])
        loss = nll(logits, p["target"], p["ignore_index"])
        return reduce(loss, counted, p["token_weight"], p["reduction"], p["normalizer"])

    z = F.linear(p["hidden"].double(), p["weight"].double(), None if p["bias"] is None else p["bias"].double()) * 2
    check(ours, plain, p, ("hidden", "weight", "bias", "token_weight"), counted, z)


@fuzz
@given(problems())
def test_linear_log_prob(p):
    p = {**p, "token_weight": None, "reduction": "none"}
    counted = p["target"] != p["ignore_index"]

    def ours(p, backend):
        kwargs = options(p, "bias", "ignore_index")
        return tk.linear_log_prob(p["hidden"], p["weight"], p["target"], **kwargs, backend=backend)

    def plain(p):
        logits = head(p["hidden"], p["weight"], p["bias"], p["softcap"], p["logit_scale"])
        return -nll(logits, p["target"], p["ignore_index"])

    z = F.linear(p["hidden"].double(), p["weight"].double(), None if p["bias"] is None else p["bias"].double()) * 2
    check(ours, plain, p, ("hidden", "weight", "bias"), counted, z)
    # The eager budget is generous for low precision; the log-probability itself is not allowed to use it.
    in_double = {name: p[name] if p[name] is None else p[name].double() for name in ("hidden", "weight", "bias")}
    error = (ours(p, "auto").double() - plain({**p, **in_double})).abs()
    assert not error.numel() or error.max() <= 1e-4


@fuzz
@given(problems())
def test_cross_entropy(p):
    counted = p["target"] != p["ignore_index"]

    def ours(p, backend):
        kwargs = options(p, "ignore_index", "reduction", "normalizer")
        inplace = not p["logits"].is_leaf
        return tk.cross_entropy(p["logits"], p["target"], p["token_weight"], inplace=inplace, **kwargs, backend=backend)

    def ours_in_place(p, backend):
        return ours({**p, "logits": p["logits"].clone()}, backend)

    def plain(p):
        logits = p["logits"] * p["logit_scale"]
        logits = logits if p["softcap"] is None else torch.tanh(logits / p["softcap"]) * p["softcap"]
        loss = nll(logits if logits.dtype == torch.float64 else logits.float(), p["target"], p["ignore_index"])
        return reduce(loss, counted, p["token_weight"], p["reduction"], p["normalizer"])

    for function in (ours, ours_in_place):
        check(function, plain, p, ("logits", "token_weight"), counted, p["logits"].double() * 2)


@fuzz
@given(problems(), st.sampled_from([0.0, 0.0, 0.2, 0.5, 1.0]))
def test_linear_kl(p, beta):
    counted = p["target"] != p["ignore_index"]

    def ours(p, backend):
        arguments = (p["hidden"], p["weight"], p["ref_hidden"], p["ref_weight"], p["token_weight"])
        kwargs = options(p, "reduction", "normalizer")
        return tk.linear_kl(*arguments, mask=counted, beta=beta, **kwargs, backend=backend)

    def plain(p):
        log_p = head(p["hidden"], p["weight"], None, p["softcap"], p["logit_scale"]).log_softmax(-1)
        log_q = head(p["ref_hidden"], p["ref_weight"], None, p["softcap"], p["logit_scale"]).log_softmax(-1)
        kl = divergence(log_p, log_q, beta)
        return reduce(kl, counted, p["token_weight"], p["reduction"], p["normalizer"])

    z = F.linear(p["hidden"].double(), p["weight"].double()) * 2
    ref_z = F.linear(p["ref_hidden"].double(), p["ref_weight"].double()) * 2
    check(ours, plain, p, ("hidden", "weight", "ref_hidden", "ref_weight", "token_weight"), counted, z, ref_z)
