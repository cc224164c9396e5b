"""Forwards of single modules: what an instance does in place of its class's forward, or around it.

The class stays as it is, so that `type(model)(config)`, `isinstance`, `save_pretrained` and auto classes see nothing.
All that is known stands in one entry of the instance's `__dict__`, and the `forward` beside it only looks there. It
therefore does not matter who wraps that forward, and a wrapper that outlives the entry calls the class's forward.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Layer", "attach", "detach", "layer_of", "wrapped_by_another"]

_SLOT = "_trace_forwards"
_MARK = "_trace_own"
_OWN = ("forward", "_replicate_for_data_parallel")


class Layer:
    """One change of a forward. Layers lie on each other: the one attached last runs first.

    Attributes:
        replaces: whether it does without `inner` at times; such a layer lies below all others.
    """

    replaces = False

    def run(self, module: Any, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward; `inner` is the one below. `module` may be a replica of the one that it was attached to."""
        raise NotImplementedError

    def bind(self, module: nn.Module) -> None:
        """Called once with the module whose forward it is. A copy that is being made may have no attributes yet."""

    def copied(self) -> Layer | None:
        """What a copy of the module bears, one unpickled too; None, unless overridden: nothing."""
        return None

    def replica(self) -> Layer:
        """What a replica in another thread (`nn.DataParallel`) bears for the forward of this one."""
        return self


class _Layers:
    """The entry of a module: who it is, and its layers."""

    def __init__(self, module: nn.Module, layers: tuple[Layer, ...]) -> None:
        self.module, self.layers = module, layers
        for layer in layers:
            layer.bind(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Layers:
        return _Layers(copy.deepcopy(self.module, memo), self._kept())

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.module, self._kept())

    def _kept(self) -> tuple[Layer, ...]:
        return tuple(kept for layer in self.layers if (kept := layer.copied()) is not None)


def attach(module: nn.Module, layer: Layer) -> None:
    """Lets `layer` run as the forward of `module`, around what is there."""
    found = module.__dict__.get(_SLOT)
    if found is not None:
        layer.bind(module)
        found.layers = (layer, *found.layers) if layer.replaces else (*found.layers, layer)
        return
    reached = _is_reached(module)
    others = dict(module.__dict__)
    module.__dict__.clear()
    module.__dict__[_SLOT] = _Layers(module, (layer,))  # the first entry, see `_unpickled`
    module.__dict__.update(others)
    if not reached:
        _install(module)


def detach(module: nn.Module, layer: Layer) -> None:
    """Takes `layer` away, wherever it lies. Without any, nothing is left of what `attach` put into the module."""
    found = module.__dict__[_SLOT]
    found.layers = tuple(other for other in found.layers if other is not layer)
    if found.layers:
        return
    del module.__dict__[_SLOT]
    for name, value in list(module.__dict__.items()):
        if not _is_own(value):
            continue
        if name in _OWN:
            del module.__dict__[name]
        else:  # what another tool means to put back
            module.__dict__[name] = types.MethodType(type(module).forward, module)


def layer_of(module: nn.Module, kind: type[Layer]) -> Any:
    """The layer of `module` that is a `kind`, or None."""
    found = module.__dict__.get(_SLOT)
    return next((layer for layer in found.layers if isinstance(layer, kind)), None) if found is not None else None


def wrapped_by_another(module: nn.Module) -> bool:
    """Whether another tool has replaced this instance's forward, so that a layer would not be reached.

    The hooks of accelerate (device maps, offloading) keep what they call at hand: a layer goes there.
    """
    return "forward" in module.__dict__ and "_old_forward" not in module.__dict__ and not _is_reached(module)


def _is_own(value: Any) -> bool:
    function = getattr(value, "__func__", None)
    return function is not None and _is_marked(function)


def _is_marked(function: Any) -> bool:
    return getattr(function, _MARK, None) is function  # functools.wraps copies attributes


def _is_reached(module: nn.Module) -> bool:
    """Whether the instance's forward is ours, or a chain of wrappers around it."""
    for name in ("forward", "_old_forward"):
        forward: Any = module.__dict__.get(name)
        while forward is not None:
            forward = getattr(forward, "__func__", forward)
            if _is_marked(forward):
                return True
            forward = getattr(forward, "__wrapped__", None)
    return False


def _install(module: nn.Module) -> None:
    place = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    module.__dict__[place] = types.MethodType(_forward_of(type(module)), module)
    module.__dict__["_replicate_for_data_parallel"] = types.MethodType(_replicate_for_data_parallel, module)


def _forward_of(cls: type[nn.Module]) -> Callable[..., Any]:
    # No __wrapped__: who looks for the innermost function (accelerate, to take its wrapper off) is to find this one.
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = functools.partial(type(self).forward, self)
        found = self.__dict__.get(_SLOT)
        if found is not None:
            for layer in found.layers:
                inner = functools.partial(layer.run, self, inner)
        return inner(*args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    forward.__doc__ = cls.forward.__doc__
    setattr(forward, _MARK, forward)
    return forward


def _replicate_for_data_parallel(self: Any) -> Any:
    """A replica shares the entries of `__dict__`, and the forward there would be that of the original."""
    replica = type(self)._replicate_for_data_parallel(self)
    found = self.__dict__.get(_SLOT)
    for name, value in list(replica.__dict__.items()):
        if name == _SLOT or _is_own(value):
            del replica.__dict__[name]
    if found is not None:
        replica.__dict__[_SLOT] = _Layers(replica, tuple(layer.replica() for layer in found.layers))
        _install(replica)
    return replica


setattr(_replicate_for_data_parallel, _MARK, _replicate_for_data_parallel)


def _unpickled(module: Any, layers: tuple[Layer, ...]) -> _Layers:
    """The entry of a module that is being unpickled, and has no other entries yet.

    A bound method is pickled as the name of an attribute, which is read from the module next. So the forward is put
    there.
    """
    found = _Layers(module, layers)
    module.__dict__[_SLOT] = found
    _install(module)
    return found
