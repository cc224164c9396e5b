"""What an op's ``cases.py`` declares: inputs that the conformance tests and the benchmarks both read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Call:
    """One call of an op.

    Attributes:
        args, kwargs: what the public function gets, without ``backend``.
        differentiable: positions in `args` and names in `kwargs` that get a gradient.
        mutated: positions and names that the op changes in place.
        constant: positions and names that get no gradient and have the dtype of those that do.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[int | str, ...] = ()
    mutated: tuple[int | str, ...] = ()
    constant: tuple[int | str, ...] = ()

    def map(self, change: Callable[[int | str, Any], Any]) -> Call:
        """The same call with every argument replaced by ``change(position or name, value)``."""
        args = tuple(change(position, value) for position, value in enumerate(self.args))
        kwargs = {name: change(name, value) for name, value in self.kwargs.items()}
        return Call(args, kwargs, self.differentiable, self.mutated, self.constant)


@dataclass(frozen=True)
class Case:
    """One set of inputs, by name.

    Attributes:
        name: readable, unique within the op: it is the test's id.
        sizes: the field's letters, for reports: ``{"T": 17, "H": 64, "V": 1000}``.
        dtype: of the floating inputs.
        build: makes the call; the generator is seeded by the case's name and lives on the CPU.
        benchmark: whether the benchmark runner times it (tests skip these: they are large).
        relative: None, or how far each number may be off relative to itself, or to the largest of its row. For inputs
            on which plain torch loses all digits, so that its error is no budget.
    """

    name: str
    sizes: Mapping[str, int]
    build: Callable[[Case, torch.Generator], Call]
    dtype: torch.dtype = torch.float32
    benchmark: bool = False
    relative: float | None = None

    def call(self, device: torch.device | str = "cpu") -> Call:
        """The inputs, the same on every call and every machine, moved to `device` with strides and offsets."""
        generator = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(self.name)) % 2**31)
        call = self.build(self, generator)
        if torch.device(device).type == "cpu":
            return call
        return call.map(lambda _, value: moved(value, device) if isinstance(value, torch.Tensor) else value)


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on `device` with all of its storage: ``tensor.to`` closes gaps between strides and drops offsets."""
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, (storage.nbytes() // tensor.element_size(),), (1,))
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@dataclass(frozen=True)
class Traffic:
    """What a call has to move and compute at the least, forward and backward.

    Attributes:
        bytes: memory read and written, in bytes.
        flops: floating-point operations.
    """

    bytes: float
    flops: float


@dataclass(frozen=True)
class OpCases:
    """All that tests and benchmarks know of an op.

    Attributes:
        function: the public function.
        cases: small ones for tests, and those with ``benchmark=True``.
        traffic: the floor of a case.
        eager: the same computation as a user would write it in plain torch, in the inputs' own dtype: the error
            budget and the first peer. Same signature as `function`, without ``backend``.
        peers: other implementations by name, same signature; an entry may raise ImportError when called.
    """

    function: Callable[..., Any]
    cases: tuple[Case, ...]
    traffic: Callable[[Case], Traffic]
    eager: Callable[..., Any]
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
