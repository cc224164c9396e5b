"""Ops that run once a layer: torch.library.custom_op's bookkeeping would cost more than their kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["LIBRARY", "RUNS", "define"]

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
