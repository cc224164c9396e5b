"""Forward hooks that end with the module and the owner they were made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A forward hook of one module: where that module is copied or pickled, the copy's does nothing."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _of_a_copy, ()


def _nothing(*args: Any) -> None:
    """What copies bear in the place of a hook."""


def _of_a_copy() -> Callable[..., None]:
    return _nothing
