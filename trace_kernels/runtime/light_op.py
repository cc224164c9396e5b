"""Ops that run once per layer: torch.library.custom_op's bookkeeping would cost more than their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._C import _dispatch_keys as _keys
from torch._C import _dispatch_tls_local_include_set as _mode
from torch.autograd import profiler
from torch.compiler import is_dynamo_compiling
from torch.overrides import has_torch_function

from trace_kernels.runtime.recording import is_recording

__all__ = ["LIBRARY", "RUNS", "bypasses", "define", "written"]

LIBRARY = torch.library.Library("trace_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]
RUNS: dict[str, Callable[..., Any]] = {}  # what runs, by the qualified name


def define(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], mutates_args: Iterable[str] = ()
) -> torch._ops.OpOverload:
    """The op trace_kernels::`name`, with the schema of `run`'s annotations.

    As `torch.library.custom_op`, but the dispatcher calls `run` itself: no check that outputs alias nothing, no
    version counter raised for what it mutates (`run` does that), no autograd unless it is registered with `LIBRARY`.
    On a warm cache that is 6 us instead of 36 for `record_routing_`.
    """
    schema = torch.library.infer_schema(run, mutates_args=tuple(mutates_args))
    tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
    LIBRARY.define(name + schema, tags=tags)  # type: ignore[no-untyped-call]
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"trace_kernels::{name}", fake, lib=LIBRARY)
    RUNS[f"trace_kernels::{name}"] = run
    op: torch._ops.OpOverload = getattr(torch.ops.trace_kernels, name).default
    return op


_PLAIN_MODE = _mode().raw_repr()
_PLAIN_KEYS = {_keys(torch.empty(0, device="cpu")).raw_repr()}
_META_KEYS = _keys(torch.empty(0, device="meta")).raw_repr()


def bypasses(*tensors: torch.Tensor | None) -> bool:
    """Whether a call may run as Python code, past the dispatcher, without anybody noticing.

    Not where something looks at ops (a compiler, an export, a dispatch or function mode, functorch, the profiler), nor
    with tensors that are more than memory of a CPU or a CUDA device (subclasses, fakes, lazy negations). In eager
    training nothing does, and the dispatcher's way to a Python op and back takes 0.1 ms where a model's layer has just
    emptied the caches, as much as the kernels do.
    """
    # Dynamo reads this function instead of running it; every other tracer works with a mode or tensors of its own.
    if is_dynamo_compiling() or profiler._is_profiler_enabled or has_torch_function(tensors):
        return False
    if _mode().raw_repr() != _PLAIN_MODE:
        return False
    return all(tensor is None or _keys(tensor).raw_repr() in _PLAIN_KEYS or _is_plain(tensor) for tensor in tensors)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Of a tensor whose keys were not met yet: those of a CUDA device are known when the first of its tensors comes."""
    keys = _keys(tensor).raw_repr()
    if tensor.is_cuda and keys == _keys(torch.empty(0, device=tensor.device)).raw_repr():
        _PLAIN_KEYS.add(keys)
        return True
    return is_recording() and keys == _META_KEYS


def written(*tensors: torch.Tensor | None) -> None:
    """Tells autograd what was changed in place, so that it notices when something saved for a backward was."""
    if changed := [tensor for tensor in tensors if tensor is not None]:
        torch.autograd.graph.increment_version(changed)
