"""Laws of `router_topk` under autograd: what it keeps, what is differentiable, and what it refuses."""

import pytest
import torch

import trace_kernels as tk
from trace_kernels.runtime import light_op
from trace_kernels.runtime.backends import all_ops

CPU = [b.name for b in all_ops()["router_topk"] if b.unavailable() is None and b.name in ("reference", "cpu")]


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("past", [True, False])
def test_second_order_gradients_raise(backend, past, monkeypatch):
    if not past:
        monkeypatch.setattr(light_op, "bypasses", lambda *tensors: False)
    logits = torch.randn(3, 8, requires_grad=True)
    for options in ({}, {"renormalize": False}, {"score_function": "sigmoid", "renormalize": False}):
        for power in (1, 2):  # with a constant upstream gradient, and with one that has a gradient of its own
            weights, _ = tk.router_topk(logits * 1, 2, **options, backend=backend)
            (gradient,) = torch.autograd.grad(weights.pow(power).sum(), logits, create_graph=True)
            with pytest.raises(RuntimeError, match="second-order gradients of router_topk"):
                (gradient.sum() + logits.sum()).backward()


@pytest.mark.parametrize("past", [True, False])
def test_forward_mode_raises(past, monkeypatch):
    if not past:
        monkeypatch.setattr(light_op, "bypasses", lambda *tensors: False)
    logits, tangent = torch.randn(3, 8), torch.randn(3, 8)
    fixed = torch.randn(3, 8, requires_grad=True)

    def route(z):
        return tk.router_topk(z, 2)[0]

    def dual():
        with torch.autograd.forward_ad.dual_level():
            return route(torch.autograd.forward_ad.make_dual(logits, tangent))

    for forward_mode in (
        dual,
        lambda: torch.func.jvp(route, (logits,), (tangent,)),
        lambda: torch.func.jacfwd(route)(logits),
        lambda: torch.func.jvp(torch.func.grad(lambda z: route(z)[0, 0]), (logits,), (tangent,)),
    ):
        with pytest.raises(RuntimeError, match="forward-mode differentiation of router_topk"):
            forward_mode()
    # Logits without a tangent are constants, whatever else has one.
    _, result = torch.func.jvp(lambda x: x * route(fixed).sum(), (logits,), (tangent,))
    torch.testing.assert_close(result, tangent * route(fixed).sum())
    with torch.autograd.forward_ad.dual_level():
        assert torch.autograd.grad(route(fixed)[:, 0].sum(), fixed)[0].any()


def test_gradient_keeps_no_logits_where_they_are_not_needed():
    kept = []

    def saved(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    logits = torch.randn(7, 16, requires_grad=True)
    # 1e-50 is 0 in float32, so to the kernels too.
    for options in ({}, {"score_function": "sigmoid"}, {"score_function": "softmax_topk"}, {"eps": 1e-50}):
        with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
            tk.router_topk(logits, 2, **options)[0].sum().backward()
    assert (7, 16) not in kept
    assert (7, 2) in kept


def test_only_the_weights_are_differentiable():
    logits = torch.randn(3, 8, requires_grad=True)
    score = torch.zeros(3)
    weights, indices = tk.router_topk(logits, 2, table=torch.ones(8, requires_grad=True), token_score=score)
    assert weights.requires_grad
    assert not indices.requires_grad
    assert not score.requires_grad
    with torch.no_grad():
        assert not tk.router_topk(logits, 2)[0].requires_grad
