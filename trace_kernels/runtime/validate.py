"""Checks at the boundary. Every message names the argument, what came, and what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch.autograd import forward_ad

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_values_on(device: torch.device) -> bool:
    """Whether values may be looked at: on a GPU that synchronises, so only with TRACE_KERNELS_DEBUG=1."""
    return device.type == "cpu" or os.environ.get("TRACE_KERNELS_DEBUG") == "1"


def fits(tensor: object, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> bool:
    """Whether the checks of dtype, shape and device below would pass, in a third of their time."""
    return (
        isinstance(tensor, torch.Tensor) and tensor.dtype is dtype and tensor.shape == shape and tensor.device == device
    )


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


def check_no_tangent(name: str, tensor: torch.Tensor | None, op: str) -> None:
    """Ops without a forward-mode formula would drop a tangent, and what depends on it would seem constant."""
    if forward_ad._current_level >= 0 and tensor is not None and _has_tangent(tensor):
        raise NotImplementedError(
            f"{name}: got a tangent (torch.func.jvp, jacfwd, hessian or torch.autograd.forward_ad), forward-mode "
            f"differentiation of {op} is not implemented"
        )


def _has_tangent(tensor: torch.Tensor) -> bool:
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        return True
    # The innermost transform hides the tangents of those around it.
    around = (torch._C._functorch.get_interpreter_stack() or [])[:-1]
    levels = [level.level() for level in around if level.key() == torch._C._functorch.TransformType.Jvp]
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.maybe_get_level(tensor) in levels:
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
