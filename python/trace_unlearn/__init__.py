"""TRACE: routing-aware machine unlearning for Mixture-of-Experts language models.

The names below are imported when they are first used: ``trace-unlearn --help`` loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trace_unlearn.calibration.calibrate import calibrate
    from trace_unlearn.calibration.selection import select_experts
    from trace_unlearn.calibration.weights import attach_weights
    from trace_unlearn.errors import UserError
    from trace_unlearn.routing.profile import profile_routing
    from trace_unlearn.routing.recorder import RoutingRecorder
    from trace_unlearn.sources.data import collate, load_tokens, shifted_targets
    from trace_unlearn.training.config import TraceConfig
    from trace_unlearn.training.trainer import TraceTrainer

_HOME = {
    "RoutingRecorder": "routing.recorder",
    "TraceConfig": "training.config",
    "TraceTrainer": "training.trainer",
    "UserError": "errors",
    "attach_weights": "calibration.weights",
    "calibrate": "calibration.calibrate",
    "collate": "sources.data",
    "load_tokens": "sources.data",
    "profile_routing": "routing.profile",
    "select_experts": "calibration.selection",
    "shifted_targets": "sources.data",
}

__all__ = [
    "RoutingRecorder",
    "TraceConfig",
    "TraceTrainer",
    "UserError",
    "attach_weights",
    "calibrate",
    "collate",
    "load_tokens",
    "profile_routing",
    "select_experts",
    "shifted_targets",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
