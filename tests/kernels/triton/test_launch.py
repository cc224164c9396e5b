"""Triton's own way from a call to a launch, with a driver that launches nothing: which calls compile a kernel anew."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from trace_kernels.runtime.triton_backend import interpreting

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(interpreting(), reason="Triton's interpreter compiles nothing"),
]
SIZES = (64, 1, 7, 16, 100, 129, 300)


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that calls would compile, by name, in order; nothing is compiled or launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver, raising=False)
    names = []

    def compile_nothing(self, key, signature, device, constexprs, *rest):
        names.append(self.fn.__name__)
        kernel = SimpleNamespace(
            run=lambda *args, **kwargs: None,
            launch_metadata=lambda *args: None,
            result=lambda: kernel,
            function=None,
            packed_metadata=None,
        )
        self.device_caches[device][0][key] = kernel
        return kernel

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    caches = []
    for module in modules():
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                caches.append((value, dict(value.device_caches)))
                value.device_caches.clear()
    yield names
    for function, before in caches:
        function.device_caches.clear()
        function.device_caches.update(before)


def modules():
    ops = ("record_routing", "router_topk", "cross_entropy", "linear_cross_entropy", "linear_kl")
    names = [*(f"trace_kernels.ops.{op}.triton" for op in ops), "trace_kernels.shared.triton_common"]
    return [importlib.import_module(name) for name in names]


def route(T):
    from trace_kernels.ops.router_topk.rule import Rule
    from trace_kernels.ops.router_topk.triton import backward, forward

    rule = Rule(4, "softmax", False, 1.0, 0.0, 1, 1, "max", 0.0)
    logits, mask = torch.randn(T, 64), torch.ones(T, dtype=torch.bool)
    recorded = torch.zeros(64, dtype=torch.int64), torch.zeros(T)
    outputs = forward(logits, rule, None, mask, torch.ones(64), None, *recorded, torch.float32, True)
    backward(torch.ones(T, 4), logits, *outputs[1:], rule, 64, torch.float32)


def cross_entropy(T):
    from trace_kernels.ops.cross_entropy.rows import LogitGradient, Rows
    from trace_kernels.ops.cross_entropy.triton import backward, forward

    logits, rows, row = torch.randn(T, 300), Rows(torch.zeros(T, dtype=torch.int64), -100, 30.0, 1.0), torch.ones(T)
    forward(logits, rows)
    backward(logits, rows, row, LogitGradient(row, None, row), False)


#: An odd vocabulary of several blocks; large numbers of rows are cut into chunks.
H, V = 8, 5001


def linear_call(T, dtype):
    from trace_kernels.shared.linear import Call

    hidden, weight = torch.zeros(T, H, dtype=dtype), torch.zeros(V, H, dtype=dtype)
    return Call(hidden, weight, torch.zeros(V), torch.zeros(T, dtype=torch.int64), torch.ones(T), -100, 30.0, 1.0)


def linear_cross_entropy(T):
    from trace_kernels.ops.linear_cross_entropy.triton import backward, forward, stats
    from trace_kernels.shared.linear import Gradient

    for dtype in (torch.bfloat16, torch.float16):
        call, row = linear_call(T, dtype), torch.ones(T)
        forward(call, True, True)
        several = call._replace(target=call.target[:, None].expand(T, 3).contiguous())
        stats(several, True, True)
        backward(several, row, Gradient(row, row, torch.ones(T, 3)), True, True)


def linear_kl(T):
    from trace_kernels.ops.linear_kl.triton import backward_weight, forward

    for dtype in (torch.bfloat16, torch.float32):
        call, row = linear_call(T, dtype)._replace(bias=None, target=None), torch.ones(T)
        forward(call, call, True, True, None)
        forward(call, call, False, False, None)
        backward_weight(call, call, row, row, torch.zeros(T, dtype=torch.int64), row)


def record(T):
    from trace_kernels.ops.record_routing.triton import forward

    counts, mask = torch.zeros(64, dtype=torch.int64), torch.ones(T, dtype=torch.bool)
    forward(torch.zeros(T, 8, dtype=torch.int64), counts, mask, torch.ones(64), torch.zeros(T), None)


@pytest.mark.parametrize("call", [route, record, cross_entropy, linear_cross_entropy, linear_kl])
def test_another_number_of_tokens_compiles_nothing(call, compiled, monkeypatch):
    from trace_kernels.ops.linear_kl import chunked
    from trace_kernels.shared import chunks

    # One block and chunk for a few rows, several for many.
    monkeypatch.setattr(chunks, "BLOCK_BYTES", 2**21)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**21)
    monkeypatch.setattr(chunked, "BUDGET", 2**22)
    call(SIZES[0])
    first = list(compiled)
    assert first
    for T in SIZES[1:]:
        call(T)
    assert compiled == first
    call(SIZES[0])
    assert compiled == first


def test_what_is_compiled_anew_is_seen(compiled):
    record(64)
    before = len(compiled)
    from trace_kernels.ops.record_routing.triton import forward

    forward(torch.zeros(64, 8, dtype=torch.int32), torch.zeros(64, dtype=torch.int64), None, None, None, None)
    assert len(compiled) == before + 1
