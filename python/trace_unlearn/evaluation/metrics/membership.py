"""Whether a model betrays what it was trained on: Min-K%-Prob, and PrivLeak as MUSE defines it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def min_k(log_probs: Sequence[float], share: float = 0.4) -> float:
    """Min-K%-Prob (Shi et al. 2024): the negative mean of the lowest `share` of a text's token log-probabilities.

    High for texts that the model has not seen. At least one token counts: MUSE's own code takes int(share * n) of n
    tokens, which is none of a short text, and then NaN. NaN here only without any token.

    >>> min_k([-1.0, -4.0, -2.0, -0.5, -3.0], share=0.4)
    3.5
    """
    values = np.sort(np.asarray(log_probs, dtype=np.float64))
    return float(-values[: max(1, int(len(values) * share))].mean()) if len(values) else float("nan")


def auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """P(a value of `higher` > one of `lower`), ties counting half: the area under the ROC curve (Mann-Whitney).

    NaN where a value is NaN.

    >>> auc([3.0, 1.0], [2.0, 1.0])  # of the four pairs two are greater and one is equal
    0.625
    """
    if not len(higher) or not len(lower):
        raise ValueError(f"auc: got {len(higher)} and {len(lower)} values, allowed are at least one of each")
    ordered = np.sort(np.asarray(lower, dtype=np.float64))
    if np.isnan(ordered).any() or np.isnan(higher).any():
        return float("nan")
    below = np.searchsorted(ordered, higher, side="left") + np.searchsorted(ordered, higher, side="right")
    return float(below.mean() / (2 * len(ordered)))


def priv_leak(measured: float, reference: float) -> float:
    """100 (A - A_ref) / A_ref, of the AUC A = auc(Min-K of forget, Min-K of holdout); 0 is ideal.

    With this order A is the chance that a held-out text looks more like a member than a forgotten one: it is near 0
    when the forget set is still remembered (PrivLeak towards -100), near that of a model which never saw either, A_ref,
    when it is forgotten, and greater when forgetting itself gives it away. A_ref belongs to one architecture and one
    pair of sets: Llama-2's on MUSE (.4772 News, .5393 Books) mean nothing for another model.

    >>> priv_leak(0.25, 0.5)
    -50.0
    """
    if not 0 < reference <= 1:
        raise ValueError(f"reference: got {reference}, allowed are numbers above 0 up to 1")
    return 100 * (measured - reference) / reference
