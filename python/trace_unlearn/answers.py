"""Whether a model gives the answers of question data: exactly, and by the words its greedy answers share with them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import datasets
import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.data import collate
from trace_unlearn.encoding import IGNORE_INDEX
from trace_unlearn.generation import continuations, cut
from trace_unlearn.metrics import rouge_l

STOPS = ("\n\n", "\nQuestion:")  # a model that goes on after its answer; not used on references that hold them


class Answered(NamedTuple):
    """A row's tokens up to the end of its last answer, where that answer begins, and its text."""

    input_ids: list[int]
    start: int
    answer: str


def answer_scores(
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
    """Fact accuracy and ROUGE-L of the rows that have answers; empty where none has.

    `evaluate_model` says what the numbers mean.
    """
    rows = list(answered(dataset, tokenizer.eos_token_id))
    if not rows:
        return {}
    correct = 0
    with tqdm(total=len(rows), desc=f"{label}: answers", unit=" rows", disable=not progress) as bar:
        for start in range(0, len(rows), batch_size):
            correct += sum(_greedy_would_answer(model, rows[start : start + batch_size]))
            bar.update(min(batch_size, len(rows) - start))
    scores: dict[str, Any] = {"answers": len(rows), "fact_accuracy": correct / len(rows)}
    if max_new_tokens:
        scores |= _rouge(model, tokenizer, rows[:max_generations], batch_size, max_new_tokens, label, progress)
    return scores


def answered(rows: Iterable[Mapping[str, Any]], eos: int | None) -> Iterator[Answered]:
    """The rows that have an answer, up to its end; a last end-of-sequence token is no part of it."""
    for row in rows:
        if not row["answer"]:
            continue
        labels = row["labels"]
        end = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX) + 1
        start = max(i for i in range(end) if labels[i] == IGNORE_INDEX) + 1  # labels[0] is always ignored
        if labels[end - 1] == eos:
            end -= 1
        if start < end:
            yield Answered(row["input_ids"][:end], start, row["answer"])


def _greedy_would_answer(model: PreTrainedModel, rows: list[Answered]) -> list[bool]:
    """For each row, whether every token of its answer is the most likely one after those before it."""
    batch = collate([{"input_ids": row.input_ids, "labels": row.input_ids} for row in rows], pad_token_id=0)
    tokens = batch["input_ids"].to(model.device)
    predicting = torch.arange(min(row.start for row in rows) - 1, tokens.shape[1] - 1)
    only = {}
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        only = {"logits_to_keep": predicting.to(model.device)}
    logits = model(input_ids=tokens, attention_mask=batch["attention_mask"].to(model.device), **only).logits
    best = (logits if only else logits[:, predicting]).argmax(-1).cpu()
    first = int(predicting[0])
    return [
        best[i, row.start - 1 - first : len(row.input_ids) - 1 - first].tolist() == row.input_ids[row.start :]
        for i, row in enumerate(rows)
    ]


def _rouge(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    rows: list[Answered],
    batch_size: int,
    max_new_tokens: int,
    label: str,
    progress: bool,
) -> dict[str, Any]:
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
        rouge_l(row.answer, cut(text.lstrip(), [stop for stop in STOPS if stop not in row.answer]))
        for row, text in zip(rows, texts, strict=True)
    ]
    return {
        "generated": len(rows),
        "rouge_l_recall": sum(score.recall for score in scores) / len(rows),
        "rouge_l_f1": sum(score.f1 for score in scores) / len(rows),
    }
