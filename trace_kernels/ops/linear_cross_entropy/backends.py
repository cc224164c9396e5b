"""The backends of the ops on a language-model head, which share their functions: those of reference.py.

A backend's ``refuse`` gets (hidden [T, H], weight [V, H], bias [V] or None).
"""

from __future__ import annotations

from trace_kernels.ops.linear_cross_entropy import cuda, native, reference
from trace_kernels.runtime import cuda_backend, triton_backend
from trace_kernels.runtime.backends import OpBackends

backends = OpBackends("linear_cross_entropy")
log_prob_backends = OpBackends("linear_log_prob")
stats_backends = OpBackends("linear_token_stats")
for _op in (backends, log_prob_backends, stats_backends):
    _op.register("reference", forward=reference.forward, stats=reference.stats, backward=reference.backward)
    triton_backend.register(_op, __package__, "forward", "stats", "backward")
    cuda_backend.register(_op, cuda, "forward", "stats", "backward")
    _op.register(
        "cpu",
        unavailable=native.cpu_unavailable,
        refuse=native.refuse_cpu,
        forward=native.forward_cpu,
        stats=native.stats_cpu,
        backward=native.backward_cpu,
    )
