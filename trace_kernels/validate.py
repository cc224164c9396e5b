"""Checks at the boundary. Every message names the argument, what came, and what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_values_on(device: torch.device) -> bool:
    """Whether values may be looked at: on a GPU that synchronises, so only with TRACE_KERNELS_DEBUG=1."""
    return device.type == "cpu" or os.environ.get("TRACE_KERNELS_DEBUG") == "1"


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, allowed is a torch.Tensor")


def check_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise TypeError(f"{name}: got dtype {str(tensor.dtype).removeprefix('torch.')}, allowed: {names}")


def check_ndim(name: str, tensor: torch.Tensor, ndim: int, layout: str) -> None:
    if tensor.dim() != ndim:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, allowed is {layout}")


def check_shape(name: str, tensor: torch.Tensor, shape: Sequence[int], layout: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, allowed is {layout} = {list(shape)}")


def check_device(name: str, tensor: torch.Tensor, expected: torch.device, of: str) -> None:
    if tensor.device != expected:
        raise ValueError(f"{name}: is on {tensor.device}, allowed is {expected}, the device of {of}")


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed: {', '.join(map(repr, allowed))}")


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Looks at the values: call it only where `check_values_on` allows."""
    if math.isfinite(tensor.sum()):  # one small op; a sum may overflow, so that another answer says nothing
        return
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise not_finite(name, bad, tensor.numel())


def not_finite(name: str, bad: int, of: int) -> ValueError:
    return ValueError(f"{name}: {bad} of {of} entries are NaN or infinite, allowed are finite numbers")
