"""Whether a backend is right on a case: outputs, mutated arguments and gradients against float64.

The budget is the error of the plain-torch implementation in the same dtype, times a small factor. Tests assert it
and the benchmark runner refuses to time what fails it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import pkgutil
from dataclasses import dataclass
from typing import Any

import torch

import trace_kernels.ops
from trace_kernels.testing.cases import Call, Case, OpCases

FACTOR = 2.0
#: Floor of the budget relative to the largest magnitude of the output, or of the terms of a loss, for cases where eager
#: happens to be exact.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def discover() -> dict[str, OpCases]:
    """The cases of every op folder, by the name of the public function."""
    found = {}
    for folder in pkgutil.iter_modules(trace_kernels.ops.__path__):
        package = f"trace_kernels.ops.{folder.name}"
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if module.name.startswith("cases"):
                op: OpCases = importlib.import_module(f"{package}.{module.name}").OP
                found[op.function.__name__] = op
    return found


@dataclass
class Result:
    """Everything a call produced, by a readable name."""

    tensors: dict[str, torch.Tensor]


def prepare(call: Call) -> Call:
    """Copies of the inputs with their strides, the differentiable ones as leaves that want a gradient."""

    def ready(key: int | str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        copy = _copy(value)
        return copy.requires_grad_() if key in call.differentiable else copy

    return call.map(ready)


def execute(function: Any, ready: Call, *, backward: bool = True, **extra: Any) -> Result:
    """Call `function` on prepared inputs; outputs, mutated arguments, and gradients for fixed random upstream ones."""
    outputs = function(*ready.args, **ready.kwargs, **extra)
    if outputs is None:
        outputs = ()
    elif isinstance(outputs, torch.Tensor):
        outputs = (outputs,)
    tensors = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    for key in ready.mutated:
        tensors[f"mutated {key}"] = _argument(ready, key).detach()
    floating = [output for output in outputs if output.requires_grad]
    if ready.differentiable and backward and floating:
        leaves = [_argument(ready, key) for key in ready.differentiable]
        gradients = torch.autograd.grad(floating, leaves, [upstream(output) for output in floating], allow_unused=True)
        for key, leaf, gradient in zip(ready.differentiable, leaves, gradients, strict=True):
            tensors[f"gradient {key}"] = torch.zeros_like(leaf) if gradient is None else gradient.detach()
    return Result(tensors)


def upstream(output: torch.Tensor) -> torch.Tensor:
    """Both signs and sizes of one: a gradient that is constant over tokens would hide mixed-up rows."""
    return _random(output.shape, output.dtype, output.device)


@functools.lru_cache(maxsize=4)
def _random(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Kept, because a benchmark would time the copy to the device."""
    generator = torch.Generator().manual_seed(shape.numel())
    # Drawn in bfloat16 so that every dtype sees the same numbers.
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(device, dtype)


def run(function: Any, call: Call, *, backward: bool = True, **extra: Any) -> Result:
    """`execute` on copies of the inputs: `call` stays as it is."""
    return execute(function, prepare(call), backward=backward, **extra)


def _argument(call: Call, key: int | str) -> torch.Tensor:
    value = call.args[key] if isinstance(key, int) else call.kwargs[key]
    assert isinstance(value, torch.Tensor)
    return value


def _copy(value: torch.Tensor) -> torch.Tensor:
    """A detached copy with the same strides, also where they leave gaps, and the same misalignment."""
    if not value.numel() or any(stride == 0 for stride in value.stride()):
        return value.detach().clone() if value.is_contiguous() else value.detach()
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    # Memory starts on 64 bytes: what matters of an offset is where it leaves the first element.
    offset = value.storage_offset() % 64
    storage = torch.zeros(offset + span, dtype=value.dtype, device=value.device)
    return storage.as_strided(value.shape, value.stride(), offset).copy_(value.detach())


def in_float64(call: Call) -> Call:
    """The same call with its floating inputs in float64: what the truth is computed from."""
    floating = (*call.differentiable, *call.constant)
    return call.map(lambda key, value: value.double() if isinstance(value, torch.Tensor) and key in floating else value)


def errors(op: OpCases, case: Case, backend: str, device: str = "cpu") -> list[str]:
    """What is wrong with `backend` on `case`: one line per output beyond its budget, empty when all is well."""
    call = case.call(device)
    truth = run(op.function, in_float64(case.call(device)), backend="reference").tensors
    eager = run(op.eager, case.call(device)).tensors
    got = run(op.function, call, backend=backend).tensors
    problems = [] if backend != "reference" else _against_eager(op, case, truth, device)
    for name, expected in truth.items():
        if name not in got:
            problems.append(f"{name}: missing")
        elif got[name].shape != expected.shape:
            problems.append(f"{name}: shape {list(got[name].shape)}, expected {list(expected.shape)}")
        elif not expected.dtype.is_floating_point:
            if not torch.equal(got[name], expected):
                differing = int((got[name] != expected).sum())
                problems.append(f"{name}: {differing} of {expected.numel()} entries differ")
        elif case.relative is not None:
            problems += _compare_rows(name, got[name], expected, case.relative)
        else:
            cancelled = cancellation(op, case, device) if expected.dim() == 0 else 1.0
            problems += compare(name, got[name], expected, eager.get(name), cancelled)
    return problems


def _against_eager(op: OpCases, case: Case, truth: dict[str, torch.Tensor], device: str) -> list[str]:
    """Whether the truth, which comes through the public function, is what plain torch computes in float64.

    Where plain torch is not finite (a denominator of 0) it defines nothing. Integers may differ where experts tie.
    """
    eager = run(op.eager, in_float64(case.call(device))).tensors
    problems = []
    for name, expected in eager.items():
        if not expected.dtype.is_floating_point or not torch.isfinite(expected).all():
            continue
        got = truth.get(name)
        if got is None or got.shape != expected.shape:
            problems.append(f"{name}: the reference gives {None if got is None else list(got.shape)}, eager has it")
            continue
        # Token weights and scores stay float32, so eager rounds their sums: this finds mistakes, not rounding.
        bound = 1e-5 * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
        if expected.numel() and not (got.double() - expected.double()).abs().max().item() <= bound:
            problems.append(f"{name}: the reference differs from eager in float64 by more than {bound:.3g}")
    return problems


def cancellation(op: OpCases, case: Case, device: str = "cpu") -> float:
    """How much larger the terms that a loss adds up are than the loss: ``sum |term| / |sum term|``, 1 for other ops.

    Weights have signs. What rounding leaves of the sum is as large as that of its terms, however little of them is
    left, and the error that eager happens to make of one number says nothing of it.
    """
    if "reduction" not in inspect.signature(op.function).parameters:
        return 1.0
    call = in_float64(case.call(device))
    rows = {**call.kwargs, "reduction": "none", "normalizer": None}
    terms = op.function(*call.args, **rows, backend="reference").detach()
    ratio = (terms.abs().sum() / terms.sum().abs()).item()
    return ratio if math.isfinite(ratio) else 1.0


def _compare_rows(name: str, got: torch.Tensor, expected: torch.Tensor, relative: float) -> list[str]:
    scale = expected.double().abs()
    scale = scale.amax(dim=-1, keepdim=True) if scale.dim() > 1 else scale
    worst = ((got.double() - expected.double()).abs() / scale.clamp(min=1e-35)).max().item()
    return [] if worst <= relative else [f"{name}: relative error {worst:.3g}, allowed {relative:.3g}"]


def compare(
    name: str, got: torch.Tensor, expected: torch.Tensor, eager: torch.Tensor | None, cancelled: float = 1.0
) -> list[str]:
    """What is wrong with one tensor; `cancelled` times the truth is the size of what was added up to it."""
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(got), finite):
        return [f"{name}: finite in other places than the reference"]
    if not torch.equal(got[~finite].nan_to_num(0.0, 1.0, -1.0).double(), expected[~finite].nan_to_num(0.0, 1.0, -1.0)):
        return [f"{name}: NaN and infinities in other places than the reference"]
    if not finite.any():
        return []
    truth = expected[finite].double()
    scale = truth.abs().max().item() * cancelled
    error = (got[finite].double() - truth).abs().max().item()
    eager_error = 0.0
    if eager is not None and eager.shape == expected.shape:
        difference = (eager.double() - expected.double())[finite].abs()
        eager_error = difference.nan_to_num(0.0, 0.0, 0.0).max().item()
    budget = FACTOR * eager_error + ROUNDING[got.dtype] * scale
    return [] if error <= budget else [f"{name}: error {error:.3g}, allowed {budget:.3g} (eager {eager_error:.3g})"]
