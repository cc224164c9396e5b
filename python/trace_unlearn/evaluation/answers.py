"""How near a model's greedy answers to question data come to the true ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import datasets
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.evaluation.generation import continuations, cut
from trace_unlearn.evaluation.metrics import rouge_l
from trace_unlearn.sources.encoding import IGNORE_INDEX, last_run

STOPS = ("\n\n", "\nQuestion:")  # a model that goes on after its answer; not used on references that hold them


class Answered(NamedTuple):
    """A row's tokens up to the end of its last answer, where that answer begins, and its text."""

    input_ids: list[int]
    start: int
    answer: str


def rouge_scores(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    dataset: datasets.Dataset,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    max_generations: int | None = None,
    label: str = "",
    progress: bool = True,
) -> dict[str, Any]:
    """ROUGE-L of greedy answers to the rows that have answers; empty where none has.

    `evaluate_model` says what the numbers mean.
    """
    rows = list(islice(answered(dataset, tokenizer.eos_token_id), max_generations))
    if not rows:
        return {}
    texts = continuations(
        model,
        tokenizer,
        [row.input_ids[: row.start] for row in rows],
        max_new_tokens,
        batch_size=batch_size,
        label=f"{label}: generation",
        progress=progress,
    )
    scores = [
        rouge_l(row.answer, cut(text, [stop for stop in STOPS if stop not in row.answer]))
        for row, text in zip(rows, texts, strict=True)
    ]
    return {
        "generated": len(rows),
        "rouge_l_recall": sum(score.recall for score in scores) / len(rows),
        "rouge_l_f1": sum(score.f1 for score in scores) / len(rows),
    }


def answered(rows: Iterable[Mapping[str, Any]], eos: int | None) -> Iterator[Answered]:
    """The rows that have an answer, up to its end; a last end-of-sequence token is no part of it."""
    for row in rows:
        if not row["answer"]:
            continue
        labels = row["labels"]
        start, end = last_run([label != IGNORE_INDEX for label in labels])
        if labels[end - 1] == eos:
            end -= 1
        if start < end:
            yield Answered(row["input_ids"][:end], start, row["answer"])
