"""Benchmarks by name. Each reads its data before a model is loaded, and then measures any number of models."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.suites.suite import Suite

SUITES = {"muse": "Muse", "tofu": "Tofu", "lm_eval": "Harness"}
_MODULES = {"lm_eval": "harness"}  # a module of that very name would shadow the library's

__all__ = ["SUITES", "Suite", "open_suites"]


def open_suites(given: Mapping[str, Any]) -> dict[str, Suite]:
    """The suites that a configuration names, with their options checked; nothing is read yet.

    Args:
        given: options of each suite by its name, as {"muse": {"data": "muse-bench/MUSE-Books"}}.

    Raises:
        UserError: an unknown suite or option, a missing or bad one, or a library that is not installed.

    >>> open_suites({"muse": {}})
    Traceback (most recent call last):
        ...
    trace_unlearn.errors.UserError: suites.muse: needs data
    """
    return {name: _open(name, options) for name, options in given.items()}


def _open(name: str, given: Any) -> Suite:
    if name not in SUITES:
        raise UserError(f"suites: got {name!r}, allowed are {', '.join(SUITES)}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    suite: type[Suite] = getattr(module, SUITES[name])
    if not isinstance(given, Mapping):
        raise UserError(f"suites.{name}: got {given!r}, allowed are options by name")
    fields = {field.name: field for field in dataclasses.fields(suite)}  # type: ignore[arg-type]  # all are dataclasses
    if unknown := sorted(set(given) - fields.keys()):
        raise UserError(f"suites.{name}: {unknown[0]!r} is none of its options: {', '.join(fields)}")
    needed = [field.name for field in fields.values() if _required(field) and field.name not in given]
    if needed:
        raise UserError(f"suites.{name}: needs {', '.join(needed)}")
    opened = suite(**given)
    try:
        opened.check()
    except UserError as error:
        raise UserError(f"suites.{name}: {error}") from error
    return opened


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
