"""`hit_scores`, `hit_moments` and `hit_order`: sums over rows of packed hit bits, and their order.

The sums ignore spare bits of the last byte; the order is by whole bytes.
"""

from __future__ import annotations

import torch

from trace_kernels.ops.hit_moments import native, reference
from trace_kernels.runtime import validate
from trace_kernels.runtime.backends import OpBackends

_BACKENDS = {name: OpBackends(name) for name in ("hit_scores", "hit_moments", "hit_order")}
for _name, _backends in _BACKENDS.items():
    _backends.register("reference", forward=getattr(reference, _name))
    _backends.register(
        "cpu",
        unavailable=native.cpu_unavailable,
        refuse=native.refuse_cpu,
        forward=getattr(native, f"{_name.removeprefix('hit_')}_cpu"),
    )


def hit_scores(hits: torch.Tensor, values: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    r"""The sum of each row's values where its bits are set.

    .. math:: \text{score}_n = \sum_m \text{hit}_{nm} \text{values}_m

    Not differentiable. On the cpu backend the sum runs from the first bit on, whatever the number of threads.

    Args:
        hits: [n, ceil(M / 8)] uint8, bits as `route_hits` packs them.
        values: [M] float64.
        backend: "auto", "cpu" or "reference".

    Returns:
        [n] float64.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; the message names the argument.

    Example:
        >>> import torch, trace_kernels as tk
        >>> hits = torch.tensor([[0b10100000], [0b01000000]], dtype=torch.uint8)
        >>> tk.hit_scores(hits, torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)).tolist()
        [5.0, 2.0]
    """
    validate.check_dtype("values", values, (torch.float64,))
    validate.check_ndim("values", values, 1, "[M]")
    _check_hits(hits, values.shape[0])
    validate.check_device("values", values, hits.device, "hits")
    scores: torch.Tensor = _hit_scores(hits, values, backend)
    return scores


def hit_moments(
    hits: torch.Tensor, weights: torch.Tensor, num_bits: int, order: int = 1, *, backend: str = "auto"
) -> torch.Tensor:
    r"""Weighted sums of the bits (order 1) or of their products (order 2) over the rows.

    .. math:: \sum_n w_n \text{hit}_{nm} \quad\text{or}\quad \sum_n w_n \text{hit}_{nm} \text{hit}_{nm'}

    The diagonal of the second is the first. Not differentiable. The cpu backend gives the same bits on every run with
    the same number of threads.

    Args:
        hits: [n, ceil(M / 8)] uint8, bits as `route_hits` packs them.
        weights: [n] float64.
        num_bits: M.
        order: 1 or 2.
        backend: "auto", "cpu" or "reference".

    Returns:
        [M] or [M, M] float64.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; the message names the argument.

    Example:
        >>> import torch, trace_kernels as tk
        >>> hits = torch.tensor([[0b11000000], [0b01000000]], dtype=torch.uint8)
        >>> weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> tk.hit_moments(hits, weights, 2).tolist(), tk.hit_moments(hits, weights, 2, 2).tolist()
        ([1.0, 4.0], [[1.0, 1.0], [1.0, 4.0]])
    """
    _check_hits(hits, num_bits)
    validate.check_dtype("weights", weights, (torch.float64,))
    validate.check_shape("weights", weights, (hits.shape[0],), "[n]")
    validate.check_device("weights", weights, hits.device, "hits")
    validate.check_choice("order", order, (1, 2))
    moments: torch.Tensor = _hit_moments(hits, weights, num_bits, order, backend)
    return moments


def hit_order(hits: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """The stable order that sorts the rows as numbers, the first byte deciding: equal rows become neighbours.

    Args:
        hits: [n, B] uint8.
        backend: "auto", "cpu" or "reference".

    Returns:
        [n] int64: the row that comes first, second, ...

    Raises:
        TypeError, ValueError: a wrong dtype or shape.

    Example:
        >>> import torch, trace_kernels as tk
        >>> tk.hit_order(torch.tensor([[2, 1], [1, 9], [2, 0]], dtype=torch.uint8)).tolist()
        [1, 2, 0]
    """
    validate.check_dtype("hits", hits, (torch.uint8,))
    validate.check_ndim("hits", hits, 2, "[n, B]")
    order: torch.Tensor = _hit_order(hits, backend)
    return order


def _check_hits(hits: torch.Tensor, num_bits: int) -> None:
    validate.check_dtype("hits", hits, (torch.uint8,))
    width = (num_bits + 7) // 8
    if hits.dim() != 2 or hits.shape[1] != width:
        raise ValueError(
            f"hits: got shape {list(hits.shape)}, allowed is [n, ceil(M / 8)] = [n, {width}], M = {num_bits}"
        )


@torch.library.custom_op("trace_kernels::hit_scores", mutates_args=())
def _hit_scores(hits: torch.Tensor, values: torch.Tensor, backend: str) -> torch.Tensor:
    return _BACKENDS["hit_scores"].select(backend, hits.device, hits, values).forward(hits, values)  # type: ignore[no-any-return]


@_hit_scores.register_fake
def _(hits: torch.Tensor, values: torch.Tensor, backend: str) -> torch.Tensor:
    return values.new_empty(hits.shape[0])


@torch.library.custom_op("trace_kernels::hit_moments", mutates_args=())
def _hit_moments(hits: torch.Tensor, weights: torch.Tensor, num_bits: int, order: int, backend: str) -> torch.Tensor:
    args = (hits, weights, num_bits, order)
    return _BACKENDS["hit_moments"].select(backend, hits.device, *args).forward(*args)  # type: ignore[no-any-return]


@_hit_moments.register_fake
def _(hits: torch.Tensor, weights: torch.Tensor, num_bits: int, order: int, backend: str) -> torch.Tensor:
    return weights.new_empty((num_bits,) * order)


@torch.library.custom_op("trace_kernels::hit_order", mutates_args=())
def _hit_order(hits: torch.Tensor, backend: str) -> torch.Tensor:
    return _BACKENDS["hit_order"].select(backend, hits.device, hits).forward(hits)  # type: ignore[no-any-return]


@_hit_order.register_fake
def _(hits: torch.Tensor, backend: str) -> torch.Tensor:
    return hits.new_empty(hits.shape[0], dtype=torch.int64)
