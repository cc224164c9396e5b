"""Kernels for machine unlearning on Mixture-of-Experts language models.

Every op takes ``backend="auto"``; ``python -m trace_kernels`` lists the backends that this machine has.
"""

from pathlib import Path

from trace_kernels.backends import BackendError
from trace_kernels.ops.record_routing.op import record_routing_

__version__ = (Path(__file__).parent / "VERSION").read_text().strip()
__all__ = ["BackendError", "record_routing_"]
