"""Our code inside other people's: `fuse_loss` and `fuse_routers` for transformers, a plugin for open-unlearning.

Imports the rooms of the method, up to training. The names are imported when they are first used: the plugin also runs
where transformers is too old for them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trace_unlearn.fusion.loss import FusedLoss, PendingLogits, fuse_loss, fused_loss_of
    from trace_unlearn.fusion.routers import FusedRouters, fuse_routers, fused_routers_of

__all__ = [
    "FusedLoss",
    "FusedRouters",
    "PendingLogits",
    "fuse_loss",
    "fuse_routers",
    "fused_loss_of",
    "fused_routers_of",
]

_ROUTERS = ("FusedRouters", "fuse_routers", "fused_routers_of")


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "trace_unlearn.fusion.routers" if name in _ROUTERS else "trace_unlearn.fusion.loss"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
