"""Kernels for machine unlearning on Mixture-of-Experts language models.

Every op takes ``backend="auto"``; ``python -m trace_kernels`` lists the backends that this machine has.
"""

from pathlib import Path

from trace_kernels.ops.cross_entropy.op import cross_entropy
from trace_kernels.ops.hit_moments.op import hit_moments, hit_order, hit_scores
from trace_kernels.ops.linear_cross_entropy.log_prob import linear_log_prob
from trace_kernels.ops.linear_cross_entropy.op import linear_cross_entropy, log_prob_sum
from trace_kernels.ops.linear_cross_entropy.token_stats import TokenStats, linear_token_stats
from trace_kernels.ops.linear_kl.op import linear_kl
from trace_kernels.ops.record_routing.op import record_routing_
from trace_kernels.ops.route_hits.op import route_hits
from trace_kernels.ops.router_topk.op import router_topk
from trace_kernels.runtime.backends import BackendError
from trace_kernels.runtime.native import release_workspace

__version__ = (Path(__file__).parent / "VERSION").read_text().strip()
__all__ = [
    "BackendError",
    "TokenStats",
    "cross_entropy",
    "hit_moments",
    "hit_order",
    "hit_scores",
    "linear_cross_entropy",
    "linear_kl",
    "linear_log_prob",
    "linear_token_stats",
    "log_prob_sum",
    "record_routing_",
    "release_workspace",
    "route_hits",
    "router_topk",
]
