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
    from trace_unlearn.evaluation.measure import evaluate_model as evaluate
    from trace_unlearn.evaluation.verdict import verdict
    from trace_unlearn.routing.profile import profile_routing
    from trace_unlearn.routing.recorder import RoutingRecorder
    from trace_unlearn.sources.data import collate, load_tokens, shifted_targets
    from trace_unlearn.training.config import TraceConfig
    from trace_unlearn.training.trainer import TraceTrainer
    from trace_unlearn.verbs.attack import attack
    from trace_unlearn.verbs.report import report

_HOME = {
    "RoutingRecorder": "routing.recorder.RoutingRecorder",
    "TraceConfig": "training.config.TraceConfig",
    "TraceTrainer": "training.trainer.TraceTrainer",
    "UserError": "errors.UserError",
    "attach_weights": "calibration.weights.attach_weights",
    "attack": "verbs.attack.attack",
    "calibrate": "calibration.calibrate.calibrate",
    "collate": "sources.data.collate",
    "evaluate": "evaluation.measure.evaluate_model",
    "load_tokens": "sources.data.load_tokens",
    "profile_routing": "routing.profile.profile_routing",
    "report": "verbs.report.report",
    "select_experts": "calibration.selection.select_experts",
    "shifted_targets": "sources.data.shifted_targets",
    "verdict": "evaluation.verdict.verdict",
}

__all__ = [
    "RoutingRecorder",
    "TraceConfig",
    "TraceTrainer",
    "UserError",
    "attach_weights",
    "attack",
    "calibrate",
    "collate",
    "evaluate",
    "load_tokens",
    "profile_routing",
    "report",
    "select_experts",
    "shifted_targets",
    "verdict",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module, _, attribute = _HOME[name].rpartition(".")
        try:
            return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        except ModuleNotFoundError as error:
            from trace_unlearn.errors import needs

            if error.name is None or error.name.split(".")[0] in (__name__, "trace_kernels"):
                raise
            raise ModuleNotFoundError(f"{__name__}.{name} {needs(error.name)}", name=error.name) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
