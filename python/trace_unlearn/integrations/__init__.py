"""Our code inside other people's: `fuse_loss` and `fuse_routers` for transformers, a plugin for open-unlearning.

Imports the rooms of the method, up to training.
"""

from trace_unlearn.fusion.loss import FusedLoss, PendingLogits, fuse_loss, fused_loss_of
from trace_unlearn.fusion.routers import FusedRouters, fuse_routers

__all__ = ["FusedLoss", "FusedRouters", "PendingLogits", "fuse_loss", "fuse_routers", "fused_loss_of"]
