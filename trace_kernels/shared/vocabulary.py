"""Heads whose vocabulary is split over processes: whose rows are whose, and what the processes tell each other.

Each process of a group holds a contiguous slice [V_r, H] of a head [V, H], in the order of their ranks, and all of them
the same hidden states. A backend computes its slice as if it were a head of its own; what it knows of a row is then
corrected by one exchange of a few numbers per row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from trace_kernels.runtime import validate
from trace_kernels.shared import losses

#: An own value for ignored rows: a local target may be equal to the caller's.
IGNORED = -100


def local_head(
    weight: torch.Tensor, other: torch.Tensor | None, group: Any, names: tuple[str, str] = ("weight", "bias")
) -> tuple[torch.Tensor, torch.Tensor | None, str | None]:
    """Slices of two tensors that this process holds, and the group that holds the rest; None where they are whole.

    group: None, a ProcessGroup, or a DeviceMesh: of one dimension, or the one over which a DTensor is sharded.
    """
    if group is None:
        for name, tensor in zip(names, (weight, other), strict=True):
            if _is_dtensor(tensor):
                raise ValueError(
                    f"{name}: got a DTensor without group. Allowed is group={name}.device_mesh, where all its "
                    f"processes hold the same hidden states and each a slice of the classes; else {name}.full_tensor()"
                )
        return weight, other, None
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError("group: torch.distributed is not initialised, allowed is then None")
    name = _group_name(weight, group, names[0])
    local = _unwrapped(weight, name, names[0])
    assert local is not None
    return local, _unwrapped(other, name, names[1]), name


def _group_name(weight: torch.Tensor, group: Any, name: str) -> str:
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if _is_dtensor(weight):
            group = group.get_group(_sharded_dimension(weight, name))
        elif group.ndim == 1:
            group = group.get_group()
        else:
            raise ValueError(
                f"group: got a DeviceMesh of {group.ndim} dimensions, allowed is one of 1, or the mesh of a DTensor"
            )
    elif not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group: got {type(group).__name__}, allowed are None, a ProcessGroup and a DeviceMesh")
    found: str = group.group_name
    return found


def _is_dtensor(tensor: Any) -> bool:
    # A tensor of this kind exists only where its module was imported, and importing it takes long.
    import sys

    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _sharded_dimension(tensor: Any, name: str) -> int:
    """The dimension of a DTensor's mesh over which its rows are split."""
    placements = tensor.placements
    split = [i for i, placement in enumerate(placements) if placement.is_shard(0)]
    if len(split) != 1 or not all(p.is_shard(0) or p.is_replicate() for p in placements):
        raise ValueError(
            f"{name}: got a DTensor with placements {tuple(placements)}, allowed is one Shard(dim=0), "
            "the others Replicate()"
        )
    return split[0]


def _unwrapped(tensor: torch.Tensor | None, group_name: str, name: str) -> torch.Tensor | None:
    if tensor is None or not _is_dtensor(tensor):
        return tensor
    sharded: Any = tensor
    over = sharded.device_mesh.get_group(_sharded_dimension(tensor, name))
    if over.group_name != group_name:
        raise ValueError(f"{name}: is sharded over another group than group, allowed is the same")
    local: torch.Tensor = sharded.to_local()
    return local


def _group(name: str) -> torch.distributed.ProcessGroup:
    # Operators of torch.library take no group, so torch's own collectives pass its name, too.
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    found: torch.distributed.ProcessGroup = _resolve_process_group(name)  # type: ignore[arg-type]
    return found


def rank_in(group_name: str) -> int:
    return _group(group_name).rank()


def gathered(rows: torch.Tensor, group_name: str) -> torch.Tensor:
    """[R, ...]: `rows` of all R processes, in one collective."""
    group = _group(group_name)
    out = rows.new_empty(group.size(), *rows.shape)
    torch.distributed.all_gather(list(out.unbind()), rows.contiguous(), group=group)
    return out


class Slices:
    """Which classes which process has, without asking the device for a number.

    Attributes:
        rank: this process's in the group.
        ends: [R] int64, the class after the last one of each process.
    """

    def __init__(self, num_classes: int, device: torch.device, group_name: str) -> None:
        """num_classes: of this process."""
        self.rank = _group(group_name).rank()
        mine = torch.full((1,), num_classes, dtype=torch.int64, device=device)
        self.ends = gathered(mine, group_name)[:, 0].cumsum(0)
        self.first = self.ends[self.rank] - num_classes

    def check_target(self, target: torch.Tensor, ignore_index: int) -> None:
        """On a GPU only when debugging; there `valid` tells."""
        if validate.check_values_on(target.device):
            losses.check_target_values(target, int(self.ends[-1]), ignore_index)

    def valid(self, target: torch.Tensor) -> torch.Tensor:
        return (target >= 0) & (target < self.ends[-1])

    def owner(self, target: torch.Tensor) -> torch.Tensor:
        """[T]: the rank that has the class; any where none has."""
        return torch.bucketize(target, self.ends, right=True).clamp_(max=len(self.ends) - 1)

    def local_target(self, target: torch.Tensor, ignore_index: int) -> torch.Tensor:
        """The class's place in this process's slice, NO_LABEL where another has it, IGNORED where it is ignored."""
        mine = (target >= self.first) & (target < self.ends[self.rank])
        local = torch.where(mine, target - self.first, losses.NO_LABEL)
        return torch.where(target == ignore_index, IGNORED, local)


def others(lse: torch.Tensor, rank: int | torch.Tensor) -> torch.Tensor:
    """[T]: logsumexp of all slices but one. lse: [R, T]; rank: whose to leave out, of all rows or of each."""
    index = torch.arange(lse.shape[0], device=lse.device)[:, None]
    return torch.logsumexp(lse.masked_fill(index == rank, -torch.inf), dim=0)


@torch.library.custom_op("trace_kernels::sum_over_group", mutates_args=())
def sum_over_group(rows: torch.Tensor, group_name: str) -> torch.Tensor:
    """The sum of what all processes have."""
    total = rows.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=_group(group_name))
    return total


@sum_over_group.register_fake
def _(rows: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


sum_over_group.register_autograd(losses.refuse_second_order)
