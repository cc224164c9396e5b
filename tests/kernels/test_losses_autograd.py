"""Laws of the loss ops under autograd: what a second backward gives, and what is and is not computed or stored."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_losses import LOSSES, REDUCTIONS, H, T, V, inputs, kl, linear_ce
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import trace_kernels as tk
from trace_kernels.ops.linear_cross_entropy.op import log_prob_sum


@LOSSES
@REDUCTIONS
@pytest.mark.parametrize("frozen", [False, True])
def test_backward_twice_gives_the_same(loss, reduction, frozen):
    hidden, weight, target, token_weight = inputs(torch.float32)
    weight.requires_grad_(not frozen)
    leaves = [hidden] if frozen else [hidden, weight]
    result = loss(hidden, weight, target, token_weight, reduction=reduction).sum()
    first = torch.autograd.grad(result, leaves, retain_graph=True)
    second = torch.autograd.grad(result, leaves)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@LOSSES
@REDUCTIONS
@pytest.mark.parametrize("leaf", [0, 1])
def test_second_order_raises(loss, reduction, leaf):
    arguments = inputs()
    result = loss(*arguments[:3], reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(result, arguments[leaf], create_graph=True)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(loss(*arguments[:3], reduction=reduction).sum(), arguments[leaf])[0]
    )
    with pytest.raises(RuntimeError, match="second-order gradients"):
        gradient.square().sum().backward()


def test_second_order_raises_in_place_too():
    logits = torch.randn(4, V, requires_grad=True)
    loss = tk.cross_entropy(logits, torch.arange(4), inplace=True)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients"):
        gradient.square().sum().backward()


class Seen(TorchDispatchMode):
    """The calls of this package's ops, with the shapes of what they return."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "trace_kernels":
            outputs = result if isinstance(result, (tuple, list)) else [result]
            self.calls.append((function._opname, [tuple(output.shape) for output in outputs if output is not None]))
        return result

    @property
    def names(self):
        return [name for name, _ in self.calls]

    def shapes(self):
        return [shape for _, shapes in self.calls for shape in shapes]


def test_nothing_is_stashed_without_gradients():
    hidden, weight, target, token_weight = inputs(torch.float32)
    calls = [
        lambda: tk.linear_log_prob(hidden, weight, target),
        *(
            lambda loss=loss, r=r: loss(hidden, weight, target, token_weight, reduction=r)
            for loss in (linear_ce, kl)
            for r in ("mean", "none")
        ),
    ]
    for call in calls:
        with torch.no_grad(), Seen() as seen:
            call()
        assert seen.calls
        assert all(math.prod(shape) <= T for shape in seen.shapes()), seen.calls


@pytest.mark.parametrize("loss", [linear_ce, kl])
@REDUCTIONS
@pytest.mark.parametrize("weights_need_gradient", [False, True])
def test_frozen_head_never_computes_its_gradient(loss, reduction, weights_need_gradient):
    hidden, weight, target, token_weight = inputs(torch.float32)
    token_weight.requires_grad_(weights_need_gradient)
    with Seen() as seen:
        loss(hidden, weight.detach(), target, token_weight, reduction=reduction).sum().backward()
    assert not any("backward_weight" in name for name in seen.names)
    assert (V, H) not in seen.shapes()
    assert (T, H) in seen.shapes()


@pytest.mark.parametrize("loss", [linear_ce, kl])
def test_known_weights_need_no_recomputation(loss):
    hidden, weight, target, token_weight = inputs(torch.float32)
    with Seen() as seen:
        loss(hidden, weight, target, token_weight).backward()
    assert not any("backward_weight" in name for name in seen.names)
    with Seen() as seen:
        loss(hidden, weight, target, token_weight, reduction="none").sum().backward()
    assert sum("backward_weight" in name for name in seen.names) == 1


@pytest.mark.parametrize("name, size", [("linear_ce", -20), ("log_prob_sum", -20), ("kl", -14), ("kl", -1)])
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_float16_head_keeps_its_digits_under_a_loss_scale(name, size, backend):
    # A gradient stored before the scale is known would lose what the scale is there for.
    rows, width, classes, scale = 150, 8, 70, 65536.0
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).half()
    ref_hidden = (hidden.float() + 0.02 * torch.randn(rows, width, generator=g)).half()
    head = (0.05 * torch.randn(classes, width, generator=g)).half()
    target = torch.randint(classes, (rows,), generator=g)
    weights = torch.full((rows,), 2.0**size)

    def ours(weight):
        if name == "linear_ce":
            return tk.linear_cross_entropy(hidden, weight, target, weights, reduction="sum", backend=backend)
        if name == "log_prob_sum":
            return -log_prob_sum(hidden, weight, target, weights, backend=backend)[0]
        return tk.linear_kl(hidden, weight, ref_hidden, head, weights, reduction="sum", backend=backend)

    def plain(weight):
        wide = torch.promote_types(weight.dtype, torch.float32)
        log_p = (hidden.to(weight.dtype) @ weight.T).to(wide).log_softmax(-1)
        if name != "kl":
            return -log_p.gather(1, target[:, None]).sum() * 2.0**size
        log_q = (ref_hidden.to(weight.dtype) @ head.to(weight.dtype).T).to(wide).log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum() * 2.0**size

    def gradient(loss, weight):
        weight = weight.clone().requires_grad_()
        return torch.autograd.grad(loss(weight) * scale, weight)[0].double()

    try:
        got = gradient(ours, head)
    except tk.BackendError as error:
        pytest.skip(str(error))
    truth, eager = gradient(plain, head.double()), gradient(plain, head)
    assert (got - truth).norm() <= max((eager - truth).norm(), 2e-3 * truth.norm())


@pytest.mark.parametrize("loss", [linear_ce, kl])
@REDUCTIONS
def test_batched_gradients(loss, reduction):
    leaves = inputs(torch.float32)
    result, upstream = loss(*leaves[:3], reduction=reduction).sum(), torch.tensor([1.0, -0.5, 0.0])
    one_by_one = [torch.autograd.grad(result, leaves[:2], number, retain_graph=True) for number in upstream]
    batched = torch.autograd.grad(result, leaves[:2], upstream, is_grads_batched=True)
    for got, *expected in zip(batched, *one_by_one, strict=True):
        torch.testing.assert_close(got, torch.stack(expected))
    jacobian = torch.autograd.functional.jacobian(
        lambda h, w: loss(h, w, leaves[2], reduction=reduction).sum(), leaves[:2], vectorize=True
    )
    torch.testing.assert_close(jacobian, one_by_one[0])


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_log_prob", "linear_kl", "cross_entropy"])
def test_forward_mode_is_refused(name):
    hidden, weight, target, token_weight = (leaf.detach() for leaf in inputs())

    def loss(hidden, weights=None):
        if name == "cross_entropy":
            return tk.cross_entropy(hidden, target % H, weights)
        others = (target, weights) if name == "linear_cross_entropy" else (target,)
        return getattr(tk, name)(hidden, weight, *((hidden, weight, weights) if name == "linear_kl" else others)).sum()

    one = torch.ones_like(hidden)
    with pytest.raises(NotImplementedError, match=r"(hidden|logits): got a tangent"):
        torch.func.jvp(loss, (hidden,), (one,))
    with pytest.raises(NotImplementedError, match=r"(hidden|logits): got a tangent"):
        torch.func.jacfwd(torch.func.grad(loss))(hidden)
    with pytest.raises(NotImplementedError, match=r"(hidden|logits): got a tangent"), forward_ad.dual_level():
        loss(forward_ad.make_dual(hidden, one))
    if name != "linear_log_prob":
        with pytest.raises(NotImplementedError, match="token_weight: got a tangent"):
            torch.func.jvp(lambda weights: loss(hidden, weights), (token_weight,), (token_weight,))
    # What does not depend on the input is a constant there too.
    value, tangent = torch.func.jvp(lambda x: x.sum() + loss(hidden), (hidden,), (one,))
    torch.testing.assert_close(value, hidden.sum() + loss(hidden))
    assert tangent == one.sum()


def test_tied_embeddings():
    """The head's gradient and the embedding's add up."""
    _, weight, target, token_weight = inputs()
    tokens = torch.arange(T) % V
    tk.linear_cross_entropy(F.embedding(tokens, weight), weight, target, token_weight).backward()
    other = weight.detach().clone().requires_grad_()
    nll = F.cross_entropy(F.embedding(tokens, other) @ other.T, target, reduction="none")
    counted = token_weight * (target != -100)
    ((nll * counted).sum() / counted.sum()).backward()
    torch.testing.assert_close(weight.grad, other.grad)


@LOSSES
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(loss, reentrant):
    hidden, weight, target, token_weight = inputs()
    plain = torch.autograd.grad(loss(hidden * 2, weight, target, token_weight), (hidden, weight))
    result = checkpoint(lambda h: loss(h * 2, weight, target, token_weight), hidden, use_reentrant=reentrant)
    result.backward()
    torch.testing.assert_close((hidden.grad, weight.grad), plain, rtol=0, atol=0)


def test_in_place_gradient_where_rows_share_memory():
    target = torch.randint(V, (T,))
    for view in (
        lambda x: x[: T + V - 1].unfold(0, V, 1),
        lambda x: x[: 3 * T + V - 3].unfold(0, V, 3),
        lambda x: x[:V].expand(T, V),
        lambda x: x[:T].view(T, 1).expand(T, V),
    ):
        base = torch.randn(4 * T * V, requires_grad=True)
        gradients = []
        for inplace in (False, True):
            loss = tk.cross_entropy(view(base * 1), target, inplace=inplace)
            gradients.append(torch.autograd.grad(loss, base)[0])
        torch.testing.assert_close(*gradients)


def test_in_place_gradient_overwrites_the_logits():
    for shape in ((T, V), (3, T, V)):
        logits = torch.randn(shape, requires_grad=True)
        target = torch.randint(V, shape[:-1])
        expected = torch.autograd.grad(tk.cross_entropy(logits, target), logits)[0]
        copy = logits.clone()
        result = tk.cross_entropy(copy, target, inplace=True)
        result.backward(retain_graph=True)
        torch.testing.assert_close(logits.grad, expected, rtol=0, atol=0)
        assert torch.equal(copy.detach(), expected)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()
        # Not asked for, not done.
        before = logits.detach().clone()
        tk.cross_entropy(logits, target).backward()
        assert torch.equal(logits.detach(), before)
