"""`record_routing_`: expert counts and token scores from the indices a router chose."""

from __future__ import annotations

import torch

from trace_kernels.ops.record_routing import cuda, native, reference
from trace_kernels.runtime import cuda_backend, light_op, triton_backend, validate
from trace_kernels.runtime.backends import OpBackends

backends = OpBackends("record_routing_")
backends.register("reference", forward=reference.record_routing_)
backends.register("cpu", unavailable=native.cpu_unavailable, refuse=native.refuse_cpu, forward=native.forward_cpu)
triton_backend.register(backends, __package__, "forward")
cuda_backend.register(backends, cuda, "forward")


def record_routing_(
    indices: torch.Tensor,
    counts: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    token_score: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:
    r"""Count expert activations and add up token scores, in place.

    .. math::
        \text{counts}_e \mathrel{+}= \sum_t \text{mask}_t \sum_j [\text{indices}_{tj} = e], \qquad
        \text{score}_t \mathrel{+}= \sum_j \text{table}[\text{indices}_{tj}]

    Entries outside [0, E) (identity experts, sentinels) are skipped. Not differentiable.

    Args:
        indices: [T, k] integer, the experts of each token, in any order.
        counts: [E] int64, added to.
        token_mask: [T] bool, the tokens that count; all by default. It does not touch the scores.
        table: [E] float32, finite; goes with `token_score`.
        token_score: [T] float32, added to; goes with `table`.
        gate: 0-d int32 on the same device; nothing is added when it is 0. Read on the device, so that a
            forward that gradient checkpointing repeats is counted once, also in a compiled graph.
        backend: "auto", "cuda", "triton", "cpu" or "reference".

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or a non-finite table (on a GPU, values are looked
            at only with TRACE_KERNELS_DEBUG=1); the message names the argument.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, trace_kernels as tk
        >>> counts = torch.zeros(4, dtype=torch.int64)
        >>> tk.record_routing_(torch.tensor([[0, 2], [2, 3]]), counts)
        >>> counts.tolist()
        [1, 0, 2, 1]
    """
    if not _usual(indices, counts, token_mask, table, token_score, gate):
        _check(indices, counts, token_mask, table, token_score, gate)
    # Without autograd: the dispatcher says what happens to arguments that require a gradient.
    needs_gradient = (
        table is not None and token_score is not None and (table.requires_grad or token_score.requires_grad)
    )
    past = not needs_gradient and light_op.bypasses(indices, counts, token_mask, table, token_score, gate)
    (_run if past else _record_routing)(indices, counts, token_mask, table, token_score, gate, backend)


def _usual(
    indices: object,
    counts: object,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> bool:
    """Whether nothing is wrong, found quickly: `_check` has the words for what is."""
    if not (isinstance(indices, torch.Tensor) and isinstance(counts, torch.Tensor)):
        return False
    device, rows = indices.device, indices.shape[:1]
    return (
        indices.dtype is torch.int64
        and indices.dim() == 2
        and counts.dtype is torch.int64
        and counts.dim() == 1
        and counts.device == device
        and (gate is None or validate.fits(gate, torch.int32, (), device))
        and recording_fits(rows, counts.shape, device, token_mask, table, token_score)
    )


def recording_fits(
    rows: tuple[int, ...],
    experts: tuple[int, ...],
    device: torch.device,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
) -> bool:
    """Whether `check_recording` would find nothing."""
    if token_mask is not None and not validate.fits(token_mask, torch.bool, rows, device):
        return False
    if table is None or token_score is None:
        return table is token_score
    return validate.fits(table, torch.float32, experts, device) and validate.fits(
        token_score, torch.float32, rows, device
    )


def _check(
    indices: torch.Tensor,
    counts: torch.Tensor,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
    gate: torch.Tensor | None,
) -> None:
    validate.check_dtype("indices", indices, validate.INTEGER_DTYPES)
    validate.check_ndim("indices", indices, 2, "[T, k]")
    validate.check_dtype("counts", counts, (torch.int64,))
    validate.check_ndim("counts", counts, 1, "[E]")
    validate.check_device("counts", counts, indices.device, "indices")
    check_recording(indices.shape[0], counts.shape[0], indices.device, token_mask, table, token_score)
    if gate is not None:
        validate.check_dtype("gate", gate, (torch.int32,))
        validate.check_ndim("gate", gate, 0, "a 0-d tensor")
        validate.check_device("gate", gate, indices.device, "indices")


def check_recording(
    num_tokens: int,
    num_experts: int,
    device: torch.device,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
    of: str = "indices",
) -> None:
    """Checks of the arguments that every op which counts and scores shares."""
    if token_mask is not None:
        validate.check_dtype("token_mask", token_mask, (torch.bool,))
        validate.check_shape("token_mask", token_mask, (num_tokens,), "[T]")
        validate.check_device("token_mask", token_mask, device, of)
    if (table is None) != (token_score is None):
        missing = "table" if table is None else "token_score"
        raise ValueError(f"{missing}: got None, allowed is a tensor: table and token_score go together")
    if table is not None and token_score is not None:
        validate.check_dtype("table", table, (torch.float32,))
        validate.check_shape("table", table, (num_experts,), "[E]")
        validate.check_device("table", table, device, of)
        validate.check_dtype("token_score", token_score, (torch.float32,))
        validate.check_shape("token_score", token_score, (num_tokens,), "[T]")
        validate.check_device("token_score", token_score, device, of)


def _run(
    indices: torch.Tensor,
    counts: torch.Tensor,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
    gate: torch.Tensor | None,
    backend: str,
) -> None:
    args = (indices, counts, token_mask, table, token_score, gate)
    functions = backends.select(backend, indices.device, *args)
    # The cpu backend looks at the table as it reads it: one more op in torch would cost a tenth of the call.
    if table is not None and functions.forward is not native.forward_cpu and validate.check_values_on(table.device):
        validate.check_finite("table", table)
    functions.forward(*args)
    light_op.written(counts, token_score)


def _fake(
    indices: torch.Tensor,
    counts: torch.Tensor,
    token_mask: torch.Tensor | None,
    table: torch.Tensor | None,
    token_score: torch.Tensor | None,
    gate: torch.Tensor | None,
    backend: str,
) -> None:
    return None


_record_routing = light_op.define("record_routing_", _run, _fake, mutates_args=("counts", "token_score"))
