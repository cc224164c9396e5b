"""How much of a reference text another one has."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from rouge_score.rouge_scorer import RougeScorer


class RougeL(NamedTuple):
    """Of the longest common subsequence of words: its share of the reference, and the F1 with its share of the text."""

    recall: float
    f1: float


def rouge_l(reference: str, text: str) -> RougeL:
    """ROUGE-L without stemming, as MUSE has it (Lin 2004); words are those of `Words`. 0 where either has no word.

    >>> rouge_l("the cat sat on the mat", "The cat, it sat.")  # 3 words in order, of 6 and of 4
    RougeL(recall=0.5, f1=0.6)
    """
    score = _scorer().score(reference, text)["rougeL"]
    return RougeL(score.recall, score.fmeasure)


@functools.cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=Words())


class Words:
    """Splits text for ROUGE: as rouge-score does on ASCII; other letters count too, and each CJK sign is a word.

    >>> Words().tokenize("The Café's 2nd, 東京")
    ['the', 'café', 's', '2nd', '東', '京']
    """

    pattern = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")

    def tokenize(self, text: str) -> list[str]:
        return self.pattern.findall(text.lower())
