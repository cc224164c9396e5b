"""TOFU's measures of single questions, from mean negative log-likelihoods (nats per token) of answers."""

from __future__ import annotations

import math
from collections.abc import Sequence


def answer_probability(nll: float) -> float:
    """exp(-nll): the answer's probability to the power of one over its length."""
    return math.exp(-nll)


def option_probability(right: float, wrong: Sequence[float]) -> float:
    """The right answer's share of all answers' `answer_probability`, from their negative log-likelihoods.

    >>> option_probability(1.0, [1.0, 1.0, 1.0])
    0.25
    """
    return 1 / (1 + sum(math.exp(min(right - nll, 700.0)) for nll in wrong))


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
    r"""exp(-mean nll of wrong answers) / exp(-nll of the right one): near 0 for who knows, near 1 for who does not.

    .. math:: R = \exp\Bigl(\text{nll}_\text{right} - \frac1K \sum_k \text{nll}_k\Bigr)

    The mean is taken inside exp, as in TOFU's paper (a geometric mean); its older helper averages probabilities. The
    right answer is the paraphrased one where the data has it.

    >>> round(truth_ratio(2.0, [1.0, 5.0]), 4)  # exp(2 - 3)
    0.3679
    """
    if not wrong:
        raise ValueError("wrong: got no answer, allowed is at least one")
    return math.exp(min(right - sum(wrong) / len(wrong), 700.0))


def forgotten(ratio: float) -> float:
    """min(R, 1/R), the truth ratio's score on the forget set: 1 when true and false are equally likely."""
    if math.isnan(ratio):
        return ratio
    return min(ratio, 1 / ratio) if ratio > 0 else 0.0


def true_better(ratio: float) -> float:
    """max(0, 1 - R), the truth ratio's score on data to keep."""
    return max(1 - ratio, 0.0)  # in this order NaN stays NaN
