"""Calls past the dispatcher: the same results, and never where somebody looks at ops."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import trace_kernels as tk
from trace_kernels.ops.router_topk.cases import OP
from trace_kernels.runtime import light_op


def run(case, backend):
    call = case.call()
    logits = call.args[0].detach().requires_grad_(bool(call.differentiable))
    weights, indices = tk.router_topk(logits, *call.args[1:], **call.kwargs, backend=backend)
    out = [weights.detach(), indices, *(call.kwargs[name] for name in call.mutated)]
    if weights.requires_grad:
        out += torch.autograd.grad(weights, logits, torch.ones_like(weights))
    return out


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", [case for case in OP.cases if not case.benchmark], ids=lambda case: case.name)
def test_both_ways_give_the_same_bits(case, backend, monkeypatch):
    past = run(case, backend)
    monkeypatch.setattr(light_op, "bypasses", lambda *tensors: False)
    for one, other in zip(past, run(case, backend), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def step(logits):
    weights, indices = tk.router_topk(logits, 2)
    counts = torch.zeros(8, dtype=torch.int64)
    tk.record_routing_(indices, counts)
    return torch.autograd.grad(weights.sum(), logits)[0], counts


OPS = {"trace_kernels::router_topk", "trace_kernels::router_topk_backward", "trace_kernels::record_routing_"}


def test_a_dispatch_mode_sees_the_ops():
    with Seen() as seen:
        step(torch.randn(3, 8, requires_grad=True))
    assert set(seen.names) >= OPS


def test_a_traced_graph_has_the_ops():
    graph = make_fx(step)(torch.randn(3, 8, requires_grad=True)).graph
    names = {node.target.name() for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert names >= OPS


def test_the_profiler_sees_the_ops():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(torch.randn(3, 8, requires_grad=True))
    assert {event.key for event in profile.key_averages()} >= OPS


def test_not_with_what_is_more_than_memory():
    plain = torch.randn(3, 8)
    assert light_op.bypasses(plain, None, torch.nn.Parameter(plain))
    negated = torch.view_as_complex(torch.randn(3, 8, 2)).conj().imag
    assert negated.is_neg()
    assert not light_op.bypasses(plain, negated)
    torch.testing.assert_close(tk.router_topk(negated, 2)[1], tk.router_topk(negated.clone(), 2)[1])
    seen = []
    torch.func.vmap(lambda x: (seen.append(light_op.bypasses(x)), x)[1])(plain)
    with torch._subclasses.FakeTensorMode():
        seen.append(light_op.bypasses(torch.randn(3, 8)))
    assert seen == [False, False]


@pytest.mark.parametrize("past", [True, False])
def test_a_saved_index_that_was_written_to_is_noticed(past, monkeypatch):
    if not past:
        monkeypatch.setattr(light_op, "bypasses", lambda *tensors: False)
    weights, indices = tk.router_topk(torch.randn(3, 8, requires_grad=True), 2)
    indices.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weights.sum().backward()
