"""The loss ops inside torch: opcheck, fake tensors, compile, autocast, and what they refuse."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import trace_kernels as tk
from trace_kernels.testing.conformance import discover

T, H, V = 5, 6, 11
OPS = torch.ops.trace_kernels
BOTH = (False, True)


def tensors(dtype=torch.float32, hidden=False, weight=False, bias=None, row_weight=True):
    """Inputs of the low-level ops; `hidden`, `weight`, `bias`: whether they need a gradient (None: no bias)."""
    g = torch.Generator().manual_seed(0)
    target = torch.tensor([3, -100, 0, 10, 10])
    rows = torch.tensor([0.5, 1.0, 0.0, -2.0, 1.0]) if row_weight else None
    return (
        torch.randn(T, H, generator=g).to(dtype).requires_grad_(hidden),
        torch.randn(V, H, generator=g).to(dtype).requires_grad_(weight),
        None if bias is None else torch.randn(V, generator=g).requires_grad_(bias),
        target,
        rows,
    )


#: Of the low-level ops: the definition, and whatever serves the call here.
VARIANTS = pytest.mark.parametrize("softcap, backend", [(None, "reference"), (2.0, "auto")])
FLAGS = list(itertools.product(BOTH, BOTH, (None, *BOTH), BOTH))


@VARIANTS
@pytest.mark.parametrize("hidden, weight, bias, row_weight", FLAGS)
def test_opcheck_linear(hidden, weight, bias, row_weight, softcap, backend):
    arguments = tensors(torch.bfloat16 if softcap else torch.float32, hidden, weight, bias, row_weight)
    options = (-100, softcap, 0.7)
    torch.library.opcheck(OPS.linear_log_prob, (*arguments, *options, None, hidden, backend))
    torch.library.opcheck(OPS.linear_log_prob_sum, (*arguments, *options, hidden, weight or bool(bias), backend))


@VARIANTS
@pytest.mark.parametrize("hidden, weight, bias", list(itertools.product(BOTH, BOTH, (None, True))))
def test_opcheck_token_stats(hidden, weight, bias, softcap, backend):
    arguments = tensors(torch.float32, hidden, weight, bias)
    options = (-100, softcap, 0.7)
    one = torch.stack([arguments[3]], dim=1)
    several = torch.stack([arguments[3], torch.tensor([3, 1, -100, 2, 10])], dim=1)
    for target, entropy in ((one, True), (several, False)):
        call = (*arguments[:3], target, arguments[4], *options, hidden, entropy, backend)
        torch.library.opcheck(OPS.linear_token_stats, call)
    if softcap is not None:
        torch.library.opcheck(OPS.linear_mean_logit, (*arguments, *options))


@VARIANTS
@pytest.mark.parametrize("hidden, weight, row_weight", list(itertools.product(BOTH, BOTH, BOTH)))
def test_opcheck_kl(hidden, weight, row_weight, softcap, backend):
    policy_hidden, policy_weight, _, _, rows = tensors(torch.float32, hidden, weight, None, row_weight)
    # With a beta the backend does not matter.
    for beta in (0.0, 0.3) if backend == "reference" else (0.0,):
        arguments = (policy_hidden, policy_weight, torch.randn(T, 3), torch.randn(V, 3), rows, softcap, 0.7, beta)
        torch.library.opcheck(OPS.linear_kl, (*arguments, None, hidden, backend))
        torch.library.opcheck(OPS.linear_kl_sum, (*arguments, hidden, weight, backend))


@VARIANTS
@pytest.mark.parametrize("needs_gradient", BOTH)
def test_opcheck_cross_entropy(needs_gradient, softcap, backend):
    logits = torch.randn(T, V, requires_grad=needs_gradient)
    target = tensors()[3]
    for want_mean in BOTH:
        torch.library.opcheck(OPS.cross_entropy, (logits, target, -100, softcap, 0.7, want_mean, False, backend))


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_backward(dtype, softcap, backend):
    hidden, weight, bias, target, _ = tensors(dtype, bias=False)
    grad, lse, logp = torch.randn(T), torch.randn(T), -torch.rand(T)
    options = (softcap, 0.7)
    several = torch.stack([target, torch.tensor([1, 2, -100, 3, 4])], dim=1)
    values = torch.randn(T, 2)
    for head_bias in (None, bias):
        rows = (hidden, weight, head_bias, target, grad, -100, *options, logp, lse, backend)
        torch.library.opcheck(OPS.linear_log_prob_backward_weight, rows)
        for log, wanted in ((None, (False, True)), (grad, (True, False)), (grad, (True, True))):
            rows = (hidden, weight, head_bias, several, grad, -100, *options, lse, grad, log, values, *wanted, backend)
            torch.library.opcheck(OPS.linear_token_stats_backward, rows)
    torch.library.opcheck(OPS.linear_token_stats_dhidden, (hidden, weight, several, grad, values, lse))
    torch.library.opcheck(OPS.linear_mean_logit_backward, (grad, hidden, weight, bias, target, None, -100, *options))
    reference = (torch.randn(T, 3), torch.randn(V, 3))
    pivot = torch.tensor([0, 3, 10, 2, 2])
    known = (lse, lse, pivot, torch.rand(T), None, backend)
    for beta in (0.0, 0.3):
        arguments = (hidden, weight, *reference, grad, *options, beta, *known)
        torch.library.opcheck(OPS.linear_kl_backward_weight, arguments)
    logits = torch.randn(T, V).to(dtype)
    for uniform in (None, grad):
        arguments = (logits, target, lse, grad, uniform, grad, -100, *options, backend)
        torch.library.opcheck(OPS.cross_entropy_backward, arguments)
        torch.library.opcheck(OPS.cross_entropy_backward_, arguments)
    for stash, scale in (
        (hidden, grad),
        (hidden, torch.tensor(2.0)),
        (bias, torch.tensor(2.0)),
        (hidden[:0], grad[:0]),
    ):
        torch.library.opcheck(OPS.scale_stash, (stash, scale, torch.tensor(0.0)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("head_needs_gradient", BOTH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fakes_are_right_beyond_two_to_the_31(reduction, head_needs_gradient, dtype):
    big, vocabulary, width = 2**20, 2**19, 2**13
    with FakeTensorMode():
        hidden = torch.empty(2, big, width, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocabulary, width, dtype=dtype, requires_grad=head_needs_gradient)
        target = torch.zeros(2, big, dtype=torch.int64)
        token_weight = torch.ones(2, big)
        mask = torch.ones(2, big, dtype=torch.bool)
        logits = torch.empty(2, big, vocabulary, dtype=dtype, requires_grad=True)
        for loss, leaves in (
            (tk.linear_cross_entropy(hidden, weight, target, token_weight, reduction=reduction), (hidden, weight)),
            (
                tk.linear_kl(hidden, weight, hidden, weight, token_weight, mask=mask, reduction=reduction),
                (hidden, weight),
            ),
            (tk.linear_log_prob(hidden, weight, target), (hidden, weight)),
            (tk.linear_token_stats(hidden, weight, target).entropy, (hidden, weight)),
            (tk.cross_entropy(logits, target, token_weight, reduction=reduction), (logits,)),
        ):
            assert loss.dtype == torch.float32
            assert loss.shape in ((), (2, big))
            leaves = [leaf for leaf in leaves if leaf.requires_grad]
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss.sum(), leaves), strict=True):
                assert gradient.shape == leaf.shape
                assert gradient.dtype == leaf.dtype


def test_meta_tensors():
    hidden = torch.empty(3, 4, 8, device="meta", requires_grad=True)
    target = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    loss = tk.linear_cross_entropy(hidden, torch.empty(9, 8, device="meta"), target, reduction="none")
    assert loss.shape == (3, 4)
    loss.sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_compiles_once_for_all_lengths():
    """One graph with a symbolic length and a symbolic normalizer."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    def step(hidden, weight, target, token_weight, number):
        loss = tk.linear_cross_entropy(hidden.tanh(), weight, target, token_weight, logit_scale=0.7)
        loss = loss + tk.linear_cross_entropy(hidden, weight, target, token_weight, normalizer=number)
        kl = sum(tk.linear_kl(hidden, weight, hidden, weight, beta=beta) for beta in (0.0, 0.3))
        return loss + tk.linear_log_prob(hidden, weight, target).mean() + kl

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for length, number in ((5, 0.5), (7, 0.7), (12, 0.9)):
        hidden, weight = torch.randn(length, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        target, token_weight = torch.randint(V, (length,)), torch.rand(length)
        got = torch.autograd.grad(compiled(hidden, weight, target, token_weight, number), (hidden, weight))
        expected = torch.autograd.grad(step(hidden, weight, target, token_weight, number), (hidden, weight))
        torch.testing.assert_close(got, expected)
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiles_with_inductor():
    torch._dynamo.reset()
    hidden, weight, _, target, token_weight = tensors(hidden=True, weight=True)

    def step(hidden, weight, token_weight):
        loss = tk.linear_cross_entropy(hidden * 2, weight, target, token_weight)
        return loss + tk.cross_entropy(F.linear(hidden, weight), target, token_weight, inplace=True)

    for needs_gradient in BOTH:
        leaves = (hidden, weight, token_weight) if needs_gradient else (hidden, weight)
        token_weight.requires_grad_(needs_gradient)
        got = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden, weight, token_weight), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(step(hidden, weight, token_weight), leaves))


@pytest.mark.parametrize("head_needs_gradient", BOTH)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_is_that_of_linear(head_needs_gradient, reduction):
    """Operands are rounded to bfloat16, products and losses are not; gradients arrive in the leaves' dtype."""
    hidden, weight, bias, target, _ = tensors(hidden=True, weight=head_needs_gradient, bias=True)
    leaves = (hidden, weight, bias) if head_needs_gradient else (hidden, bias)
    rounded = hidden.bfloat16().double(), weight.bfloat16().double()
    nll = F.cross_entropy(F.linear(*rounded, bias.double()), target, reduction="none")
    truth = nll.sum() / (target != -100).sum() if reduction == "mean" else nll
    expected = torch.autograd.grad(truth.sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tk.linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction)
        kl = tk.linear_kl(hidden, weight, hidden + 1e-3, weight, reduction=reduction)
        logp = tk.linear_log_prob(hidden, weight, target, bias=bias)
        compiled = torch.compile(tk.linear_log_prob, fullgraph=True, backend="aot_eager")(
            hidden, weight, target, bias=bias
        )
    assert loss.dtype == kl.dtype == logp.dtype == torch.float32
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logp.double(), -nll, rtol=1e-6, atol=1e-5)
    assert torch.equal(compiled, logp)
    for leaf, gradient, wanted in zip(leaves, torch.autograd.grad(loss.sum(), leaves), expected, strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient, wanted, rtol=1e-2, atol=1e-2)


def test_autocast_leaves_float64_alone():
    hidden, weight, _, target, _ = tensors(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = tk.linear_log_prob(hidden, weight, target)
    assert torch.equal(logp, tk.linear_log_prob(hidden, weight, target))


hidden, weight, bias, target, rows = tensors(bias=False)
LCE = (hidden, weight, target)
KL = (hidden, weight, hidden, weight)
REFUSED = [
    (tk.linear_cross_entropy, LCE, {"token_weight": rows[:-1]}, ValueError, r"token_weight: got shape \[4\]"),
    (tk.linear_cross_entropy, LCE, {"token_weight": rows > 0}, TypeError, "token_weight: got dtype bool"),
    (tk.linear_cross_entropy, LCE, {"token_weight": 2.0}, TypeError, "token_weight: got float"),
    (tk.linear_cross_entropy, LCE, {"reduction": "avg"}, ValueError, "reduction: got 'avg'"),
    (tk.linear_cross_entropy, LCE, {"normalizer": "x"}, TypeError, "normalizer: got str"),
    (tk.linear_cross_entropy, LCE, {"normalizer": True}, TypeError, "normalizer: got bool"),
    (tk.linear_cross_entropy, LCE, {"normalizer": rows}, ValueError, "normalizer: got shape"),
    (tk.linear_cross_entropy, LCE, {"normalizer": torch.tensor(True)}, TypeError, "normalizer: got dtype bool"),
    (tk.linear_cross_entropy, LCE, {"normalizer": 2, "reduction": "sum"}, ValueError, "normalizer: given with"),
    (tk.linear_cross_entropy, LCE, {"softcap": 0.0}, ValueError, "softcap: got 0.0"),
    (tk.linear_cross_entropy, LCE, {"softcap": float("inf")}, ValueError, "softcap: got inf"),
    (tk.linear_log_prob, LCE, {"softcap": 1e39}, ValueError, r"softcap: got 1e\+39, .* from 1e-30 to 1e30"),
    (tk.cross_entropy, (hidden, target), {"softcap": 1e38}, ValueError, r"softcap: got 1e\+38"),
    (tk.linear_kl, KL, {"beta": 1.5}, ValueError, "beta: got 1.5, allowed is a number from 0 to 1"),
    (tk.linear_kl, KL, {"beta": math.nan}, ValueError, "beta: got nan"),
    (tk.linear_kl, KL, {"beta": "0.5"}, TypeError, "beta: got"),
    (tk.linear_kl, KL, {"softcap": 1e-50}, ValueError, "softcap: got 1e-50"),
    (tk.linear_cross_entropy, LCE, {"logit_scale": float("nan")}, ValueError, "logit_scale: got nan"),
    (tk.linear_cross_entropy, LCE, {"logit_scale": None}, TypeError, "logit_scale: got NoneType"),
    (tk.linear_cross_entropy, LCE, {"ignore_index": 1.5}, TypeError, "ignore_index: got float"),
    (tk.linear_cross_entropy, LCE, {"bias": bias[:-1]}, ValueError, r"bias: got shape \[10\], .* \[V\] = \[11\]"),
    (tk.linear_cross_entropy, LCE, {"bias": bias.long()}, TypeError, "bias: got dtype int64"),
    (tk.linear_cross_entropy, LCE, {"bias": bias.to("meta")}, ValueError, "bias: is on meta, allowed is cpu"),
    (tk.linear_cross_entropy, (hidden, weight.double(), target), {}, TypeError, "weight: got dtype float64"),
    (tk.linear_cross_entropy, (hidden, weight[:, 1:], target), {}, ValueError, "weight: got shape"),
    (tk.linear_cross_entropy, (hidden, weight[0], target), {}, ValueError, "weight: got shape"),
    (tk.linear_cross_entropy, (hidden, weight[:0], target), {}, ValueError, "weight: got shape .* at least one"),
    (tk.linear_cross_entropy, (hidden.long(), weight, target), {}, TypeError, "hidden: got dtype int64"),
    (tk.linear_cross_entropy, (hidden.tolist(), weight, target), {}, TypeError, "hidden: got list"),
    (tk.linear_cross_entropy, (hidden, weight, target[:-1]), {}, ValueError, "target: got shape"),
    (tk.linear_cross_entropy, (hidden, weight, target.int()), {}, TypeError, "target: got dtype int32, allowed: int64"),
    (tk.linear_cross_entropy, (hidden, weight, target + 1), {}, ValueError, "target: got -99 at flat"),
    (tk.linear_log_prob, (hidden, weight, target.clamp(-1)), {}, ValueError, "target: got -1 at flat position 1"),
    (tk.linear_log_prob, LCE, {"ignore_index": -1}, ValueError, "target: got -100 at flat position 1"),
    (tk.linear_log_prob, (hidden[0, 0], weight, target), {}, ValueError, "hidden: got a 0-d tensor"),
    (tk.linear_cross_entropy, (hidden[:, :0], weight[:, :0], target), {}, ValueError, r"hidden: got shape \[5, 0\]"),
    (tk.linear_log_prob, (hidden[:, :0], weight[:, :0], target), {}, ValueError, r"hidden: got shape \[5, 0\]"),
    (tk.linear_kl, (hidden[:, :0], weight[:, :0], hidden, weight), {}, ValueError, r"hidden: got shape \[5, 0\]"),
    (tk.linear_kl, (hidden, weight, hidden[:, :0], weight[:, :0]), {}, ValueError, r"ref_hidden: got shape \[5, 0\]"),
    (tk.cross_entropy, (hidden, target), {}, ValueError, r"target: got 10 at flat position 3, allowed are \[0, 6\)"),
    (tk.cross_entropy, (hidden, target[:2]), {}, ValueError, "target: got shape .* the leading shape of logits"),
    (tk.cross_entropy, (hidden[:, :0], target), {}, ValueError, "logits: got shape"),
    (tk.linear_kl, (hidden, weight, hidden[1:], weight), {}, ValueError, "ref_hidden: got shape"),
    (tk.linear_kl, (hidden, weight, hidden, weight[1:]), {}, ValueError, "ref_weight: got shape"),
    (tk.linear_kl, (hidden, weight, hidden, weight[:, 1:]), {}, ValueError, "ref_weight: got shape .* ref_hidden"),
    (tk.linear_kl, (hidden, weight, hidden, weight.half()), {}, TypeError, "ref_weight: got dtype float16"),
    (tk.linear_kl, KL, {"mask": rows}, TypeError, "mask: got dtype float32, allowed: bool"),
    (tk.linear_kl, KL, {"mask": rows[1:] > 0}, ValueError, "mask: got shape"),
]  # fmt: skip


@pytest.mark.parametrize("function, arguments, options, error, message", REFUSED)
def test_refusals_name_the_argument(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **options)


@pytest.mark.parametrize(
    "function, arguments", [(tk.linear_cross_entropy, LCE), (tk.linear_log_prob, LCE), (tk.linear_kl, KL)]
)
def test_unknown_backend(function, arguments):
    with pytest.raises(tk.BackendError, match="allowed are 'auto'"):
        function(*arguments, backend="fastest")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_entropy", "linear_cross_entropy", "linear_kl", "linear_log_prob"])
def test_peers_compute_the_same(name):
    """A benchmark against a peer that computes something else would say nothing."""
    op = discover()[name]
    cases = [case for case in op.cases if case.name in ("batch", "normalizer", "expanded_weights")]
    for peer, case in itertools.product(op.peers.values(), cases):
        call = case.call()
        try:
            got = peer(*call.args, **call.kwargs)
        except ImportError:
            continue
        torch.testing.assert_close(got, op.eager(*call.args, **call.kwargs))
