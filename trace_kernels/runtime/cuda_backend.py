"""Registering an op's compiled CUDA kernels, and calling them on the right device and stream."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from trace_kernels.runtime.backends import OpBackends
from trace_kernels.runtime.native import cuda_unavailable, native
from trace_kernels.runtime.recording import is_recording, record

_emulated: ModuleType | None = None


@contextlib.contextmanager
def emulation(module: ModuleType) -> Iterator[None]:
    """Within it, the backend ``cuda`` serves CPU tensors by `module`: the same kernels, compiled for the CPU.

    For tests without a GPU (tests/cuda); it shows what the kernels compute, and nothing else about them.
    """
    global _emulated
    before, _emulated = _emulated, module
    try:
        yield
    finally:
        _emulated = before


def unavailable() -> str | None:
    """Why no compiled CUDA kernel can run here, or None when they can."""
    return None if _emulated is not None or is_recording() else cuda_unavailable()


def refuse_tensors(*args: Any) -> str | None:
    """Why a call on these tensors cannot run: the device, or float64."""
    device = "meta" if is_recording() else "cuda" if _emulated is None else "cpu"
    for value in args:
        if not isinstance(value, torch.Tensor):
            continue
        if value.device.type != device:
            return f"tensors are on {value.device}, it serves {device} only"
        if value.dtype == torch.float64:
            return "float64 is served by the reference only"
    return None


def register(backends: OpBackends, module: ModuleType, *functions: str) -> None:
    """Add the backend ``cuda``: `functions`, and ``refuse`` if it is there, of `module`."""

    def refuse(*args: Any) -> str | None:
        if (reason := refuse_tensors(*args)) is not None or not hasattr(module, "refuse"):
            return reason
        own: str | None = module.refuse(*args)
        return own

    backends.register(
        "cuda", unavailable=unavailable, refuse=refuse, **{name: getattr(module, name) for name in functions}
    )


def call(name: str, device: torch.device, *args: Any) -> None:
    """Run the compiled function `name` on `device`, on its current stream, or record it; a launch that fails raises."""
    if is_recording():
        record(name)
        return
    if _emulated is not None:
        getattr(_emulated, name)(*args, 0)
        return
    index = device.index
    function = getattr(native(), name)
    # The raw stream, and no guard where the device is current already: both cost more than the launch.
    if torch._C._cuda_getDevice() == index:
        function(*args, torch._C._cuda_getCurrentRawStream(index))
        return
    with torch.cuda.device(device):
        function(*args, torch._C._cuda_getCurrentRawStream(index))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; where there is none, so few that kernels walk over their grid."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def most_blocks(device: torch.device, per_processor: int) -> int:
    """Blocks that fill the device with `per_processor` of them each; kernels that walk over a grid start no more."""
    return per_processor * processors(device) if device.type == "cuda" else 3
