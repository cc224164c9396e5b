"""TRACE: routing-aware machine unlearning for Mixture-of-Experts language models.

The names below are imported when they are first used: ``trace-unlearn --help`` loads neither torch nor transformers.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trace_unlearn.calibrate import calibrate
    from trace_unlearn.config import TraceConfig
    from trace_unlearn.errors import UserError
    from trace_unlearn.profile import profile_routing
    from trace_unlearn.routing import RoutingRecorder
    from trace_unlearn.selection import select_experts
    from trace_unlearn.trainer import TraceTrainer

_HOME = {
    "RoutingRecorder": "routing",
    "TraceConfig": "config",
    "TraceTrainer": "trainer",
    "UserError": "errors",
    "calibrate": "calibrate",
    "profile_routing": "profile",
    "select_experts": "selection",
}

__all__ = [
    "RoutingRecorder",
    "TraceConfig",
    "TraceTrainer",
    "UserError",
    "calibrate",
    "profile_routing",
    "select_experts",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds every submodule to its name here; `calibrate` stays the function, in any order.
        if name == "calibrate" and isinstance(value, ModuleType):
            value = value.calibrate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
