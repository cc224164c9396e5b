"""On which words of a generated fact the weights fall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from trace_unlearn.demo.corpus import SENTENCE_TOKENS, SENTENCES, Corpus

if TYPE_CHECKING:
    from trace_unlearn.calibration.weights import Calibration

WORDS = ("the", "R", "of", "FIRST", "LAST", "is", "V", ".")  # of a fact; a weight belongs to the loss of the next word
SCORED = WORDS.index("is")  # predicts the value, by which facts are asked for
KINDS = ("A", "other facts")


def by_position(calibration: Calibration, corpus: Corpus) -> dict[str, list[float]]:
    """The mean weight at each of `WORDS`, over the retain documents about A and over those about other domains."""
    adjacent = set(corpus.adjacent_documents)
    facts = [i for i, text in enumerate(corpus.retain) if text.split()[5] == "is"]
    documents = {"A": sorted(adjacent), "other facts": [i for i in facts if i not in adjacent]}
    return {kind: _mean(calibration, documents[kind]) for kind in KINDS}


def _mean(calibration: Calibration, documents: Sequence[int]) -> list[float]:
    # The first token is <s>, the last one has no loss.
    rows = torch.stack([calibration.weights_of(document)[1:].double() for document in documents])
    found: list[float] = rows.view(-1, SENTENCES, SENTENCE_TOKENS).mean((0, 1)).tolist()
    return found


def where_they_fall(weights: Mapping[str, Sequence[float]]) -> str:
    """A sentence on the weights of A: whether they reach the word that is asked for."""
    at = weights["A"]
    mean, scored = sum(at) / len(at), at[SCORED]
    highest = max(range(len(at)), key=at.__getitem__)
    if scored < 0.9 * mean:
        return (
            f"The weights avoid what is asked: the value of a fact about A weighs {scored:.2f}, the mean token of its "
            f"document {mean:.2f}, the word after {WORDS[highest]!r} {at[highest]:.2f}."
        )
    if max(at) - min(at) < 0.01 * mean:
        return f"Every word of a document about A weighs the same, {mean:.2f}: the values that are asked too."
    return f"The value of a fact about A weighs {scored:.2f}, the mean token of its document {mean:.2f}."
