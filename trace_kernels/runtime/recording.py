"""Collecting what a call would launch and multiply, with its bytes and FLOPs, instead of running it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Product:
    """One library matrix product of such a run: [rows, terms] by [terms, columns], and the bytes that it moves."""

    rows: int
    columns: int
    terms: int
    bytes: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.terms


_recorded: list[Any] | None = None
_share: float | None = None


@contextlib.contextmanager
def recording(share: float | None = None) -> Iterator[list[Any]]:
    """Collect launches and products instead of running them: for meta tensors, whose results nobody can see.

    share: of the rows of a loss, those that take part, which no meta tensor says; None: all are computed.
    """
    global _recorded, _share
    before, _recorded, _share = (_recorded, _share), [], share
    try:
        yield _recorded
    finally:
        _recorded, _share = before


def recorded_share() -> float | None:
    """What `recording` was told."""
    return _share


def is_recording() -> bool:
    return _recorded is not None


def record(item: Any) -> None:
    """Add a launch or a product to what is being collected."""
    assert _recorded is not None
    _recorded.append(item)


def record_product(a: torch.Tensor, b: torch.Tensor, bytes: int) -> bool:
    """Whether launches are recorded, and then the product is too."""
    if _recorded is not None:
        _recorded.append(Product(a.shape[0], b.shape[1], a.shape[1], bytes))
    return _recorded is not None


def size_of(*tensors: torch.Tensor | None) -> int:
    """Bytes of the elements of `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
