"""Whether a call is right at the size at which it is timed: outputs and gradients of every row against float64.

The small cases of the conformance tests see one chunk of rows; this sees all of them. The budget is the same: the error
of plain torch in the same dtype, times a small factor.
"""

from __future__ import annotations

import torch

from trace_kernels.testing.cases import Call, Case, OpCases
from trace_kernels.testing.conformance import compare, errors, execute, in_float64, prepare, upstream

#: Rows whose logits are held in float64 at a time: .6 GB of them at 151936 classes.
ROWS = 512


def problems(op: OpCases, case: Case | None, call: Call, backend: str) -> list[str]:
    """What is wrong with `backend` on the call; `case` is given for ops whose float64 needs no chunks."""
    if case is not None:
        return errors(op, case, backend, str(call.args[0].device))
    got = execute(op.function, prepare(call), backend=backend).tensors
    expected = truth(op, call)
    eager = execute(op.eager, prepare(call)).tensors
    found = []
    for name, value in expected.items():
        if not value.dtype.is_floating_point:
            continue  # which of two nearly equal logits is larger is decided by rounding
        found += compare(name, got[name], value, eager.get(name))
    return found


def truth(op: OpCases, call: Call) -> dict[str, torch.Tensor]:
    """What `execute` would give in float64: plain torch, a chunk of rows at a time."""
    reduced = op.function.__name__ not in ("linear_log_prob", "linear_token_stats")
    call = prepare(in_float64(call))
    T, output = call.args[0].shape[0], call.args[0].new_zeros(())
    denominator = 1.0
    if reduced:
        weights = call.args[-1].double()
        target = next((value for value in call.args if value.dtype == torch.int64), None)
        denominator = (weights if target is None else weights * (target != -100)).sum()
        grad = upstream(output.float()).double() / denominator
    else:
        grad = upstream(torch.empty(T, device=output.device)).double()
    parts = []
    for start in range(0, T, ROWS):
        rows = slice(start, min(start + ROWS, T))

        def cut(_: int | str, value: object, rows: slice = rows) -> object:
            by_row = isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == T
            return value[rows] if by_row else value

        part = call.map(cut)
        with torch.set_grad_enabled(bool(call.differentiable)):
            outputs = op.eager(*part.args, **part.kwargs, **({"reduction": "sum"} if reduced else {}))
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        if call.differentiable:
            (outputs[0] * (grad if reduced else grad[rows])).sum().backward()
        parts.append([output.detach().reshape(-1) for output in outputs])
    whole = [torch.cat(column) for column in zip(*parts, strict=True)]
    found = {f"output {i}": rows.sum() / denominator if reduced else rows for i, rows in enumerate(whole)}
    return found | {f"gradient {key}": call.args[key].grad for key in call.differentiable}
