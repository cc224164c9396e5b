"""How much of a text a model recites, from whether each token is the most likely one after those before it."""

from __future__ import annotations

from collections.abc import Sequence


def exact_memorization(correct: Sequence[bool]) -> float:
    """The share of tokens that are the most likely ones (Tirumala et al. 2022); NaN for no token.

    >>> exact_memorization([True, False, True, True])
    0.75
    """
    return sum(correct) / len(correct) if len(correct) else float("nan")


def extraction_strength(correct: Sequence[bool]) -> float:
    """1 - k/n, with the smallest k such that all tokens after the first k are the most likely ones (Carlini 2021).

    1 when the whole text follows from its prompt, 0 when not even the last token does; NaN for no token. The published
    loop of open-unlearning ends at k = n - 1, and so gives 1/n for a text of which nothing is recited.

    >>> extraction_strength([True, False, True, True])
    0.5
    >>> extraction_strength([True, True, False])
    0.0
    """
    n = len(correct)
    k = next((i + 1 for i in range(n - 1, -1, -1) if not correct[i]), 0)
    return 1 - k / n if n else float("nan")
