"""`route_hits`: expert counts, and which selected experts each token activates, from stored routes."""

from __future__ import annotations

import torch

from trace_kernels.ops.route_hits import native, reference
from trace_kernels.runtime import validate
from trace_kernels.runtime.backends import OpBackends

backends = OpBackends("route_hits")
backends.register("reference", forward=reference.route_hits)
backends.register("cpu", unavailable=native.cpu_unavailable, refuse=native.refuse_cpu, forward=native.forward_cpu)


def route_hits(
    routes: torch.Tensor, selected: torch.Tensor, num_experts: int, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Count the activations of every expert and extract the hit bits of selected ones, in one pass.

    .. math::
        \text{counts}_{le} = \sum_t \sum_j [\text{routes}_{tlj} = e], \qquad
        \text{hit}_{tm} = [\text{selected}_{m1} \in \text{routes}_{t, \text{selected}_{m0}}]

    Entries outside [0, E) (identity experts, sentinels) are skipped. Not differentiable. The routes are read once and
    in order, so they may be a memory map larger than memory.

    Args:
        routes: [N, L, k] integer, the experts of each token in each layer.
        selected: [M, 2] int64 on the same device, distinct pairs (layer, expert).
        num_experts: E.
        backend: "auto", "cpu" or "reference".

    Returns:
        counts [L, E] int64, and hits [N, ceil(M / 8)] uint8: bit m is the bit 7 - m % 8 of byte m // 8, as
        numpy.packbits packs them.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, a pair out of range (on a GPU, values are looked at only
            with TRACE_KERNELS_DEBUG=1); the message names the argument.
        BackendError: the backend asked for cannot serve the call.

    Example:
        >>> import torch, trace_kernels as tk
        >>> counts, hits = tk.route_hits(torch.tensor([[[0, 2]], [[2, 3]]]), torch.tensor([[0, 0], [0, 2]]), 4)
        >>> counts.tolist(), [f"{row:08b}" for row in hits[:, 0].tolist()]
        ([[1, 0, 2, 1]], ['11000000', '01000000'])
    """
    validate.check_dtype("routes", routes, validate.INTEGER_DTYPES)
    validate.check_ndim("routes", routes, 3, "[N, L, k]")
    validate.check_dtype("selected", selected, (torch.int64,))
    if selected.dim() != 2 or selected.shape[1] != 2:
        raise ValueError(f"selected: got shape {list(selected.shape)}, allowed is [M, 2]")
    validate.check_device("selected", selected, routes.device, "routes")
    if num_experts < 1:
        raise ValueError(f"num_experts: got {num_experts}, allowed is 1 or more")
    counts, hits = _route_hits(routes, selected, num_experts, backend)
    return counts, hits


@torch.library.custom_op("trace_kernels::route_hits", mutates_args=())
def _route_hits(
    routes: torch.Tensor, selected: torch.Tensor, num_experts: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    if validate.check_values_on(selected.device):
        limit = torch.tensor([routes.shape[1], num_experts], device=selected.device)
        outside = ((selected < 0) | (selected >= limit)).any(dim=1)
        if bool(outside.any()):
            raise ValueError(
                f"selected: got (layer, expert) {selected[outside][0].tolist()}, allowed are layers below "
                f"{routes.shape[1]} and experts below {num_experts}"
            )
        if len(torch.unique(selected, dim=0)) != len(selected):
            raise ValueError("selected: has a (layer, expert) pair more than once, allowed are distinct pairs")
    args = (routes, selected, num_experts)
    return backends.select(backend, routes.device, *args).forward(*args)  # type: ignore[no-any-return]


@_route_hits.register_fake
def _(
    routes: torch.Tensor, selected: torch.Tensor, num_experts: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    N, L, _ = routes.shape
    counts = routes.new_empty(L, num_experts, dtype=torch.int64)
    return counts, routes.new_empty(N, (selected.shape[0] + 7) // 8, dtype=torch.uint8)
