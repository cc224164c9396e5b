"""What a checkpoint knows of the forget and the retain set, and how its routing moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.answers import rouge_scores
from trace_unlearn.evaluation.likelihood import Routes, log_likelihood, routing_shift
from trace_unlearn.evaluation.suites import Suite


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    forget: datasets.Dataset,
    retain: datasets.Dataset,
    *,
    others: Mapping[str, datasets.Dataset] | None = None,
    base: PreTrainedModel | Mapping[str, Routes] | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    max_generations: int | None = 300,
    routing_tokens: int = 200_000,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Measures one model.

    Args:
        model: a causal language model; its training mode is restored afterwards.
        tokenizer: its tokenizer.
        forget: rows as `load_tokens` gives them.
        retain: likewise.
        others: further data sets by name.
        base: the model before unlearning, or what `routes_of` gave for it: adds the routing shift.
        batch_size: rows of one forward.
        max_new_tokens: the most tokens of a generated answer; 0 generates none.
        max_generations: answers to generate for each data set, the first ones; None means all.
        routing_tokens: how many tokens' experts are compared one by one.
        progress: whether to show bars.

    Returns:
        For "forget", "retain" and each of `others`:

        - nll: the mean over loss-bearing tokens of -log p(token | those before), in nats; tokens: their number; rows.
        - exact_memorization: the share of a row's tokens that are the most likely ones after those before them;
          extraction_strength: the share of its end that follows from the rest token by token; the means over rows,
          without the end-of-sequence token.
        - for data with answers: answers: their number; fact_accuracy: the share whose every token (the end-of-sequence
          token apart) is the most likely one after those before it, which is to say that greedy decoding gives the
          answer; generated: how many were generated; rouge_l_recall and rouge_l_f1 of greedy generations against the
          answer (rouge-score, no stemming), their mean.
        - with `base`: routing_shift: changed: the share of (token, slot) assignments to experts that the base model
          does not make for this token in this layer; total_variation: half the summed absolute difference of the
          experts' shares of assignments, the mean over layers; both for each layer too; tokens: how many were compared.
    """
    sets = named_sets(forget, retain, others)
    if isinstance(base, PreTrainedModel):
        base = routes_of(base, sets, batch_size=batch_size, routing_tokens=routing_tokens, progress=progress)
    measures: dict[str, dict[str, Any]] = {}
    with evaluating(model):
        for name, data in sets.items():
            keep = routing_tokens if base is not None else None
            found = log_likelihood(
                model,
                data,
                batch_size=batch_size,
                keep_routes=keep,
                recited=True,
                eos=tokenizer.eos_token_id,
                label=name,
                progress=progress,
            )
            measures[name] = {"nll": found.nll, "tokens": found.tokens, "rows": len(data)}
            for recital in ("exact_memorization", "extraction_strength"):
                measures[name][recital] = getattr(found, recital)
            if found.answers:
                measures[name] |= {"answers": found.answers, "fact_accuracy": found.fact_accuracy}
            if max_new_tokens:
                measures[name] |= rouge_scores(
                    model,
                    tokenizer,
                    data,
                    batch_size=batch_size,
                    max_new_tokens=max_new_tokens,
                    max_generations=max_generations,
                    label=name,
                    progress=progress,
                )
            if base is not None and found.routes is not None:
                measures[name]["routing_shift"] = routing_shift(base[name], found.routes)
    return measures


def routes_of(
    model: PreTrainedModel,
    sets: Mapping[str, datasets.Dataset],
    *,
    batch_size: int = 8,
    routing_tokens: int = 200_000,
    progress: bool = True,
) -> dict[str, Routes]:
    """The experts that `model` chooses on each data set, to compare other models with (`base` of `evaluate_model`)."""
    routes: dict[str, Routes] = {}
    with evaluating(model):
        for name, data in sets.items():
            found = log_likelihood(
                model, data, batch_size=batch_size, keep_routes=routing_tokens, label=f"base, {name}", progress=progress
            )
            assert found.routes is not None
            routes[name] = found.routes
    return routes


def measure_suites(
    suites: Mapping[str, Suite],
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    reference: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """The scores of one model by suite; `reference`: those of a model that never saw the forget data."""
    scores: dict[str, dict[str, Any]] = {}
    with evaluating(model):
        for name, suite in suites.items():
            found = suite.measure(model, tokenizer, batch_size=batch_size, progress=progress)
            scores[name] = found | suite.compare(found, None if reference is None else reference[name])
    return scores


def named_sets(
    forget: datasets.Dataset, retain: datasets.Dataset, others: Mapping[str, datasets.Dataset] | None
) -> dict[str, datasets.Dataset]:
    check_names(others or {})
    return {"forget": forget, "retain": retain, **(others or {})}


def check_names(others: Mapping[str, Any]) -> None:
    if reserved := {"forget", "retain"} & set(others):
        raise UserError(f"others: got the name {reserved.pop()!r}, which is taken; use another")


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients; the model's mode is restored."""
    training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
