"""What someone may do to an unlearned model to get the forgotten back."""

from trace_unlearn.evaluation.attacks.quantize import quantize_
from trace_unlearn.evaluation.attacks.relearn import relearn
from trace_unlearn.evaluation.attacks.reroute import ExpertBan, avoiding, avoiding_chosen

__all__ = ["ExpertBan", "avoiding", "avoiding_chosen", "quantize_", "relearn"]
