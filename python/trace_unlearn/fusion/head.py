"""The output embedding of a causal LM: which ones are understood, and how a loss is computed in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _has_any_global_hook as _has_global_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from trace_unlearn.errors import UserError

#: Called with hidden [..., H], weight [V, H] and bias [V] or None: what the head's linear map was about to be given.
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Any]


def linear_of(head: Any, model: str) -> torch.nn.Linear:
    """The linear layer that a head is, or the one that peft trains in its place (`modules_to_save`).

    Raises:
        UserError: it is something else; the message says what and why.
    """
    found = head
    while hasattr(found, "modules_to_save") and hasattr(found, "original_module"):
        active = [] if found.disable_adapters else found.active_adapters
        found = found.modules_to_save[active[0]] if active else found.original_module
    if isinstance(found, torch.nn.Linear) and type(found).forward is torch.nn.Linear.forward:
        return found
    raise UserError(f"fuse_loss: the output embedding of {model} is a {_name(found)}{_reason(found)}")


def check_weight(weight: torch.Tensor, model: str) -> None:
    """UserError for a weight that only its own class can multiply with."""
    plain = type(weight) is torch.nn.Parameter or isinstance(weight, DTensor)
    packed = not plain and is_traceable_wrapper_subclass(weight)
    if packed or not weight.is_floating_point():
        what = f"a {_name(weight)}" if packed else str(weight.dtype)
        raise UserError(
            f"fuse_loss: the weight of the output embedding of {model} is {what}, which only its own code can "
            "multiply with; leave the output embedding unquantised"
        )


def at_head(head: torch.nn.Module, hidden: torch.Tensor, compute: Compute) -> Any:
    """What `compute` makes of the arguments of the head's linear map, returned by the head in the place of logits.

    The head is called as always. So a hook that makes its weight available does so (FSDP, ZeRO, offloading), one that
    changes what comes in is honoured, and the weight is the effective one (parametrisations, `modules_to_save`).

    Raises:
        UserError: the head is not one linear map, or a hook returned something else than it was given.
    """
    hooks = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    hooks = hooks or _has_global_hooks()  # type: ignore[no-untyped-call]
    if type(head) is torch.nn.Linear and not hooks and "forward" not in head.__dict__:
        # The call would be the linear map and nothing else.
        return compute(hidden, head.weight, head.bias)
    seen: list[Any] = []
    with _AtLinear(compute, seen):
        found = head(hidden)
    if len(seen) != 2 or _versions(seen[0]) != seen[1] or not (found is seen[0] or _unchanged(found, seen[0])):
        what = "changes what it returns" if seen else "computes it without a linear map"
        raise UserError(
            f"fuse_loss: the output embedding is a {_name(head)}, and a hook or wrapper on it {what}; with labels "
            "there are no logits to change: remove it, or undo fuse_loss"
        )
    return found


class _AtLinear(TorchFunctionMode):
    """Puts `compute` in the place of a linear map. What it found goes to the list `seen`, with its versions.

    A list, since a compiler follows no attributes of a mode.
    """

    def __init__(self, compute: Compute, seen: list[Any]) -> None:
        super().__init__()
        self.compute, self.seen = compute, seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        if self.seen:
            raise UserError("fuse_loss: the output embedding computes more than one linear map; it bears an adapter")
        found = self.compute(*args, **kwargs)
        self.seen += (found, _versions(found))
        return found


def _versions(found: Any) -> list[int]:
    """They tell of changes in place; a compiler and inference mode keep none."""
    if torch.compiler.is_compiling():
        return []
    tensors = found if isinstance(found, tuple) else (found,)
    return [t._version for t in tensors if isinstance(t, torch.Tensor) and not t.is_inference()]


def _unchanged(found: Any, computed: Any) -> bool:
    """Whether a hook only moved, cast, copied or aliased the values, as those of FSDP, ZeRO and accelerate do."""
    if torch.compiler.is_compiling():
        return False
    if isinstance(computed, tuple):
        same_kind = isinstance(found, tuple) and len(found) == len(computed)
        return same_kind and all(_unchanged(f, c) for f, c in zip(found, computed, strict=True))
    if found is computed:
        return True
    if not isinstance(found, torch.Tensor) or found.shape != computed.shape:
        return False
    if found.dtype == computed.dtype and found.device == computed.device and found.data_ptr() == computed.data_ptr():
        return True
    expected = computed.detach().to(found.device, found.dtype)
    return torch.allclose(found.detach(), expected, rtol=0, atol=0, equal_nan=True)


def _name(thing: object) -> str:
    cls = type(thing)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _reason(head: object) -> str:
    if hasattr(head, "base_layer"):
        return ": it bears an adapter; leave the output embedding out of the adapter's targets"
    if isinstance(head, torch.nn.Linear):
        return (
            ", whose forward is not torch.nn.Linear's: its weight may be quantised or scaled, and only its own code "
            "can multiply with it; leave the output embedding as a torch.nn.Linear"
        )
    return ", allowed is a torch.nn.Linear"
