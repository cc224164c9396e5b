"""CUDA graphs: what the host does between launches depends on no value, so a captured call can be replayed.

Without a GPU every op runs forward and backward on meta tensors, which have no values to look at, with the GPU
backends' own host code: launches are recorded instead of made. That proves the host's part; a real capture needs a GPU.
"""

import importlib.util

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trace_kernels.runtime import light_op
from trace_kernels.runtime.backends import BackendError, all_ops
from trace_kernels.runtime.recording import recording
from trace_kernels.shared import losses
from trace_kernels.testing.conformance import discover, prepare

OPS = {name: op for name, op in discover().items() if "cuda" in {backend.name for backend in all_ops()[name]}}
BACKENDS = ("cuda", "triton")
no_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def implementation(name):
    """The body of an op, which a call on meta tensors would not reach."""
    return light_op.RUNS[name] if name in light_op.RUNS else OPDEFS[name]._init_fn


class NothingRead(TorchDispatchMode):
    """Raises where the host would wait for the device; runs our ops' implementations also on meta tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "trace_kernels":
            with self:
                return implementation(function.name())(*args, **kwargs)
        result = function(*args, **kwargs)
        if READS & set(function.tags):
            raise AssertionError(f"{function} makes the host wait for the device")
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        # A number is a 0-d tensor of the CPU, which a kernel gets as its argument; a copy of one is a transfer.
        crossing = {tensor.device.type for tensor in tensors if tensor.dim() or "copy" in function.name()}
        if len(crossing) > 1:
            raise AssertionError(f"{function} copies between the device and the host")
        return result


def run_recorded(op, case, backend):
    """The launches of a call and its backward; None where the backend refuses it."""
    call = prepare(case.call("meta"))
    with recording() as launches, NothingRead():
        try:
            outputs = op.function(*call.args, **call.kwargs, backend=backend)
        except BackendError:
            return None
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs or ()
        floating = [output for output in outputs if output.requires_grad]
        leaves = [call.args[key] if isinstance(key, int) else call.kwargs[key] for key in call.differentiable]
        if floating and leaves:
            upstream = [torch.empty_like(output) for output in floating]
            torch.autograd.grad(floating, leaves, upstream, allow_unused=True)
    return launches


@pytest.mark.parametrize("backend", ["cuda", pytest.param("triton", marks=no_triton)])
@pytest.mark.parametrize("name", sorted(OPS))
def test_the_host_looks_at_no_value(name, backend):
    op = OPS[name]
    launches = []
    for case in op.cases:
        if not case.benchmark:
            launches.append(run_recorded(op, case, backend))
    served = [recorded for recorded in launches if recorded is not None]
    assert len(served) > len(launches) / 2
    assert sum(len(recorded) > 0 for recorded in served) > len(served) / 2


def test_a_look_at_a_value_is_found():
    values = torch.empty(3, device="meta")
    for look in (
        lambda: values.sum().item(),
        lambda: values.nonzero(),
        lambda: values[values > 0],
        lambda: values.cpu(),
        lambda: torch.tensor([1.0, 2.0]).to("meta"),
        lambda: losses.check_target_values(values.long(), 3, -100) or bool(values.any()),
    ):
        with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NothingRead():
            look()


def first_served(op, backend, dtype):
    """A case of the dtype that the backend does not refuse, by its own host code on meta tensors."""
    for case in op.cases:
        if case.benchmark or case.dtype != dtype or case.sizes["T"] < 10:
            continue
        if run_recorded(op, case, backend) is not None:
            return case
    return None


@pytest.mark.parametrize("backend", ["cuda", pytest.param("triton", marks=no_triton)])
@pytest.mark.parametrize("name", sorted(OPS))
def test_a_case_is_found_for_every_backend(name, backend):
    assert first_served(OPS[name], backend, torch.float32) is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: a graph is captured and replayed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(OPS))
def test_capture_and_replay(name, backend, dtype):
    op = OPS[name]
    if (case := first_served(op, backend, dtype)) is None:
        pytest.skip(f"no case of {name} in {dtype} on {backend}")
    call = prepare(case.call("cuda"))
    leaves = [call.args[key] if isinstance(key, int) else call.kwargs[key] for key in call.differentiable]

    def step():
        outputs = op.function(*call.args, **call.kwargs, backend=backend)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs or ()
        floating = [output for output in outputs if output.requires_grad]
        ones = [torch.ones_like(output) for output in floating]
        gradients = torch.autograd.grad(floating, leaves, ones, allow_unused=True) if floating and leaves else ()
        mutated = [call.args[key] if isinstance(key, int) else call.kwargs[key] for key in call.mutated]
        return [tensor for tensor in (*outputs, *gradients, *mutated) if tensor is not None]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles and warms up
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(2):
        # Other rows than those of the capture.
        shift = torch.randperm(case.sizes["T"], generator=torch.Generator().manual_seed(seed)).cuda()
        with torch.no_grad():
            for value in (*call.args, *call.kwargs.values()):
                if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == len(shift):
                    value.copy_(value[shift])
        for key in call.mutated:
            (call.args[key] if isinstance(key, int) else call.kwargs[key]).zero_()
        graph.replay()
        replayed = [tensor.detach().clone() for tensor in captured]
        for key in call.mutated:
            (call.args[key] if isinstance(key, int) else call.kwargs[key]).zero_()
        for one, other in zip(replayed, step(), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-5, atol=1e-5)
