"""Checks of options, each said in the same words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from trace_unlearn.errors import UserError


def check_integers(options: Any, prefix: str = "", **least: int) -> None:
    """UserError unless these options are integers of at least so much; None is left alone.

    Args:
        options: an options class or a mapping.
        prefix: what stands before the names in messages.
        least: by option.

    >>> check_integers({"batch_size": 0}, batch_size=1)
    Traceback (most recent call last):
    trace_unlearn.errors.UserError: batch_size: got 0, allowed are integers from 1
    """
    for name, bound in least.items():
        value = _value(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < bound):
            raise UserError(f"{prefix}{name}: got {value!r}, allowed are integers from {bound}")


def check_numbers(options: Any, *names: str, prefix: str = "", above_0: bool = False) -> None:
    """UserError unless these options are finite numbers from 0, or above 0; None is left alone.

    >>> check_numbers({"alpha": float("nan")}, "alpha")
    Traceback (most recent call last):
    trace_unlearn.errors.UserError: alpha: got nan, allowed are finite numbers from 0
    """
    for name in names:
        value = _value(options, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (number and (value > 0 if above_0 else value >= 0)):
            raise UserError(
                f"{prefix}{name}: got {value!r}, allowed are finite numbers {'above' if above_0 else 'from'} 0"
            )


def check_word(name: str, word: object, allowed: Iterable[str]) -> None:
    """UserError unless the word is one of these.

    >>> check_word("rule", "balence", ("balance", "ratio"))
    Traceback (most recent call last):
    trace_unlearn.errors.UserError: rule: got 'balence', allowed: balance, ratio
    """
    if word not in (words := tuple(allowed)):
        raise UserError(f"{name}: got {word!r}, allowed: {', '.join(words)}")


def meant(name: str, known: Iterable[str], renamed: Mapping[str, str] | None = None) -> str:
    """The end of a message about an unknown option: which one was probably meant.

    A dotted name is also found by its last part.

    >>> meant("learning_rate", ["method.alpha", "training.learning_rate"])
    "; did you mean 'training.learning_rate'?"
    >>> meant("steps", ["training.max_steps"], {"steps": "training.max_steps"})
    "; did you mean 'training.max_steps'?"
    """
    names = list(dict.fromkeys(known))
    if renamed and name in renamed:
        return f"; did you mean {renamed[name]!r}?"
    same = [other for other in names if other.endswith(f".{name.rpartition('.')[2]}")]
    near = same or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _value(options: Any, name: str) -> Any:
    return options[name] if isinstance(options, Mapping) else getattr(options, name)
