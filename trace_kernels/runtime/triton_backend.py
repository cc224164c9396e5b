"""Registering an op's Triton kernels without importing Triton.

The kernels of an op live in ``ops/<op>/triton.py``, which is imported when the backend first runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import torch

from trace_kernels.runtime.backends import OpBackends
from trace_kernels.runtime.recording import is_recording

MINIMUM = (3, 6)


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: TRITON_INTERPRET=1 in the environment."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _version() -> tuple[tuple[int, ...], str | None]:
    """Triton's version, or why it cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return (), "triton is not installed: pip install triton"
    try:
        version: str = importlib.import_module("triton").__version__
    except ImportError as error:
        return (), f"triton does not import: {error}"
    numbers = tuple(int(part) for part in version.split(".")[:2])
    too_old = f"triton {version} is too old, {MINIMUM[0]}.{MINIMUM[1]} or newer is needed"
    return numbers, too_old if numbers < MINIMUM else None


def interpreter_unavailable() -> str | None:
    """Why kernels cannot run in Triton's interpreter, or None when they can with TRITON_INTERPRET=1."""
    version, reason = _version()
    if reason is not None or version >= (3, 9):
        return reason
    # Before, its loops made an int of an array of one element, which newer NumPy refuses.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            int(numpy.zeros(1, dtype=numpy.int64))
    except TypeError:
        return f"the interpreter of triton {version[0]}.{version[1]} does not work with NumPy {numpy.__version__}"
    return None


def triton_unavailable() -> str | None:
    """Why no Triton kernel can run in this process, or None when it can."""
    if interpreting():
        return interpreter_unavailable()
    if (reason := _version()[1]) is None and not torch.cuda.is_available() and not is_recording():
        return "torch sees no CUDA device, and TRITON_INTERPRET=1 is not set"
    return reason


def refuse_device(*args: Any, **kwargs: Any) -> str | None:
    """Why a call on these tensors cannot run in Triton: the device, or float64."""
    for value in args:
        if not isinstance(value, torch.Tensor):
            continue
        kind = value.device.type
        if kind != "cuda" and not (kind == "cpu" and interpreting()) and not (kind == "meta" and is_recording()):
            return f"tensors are on {value.device}, it serves cuda (cpu only with TRITON_INTERPRET=1)"
        if value.dtype == torch.float64:
            return "float64 is served by the reference only"
    return None


def register(backends: OpBackends, package: str, *functions: str) -> None:
    """Add the backend ``triton``: `functions`, and ``refuse`` if it is there, of the module ``<package>.triton``."""

    def module() -> Any:
        return importlib.import_module(f"{package}.triton")

    def lazily(name: str) -> Callable[..., Any]:
        return lambda *args: getattr(module(), name)(*args)

    def refuse(*args: Any) -> str | None:
        if (reason := refuse_device(*args)) is not None or not hasattr(module(), "refuse"):
            return reason
        own: str | None = module().refuse(*args)
        return own

    backends.register(
        "triton", unavailable=triton_unavailable, refuse=refuse, **{name: lazily(name) for name in functions}
    )
