"""A device beside the CPU on a machine that has none: tensors that say they lie there and compute on the CPU.

An operation on tensors of both devices is the error that it is on a GPU.
"""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SECOND = torch.device("lazy", 0)  # a type that no tensor has otherwise, and that every build of torch knows
_MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class SecondTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=SECOND
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Within it tensors can be made on SECOND and moved there."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})


def move(module: nn.Module) -> None:
    """Moves the module's parameters and buffers to SECOND; they can then not be trained."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(SecondTensor(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = SecondTensor(buffer)


def _run(operation, args, kwargs):
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, SecondTensor)]
    asked = kwargs.get("device")
    lands_there = bool(there) if asked is None else torch.device(asked).type == SECOND.type
    if asked is not None and lands_there:
        kwargs = {**kwargs, "device": "cpu"}
    if there and operation not in _MOVES and any(t.dim() > 0 for t in tensors if not isinstance(t, SecondTensor)):
        raise RuntimeError(f"{operation}: got tensors on two devices")
    known = {id(tensor.inner): tensor for tensor in there}  # in-place operations return their argument
    args, kwargs = tree_map(lambda value: value.inner if isinstance(value, SecondTensor) else value, (args, kwargs))
    result = operation(*args, **kwargs)
    if not lands_there:
        return result

    def there_too(value):
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else SecondTensor(value)

    return tree_map(there_too, result)
