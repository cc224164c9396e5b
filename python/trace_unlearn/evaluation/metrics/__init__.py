"""What is computed from log-probabilities and texts: pure functions without a model, defined in docs/evaluation.md."""

from trace_unlearn.evaluation.metrics.membership import auc, min_k, priv_leak
from trace_unlearn.evaluation.metrics.memorization import exact_memorization, extraction_strength
from trace_unlearn.evaluation.metrics.overlap import RougeL, rouge_l
from trace_unlearn.evaluation.metrics.statistics import harmonic_mean, ks_p_value
from trace_unlearn.evaluation.metrics.truth import (
    answer_probability,
    forgotten,
    option_probability,
    true_better,
    truth_ratio,
)

__all__ = [
    "RougeL",
    "answer_probability",
    "auc",
    "exact_memorization",
    "extraction_strength",
    "forgotten",
    "harmonic_mean",
    "ks_p_value",
    "min_k",
    "option_probability",
    "priv_leak",
    "rouge_l",
    "true_better",
    "truth_ratio",
]
