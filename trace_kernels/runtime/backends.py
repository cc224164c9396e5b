"""How an op finds the code that runs it.

An op has up to four backends: ``reference`` (pure torch, any device), ``cpu`` (C++), ``triton`` and ``cuda``.
A backend refuses a call with a reason. ``auto`` takes the first one that accepts, in the order of `AUTO_ORDER`;
a backend asked for by name that refuses is a `BackendError` with that reason. There is no silent fall-back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

BACKENDS = ("cuda", "triton", "cpu", "reference")
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("cpu", "reference"),
}

_OPS: dict[str, OpBackends] = {}


class BackendError(ValueError):
    """A backend that was asked for by name cannot serve the call."""


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Attributes:
        name: one of `BACKENDS`.
        unavailable: why this machine or build cannot run it at all, or None when it can.
        refuse: called with the arguments of a call; why this call cannot be served, or None when it can.
        functions: the implementations (``forward``, ``backward``, …) by name, as the op calls them.
    """

    name: str
    unavailable: Callable[[], str | None]
    refuse: Callable[..., str | None]
    functions: SimpleNamespace = field(default_factory=SimpleNamespace)


class OpBackends:
    """The backends of one op, by name."""

    def __init__(self, op: str) -> None:
        self.op = op
        self._backends: dict[str, Backend] = {}
        _OPS[op] = self

    def register(
        self,
        name: str,
        *,
        unavailable: Callable[[], str | None] = lambda: None,
        refuse: Callable[..., str | None] = lambda *args, **kwargs: None,
        **functions: Callable[..., Any],
    ) -> None:
        """Add the backend `name`; `functions` are its implementations."""
        if name not in BACKENDS:
            raise ValueError(f"name: {name!r} is not one of {', '.join(BACKENDS)}")
        self._backends[name] = Backend(name, unavailable, refuse, SimpleNamespace(**functions))

    def __iter__(self) -> Iterator[Backend]:
        return (self._backends[name] for name in BACKENDS if name in self._backends)

    def why_not(self, name: str, *args: Any, **kwargs: Any) -> str | None:
        """Why the backend `name` would refuse this call, or None when it would run it."""
        backend = self._backends.get(name)
        if backend is None:
            return f"{self.op} has no such backend"
        return backend.unavailable() or backend.refuse(*args, **kwargs)

    def select(self, name: str, device: torch.device, *args: Any, **kwargs: Any) -> SimpleNamespace:
        """The functions of the backend that runs this call; `args` are what the backends' ``refuse`` looks at.

        Raises:
            BackendError: `name` is no backend, or the one asked for refuses.
        """
        if name != "auto":
            if name not in BACKENDS:
                raise BackendError(f"backend: got {name!r}, allowed are 'auto', {', '.join(map(repr, BACKENDS))}")
            if (reason := self.why_not(name, *args, **kwargs)) is not None:
                raise BackendError(f"backend {name!r} of {self.op} refuses this call: {reason}")
            return self._backends[name].functions
        for candidate in AUTO_ORDER.get(device.type, ("reference",)):
            if candidate in self._backends and self.why_not(candidate, *args, **kwargs) is None:
                return self._backends[candidate].functions
        raise BackendError(f"no backend of {self.op} accepts this call on {device}")


def all_ops() -> dict[str, OpBackends]:
    """The backends of every op, by the op's public name."""
    return dict(sorted(_OPS.items()))
