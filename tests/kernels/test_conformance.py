"""Every op, every backend, every case: forward, backward, opcheck and compile.

One op: pytest tests/kernels/test_conformance.py -k router_topk. One backend: -k "router_topk and cpu".
"""

import types

import pytest
import torch

import trace_kernels
from trace_kernels.runtime import native
from trace_kernels.runtime.backends import BACKENDS, BackendError, all_ops
from trace_kernels.shared import losses
from trace_kernels.testing.cases import Call, Case
from trace_kernels.testing.conformance import cancellation, compare, discover, errors, run

OPS = discover()
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CASES = [
    pytest.param(OPS[name], case, id=f"{name}-{case.name}")
    for name in OPS
    for case in OPS[name].cases
    if not case.benchmark
]


def refusal(op, case, backend, device):
    """Why the backend does not serve the case, or None: only a refusal that it words itself is a skip."""
    try:
        call = case.call(device)
        run(op.function, call, backward=False, backend=backend)
    except BackendError as error:
        return str(error)
    return None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op, case", CASES)
def test_backend_is_right(op, case, backend, device):
    if (reason := refusal(op, case, backend, device)) is not None:
        assert backend != "reference", reason
        pytest.skip(reason)
    assert errors(op, case, backend, device) == []


def test_a_loss_is_held_to_the_size_of_its_terms():
    """Two rows of weights 1 and -.999: what rounding leaves of their difference is as large as that of the rows."""
    logits, target = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0])
    weight = torch.tensor([1.0, -0.999])
    op = OPS["cross_entropy"]
    signed = Case("signed", {}, lambda case, generator: Call((logits, target, weight), {"reduction": "sum"}, (0,)))
    assert cancellation(op, signed) == pytest.approx(1999, rel=1e-3)
    positive = Case("positive", {}, lambda case, generator: Call((logits, target, weight.abs()), {}, (0,)))
    assert cancellation(op, positive) == pytest.approx(1.0)
    assert cancellation(OPS["router_topk"], CASES[0].values[1]) == 1.0
    assert errors(op, signed, "reference") == []
    expected = torch.tensor(1.3e-3)
    for error, found in ((1e-6, []), (1e-5, ["loss"])):
        problems = compare("loss", expected + error, expected.double(), None, 1999)
        assert [problem.split(":")[0] for problem in problems] == found


@pytest.mark.parametrize("op, case", CASES)
def test_auto_is_right(op, case):
    assert errors(op, case, "auto") == []


@pytest.mark.parametrize("op, case", CASES)
def test_inputs_are_not_touched(op, case):
    call, fresh = case.call(), case.call()
    op.function(*call.args, **call.kwargs)
    for key, value in [*enumerate(call.args), *call.kwargs.items()]:
        if isinstance(value, torch.Tensor) and key not in call.mutated:
            other = fresh.args[key] if isinstance(key, int) else fresh.kwargs[key]
            torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", sorted(OPS))
def test_default_dtype_of_torch_does_not_matter(name):
    # A kernel that writes float32 into memory of another dtype may end the process.
    before = torch.get_default_dtype()
    for case in (case for case in OPS[name].cases if not case.benchmark):
        call = case.call()
        expected = run(OPS[name].function, call).tensors
        for dtype in (torch.float64, torch.bfloat16):
            try:
                torch.set_default_dtype(dtype)
                got = run(OPS[name].function, call).tensors
            finally:
                torch.set_default_dtype(before)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op, case", CASES)
def test_compiles_to_one_graph(op, case):
    torch._dynamo.reset()
    eager = run(op.function, case.call()).tensors
    compiled = run(torch.compile(op.function, fullgraph=True, backend="aot_eager"), case.call()).tensors
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_op_has_its_backends_and_names(name):
    backends = all_ops()[name]
    assert "reference" in {backend.name for backend in backends}
    call = next(case for case in OPS[name].cases if not case.benchmark).call()
    with pytest.raises(BackendError, match="allowed are 'auto'"):
        OPS[name].function(*call.args, **call.kwargs, backend="fastest")


def test_every_op_is_discovered():
    assert sorted(all_ops()) == sorted(OPS)


def test_a_mistake_that_all_backends_share_is_found(monkeypatch):
    op = OPS["linear_cross_entropy"]
    case = next(case for case in op.cases if not case.benchmark and case.name == "full_fp32_mean")
    assert errors(op, case, "reference") == []
    right = losses.Weighting.denominator
    monkeypatch.setattr(losses.Weighting, "denominator", lambda self: 2 * right(self))  # in the public function
    assert any("differs from eager" in line for line in errors(op, case, "reference"))


def test_a_compiled_module_of_another_version_serves_what_it_has(monkeypatch):
    module = types.ModuleType("older")
    module.record_routing_cpu = module.router_topk_cpu = None
    monkeypatch.setattr(native, "_load", lambda: (module, ""))
    ops = all_ops()
    assert ops["record_routing_"].why_not("cpu", torch.zeros(2, 2, dtype=torch.int64)) is None
    reason = next(backend for backend in ops["router_topk"] if backend.name == "cpu").unavailable()
    assert "lacks router_topk_backward_cpu" in reason


def test_a_refusal_names_the_op_that_was_called():
    hidden, weight, target = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1])
    functions = (trace_kernels.linear_log_prob, trace_kernels.linear_cross_entropy)
    for function in (*functions, *(torch.compile(function, backend="eager", fullgraph=True) for function in functions)):
        with pytest.raises(BackendError, match=f"of {function.__name__} refuses"):
            function(hidden.double(), weight.double(), target, backend="cpu")
