"""The verb `evaluate`: what checkpoints know of the forget and the retain set, and how their routing moved."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import trace_kernels
from trace_unlearn import files
from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.answers import STOPS, rouge_scores
from trace_unlearn.evaluation.likelihood import Routes, log_likelihood, routing_shift
from trace_unlearn.evaluation.suites import Suite, open_suites
from trace_unlearn.reporting.page import flatten, scalars, show, table_of
from trace_unlearn.sources.data import check_disjoint, fingerprint, load_tokens
from trace_unlearn.sources.model import check_inputs, check_placement, load_model, load_tokenizer


@dataclasses.dataclass
class EvaluateOptions:
    """Measure checkpoints on forget and retain data, and write metrics.json.

    Attributes:
        models: the checkpoint to measure, or several as [A, B]: folders or hub names.
        forget: the data to forget: a .jsonl, .json, .txt or .parquet file, or a hub name owner/name[:config].
        retain: the data to keep, likewise.
        output: the folder to write metrics.json into.
        others: further data sets by name, such as held-out facts: {"neighbours": "neighbours.jsonl"}.
        suites: benchmarks to measure too, each with its options: muse, tofu and lm_eval (WMDP, MMLU), as
            {"muse": {"data": "muse-bench/MUSE-Books"}}. See docs/evaluation.md.
        retrained: a checkpoint that was trained without the forget data: what PrivLeak and forget quality compare with.
        base: the model before unlearning; with it the routing shift is measured.
        max_length: the most tokens of a row.
        split: of hub data.
        limit: use only the first rows of each data set; none uses all.
        forget_limit: of the forget data only that many, as in `profile`.
        retain_limit: of the retain data only that many, as in `profile`.
        batch_size: rows of one forward.
        max_new_tokens: the most tokens of a generated answer; 0 generates none.
        max_generations: answers to generate for each data set; none means all.
        routing_tokens: tokens of each data set whose experts are compared one by one with the base model's.
        dtype: auto (as the checkpoint), float32, bfloat16 or float16.
        device: where to run, such as cpu or cuda:1; none takes the GPU when there is one.
        device_map: accelerate's placement over several devices, such as auto, in place of device.
    """

    models: list[str] | str
    forget: str
    retain: str
    output: str
    others: dict[str, str] = dataclasses.field(default_factory=dict)
    suites: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    retrained: str | None = None
    base: str | None = None
    max_length: int = 512
    split: str = "train"
    limit: int | None = None
    forget_limit: int | None = None
    retain_limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 64
    max_generations: int | None = 300
    routing_tokens: int = 200_000
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None


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
    sets = _named(forget, retain, others)
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


def check(options: EvaluateOptions) -> list[str]:
    """The checkpoints to measure; UserError for what can be told from the options alone."""
    models = [options.models] if isinstance(options.models, str) else options.models
    if not models:
        raise UserError("models: got none; name at least one checkpoint")
    if len(set(models)) < len(models):
        raise UserError(f"models: got {', '.join(models)}; each may be named once")
    least = {"batch_size": 1, "max_new_tokens": 0, "max_generations": 1, "routing_tokens": 1}
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise UserError(f"{name}: got {value}; an integer of at least {bound} is allowed")
    if options.device_map is None:
        check_placement(options.dtype, options.device)
    open_suites(options.suites)
    _check_names(options.others)
    if options.retrained is not None and not options.suites:
        raise UserError("retrained: got one, but none of suites, which alone compare with it")
    return models


def main(options: EvaluateOptions) -> None:
    """Measures every checkpoint of `options` and writes `output`/metrics.json, whole or not at all."""
    target = Path(options.output) / "metrics.json"
    files.refuse_existing(target)
    models = check(options)
    configs = {name: check_inputs(name, moe=options.base is not None) for name in models}
    if options.retrained is not None:
        configs.setdefault(options.retrained, check_inputs(options.retrained, moe=False))
    tokenizer = load_tokenizer(models[0], configs[models[0]])
    for name in list(configs)[1:]:
        if load_tokenizer(name, configs[name]).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"{name}: its tokenizer is not that of {models[0]}: NLLs cannot be compared")
    if options.base is not None and options.base not in models:
        try:
            load_tokenizer(models[0], check_inputs(options.base))
        except UserError as error:
            raise UserError(f"base: got {options.base}, which does not go with {models[0]}: {error}") from error
    print(f"evaluate: {', '.join(models)} on {options.forget} and {options.retain} -> {target}")

    def read(source: str, limit: int | None = None) -> datasets.Dataset:
        least = min((bound for bound in (limit, options.limit) if bound is not None), default=None)
        return load_tokens(source, tokenizer, max_length=options.max_length, split=options.split, limit=least)

    def load(name: str) -> PreTrainedModel:
        return load_model(name, dtype=options.dtype, device=options.device, device_map=options.device_map)

    forget, retain = read(options.forget, options.forget_limit), read(options.retain, options.retain_limit)
    others = {name: read(source) for name, source in options.others.items()}
    check_disjoint(forget, retain)
    sets = _named(forget, retain, others)
    suites = open_suites(options.suites)
    for suite in suites.values():
        suite.read(tokenizer)
    base = None
    if options.base is not None:
        print(f"evaluate: routing of {options.base}")
        base = routes_of(load(options.base), sets, batch_size=options.batch_size, routing_tokens=options.routing_tokens)
    reference = None
    if options.retrained is not None:
        print(f"evaluate: measuring {options.retrained}, the reference")
        reference = measure_suites(suites, load(options.retrained), tokenizer, batch_size=options.batch_size)
    checkpoints: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, Any]] = {}
    for name in models:
        print(f"evaluate: measuring {name}")
        model = load(name)
        checkpoints[name] = evaluate_model(
            model,
            tokenizer,
            forget,
            retain,
            others=others,
            base=base,
            max_new_tokens=options.max_new_tokens,
            max_generations=options.max_generations,
            batch_size=options.batch_size,
            routing_tokens=options.routing_tokens,
        )
        scores[name] = measure_suites(suites, model, tokenizer, reference, batch_size=options.batch_size)
        del model  # before the next one is loaded
    choices = {
        "options": options,
        "nll": "mean over loss-bearing tokens, nats, float32 log-probabilities",
        "fact_accuracy": "teacher-forced argmax of every answer token, without the end-of-sequence token",
        "rouge": {"metric": "rougeL", "stemmer": False, "decoding": "greedy", "cut_at": STOPS},
        "fingerprints": {name: fingerprint(data) for name, data in sets.items()},
        "versions": {
            "trace_kernels": trace_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    files.write_json(target, {"checkpoints": checkpoints, "suites": scores, "choices": choices})
    print(summary(checkpoints))
    if suites:
        print(suites_summary(scores))
    print(f"evaluate: wrote {target}")


def summary(checkpoints: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The main measures as a table for people, one line for each checkpoint and data set.

    >>> print(summary({"model": {"forget": {"nll": 5.25, "tokens": 80, "rows": 4, "fact_accuracy": 0.0}}}))
    checkpoint  data    NLL    facts  ROUGE-L  routing changed
    model       forget  5.250  0.000  -        -
    """
    rows = [("checkpoint", "data", "NLL", "facts", "ROUGE-L", "routing changed")]
    for model, measures in checkpoints.items():
        for name, found in measures.items():
            values = [found.get(key) for key in ("nll", "fact_accuracy", "rouge_l_f1")]
            values.append(found.get("routing_shift", {}).get("changed"))
            shown = ["-" if value is None else f"{value:.3f}" for value in values]
            rows.append((model, name, shown[0], shown[1], shown[2], shown[3]))
    return table_of(rows)


def suites_summary(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Every single score as a table for people, a column for each checkpoint.

    >>> print(suites_summary({"before": {"muse": {"verbmem": 99.5}}, "after": {"muse": {"verbmem": 12.0}}}))
    score         before  after
    muse.verbmem  99.500  12.000
    """
    columns = {model: flatten(scalars(found)) for model, found in scores.items()}
    names = dict.fromkeys(name for found in columns.values() for name in found)
    rows = [("score", *columns)]
    rows += [(name, *(show(found.get(name)) for found in columns.values())) for name in names]
    return table_of(rows)


def _named(
    forget: datasets.Dataset, retain: datasets.Dataset, others: Mapping[str, datasets.Dataset] | None
) -> dict[str, datasets.Dataset]:
    _check_names(others or {})
    return {"forget": forget, "retain": retain, **(others or {})}


def _check_names(others: Mapping[str, Any]) -> None:
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
