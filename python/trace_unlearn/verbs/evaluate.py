"""The verb `evaluate`: what checkpoints know of the forget and the retain set, and how their routing moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedModel

from trace_unlearn import files
from trace_unlearn.checks import check_integers
from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.answers import STOPS
from trace_unlearn.evaluation.measure import check_names, evaluate_model, measure_suites, named_sets, routes_of
from trace_unlearn.evaluation.scores import NAMES
from trace_unlearn.evaluation.suites import open_suites
from trace_unlearn.evaluation.verdict import verdicts
from trace_unlearn.sources.data import asked, check_disjoint, check_positions, check_template, fingerprint, load_tokens
from trace_unlearn.sources.model import check_inputs, check_placement, load_model, load_tokenizer
from trace_unlearn.values import flatten, scalars, show, table_of
from trace_unlearn.versions import versions

MAKES = "metrics.json"
PLACES = ("models", "forget", "retain", "output", "base")


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
        question_template: the prompt of question/answer records, as in `profile`.
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
    question_template: str | None = None
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


def sources(options: EvaluateOptions) -> dict[str, str]:
    """What it reads besides its places, by option: data, checkpoints, benchmarks."""
    others = {f"others.{name}": source for name, source in options.others.items()}
    return others | ({} if options.retrained is None else {"retrained": options.retrained}) | suite_sources(options)


def suite_sources(options: Any) -> dict[str, str]:
    """Of benchmarks."""
    opened = open_suites(options.suites).items()
    return {f"suites.{name}.{part}": source for name, suite in opened for part, source in suite.sources().items()}


def check(options: EvaluateOptions) -> list[str]:
    """The checkpoints to measure; UserError for what can be told from the options alone."""
    models = [options.models] if isinstance(options.models, str) else options.models
    if not models:
        raise UserError("models: got none; name at least one checkpoint")
    if len(set(models)) < len(models):
        raise UserError(f"models: got {', '.join(models)}; each may be named once")
    check_integers(options, batch_size=1, max_new_tokens=0, max_generations=1, routing_tokens=1)
    check_integers(options, max_length=2, forget_limit=1, retain_limit=1)
    if options.device_map is None:
        check_placement(options.dtype, options.device)
    check_template(options.question_template)
    open_suites(options.suites)
    check_names(options.others)
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
        return load_tokens(
            source,
            tokenizer,
            max_length=options.max_length,
            split=options.split,
            limit=least,
            question_template=options.question_template,
        )

    def load(name: str) -> PreTrainedModel:
        return load_model(name, dtype=options.dtype, device=options.device, device_map=options.device_map)

    forget, retain = read(options.forget, options.forget_limit), read(options.retain, options.retain_limit)
    others = {name: read(source) for name, source in options.others.items()}
    check_disjoint(forget, retain)
    sets = named_sets(forget, retain, others)
    for name in models:
        check_positions(configs[name], **sets)
    if (prompt := asked(*sets.values())) is not None:
        print(f"evaluate: questions are asked as {prompt!r}")
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
        "asked": prompt,
        "nll": "mean over loss-bearing tokens, nats, float32 log-probabilities",
        "fact_accuracy": "teacher-forced argmax of every answer token, without the end-of-sequence token",
        "rouge": {"metric": "rougeL", "stemmer": False, "decoding": "greedy", "cut_at": STOPS},
        "fingerprints": {name: fingerprint(data) for name, data in sets.items()},
        "versions": versions(),
    }
    judged = verdicts(checkpoints, options.base)
    files.write_json(target, {"verdicts": judged, "checkpoints": checkpoints, "suites": scores, "choices": choices})
    for name, found in judged.items():
        print(f"{name}: {found.sentence}")
    print(summary(checkpoints))
    if suites:
        print(suites_summary(scores))
    print(f"evaluate: wrote {target}")


def summary(checkpoints: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The main measures as a table for people, one line for each checkpoint and data set.

    >>> print(summary({"model": {"forget": {"nll": 5.25, "tokens": 80, "rows": 4, "fact_accuracy": 0.0}}}))
    checkpoint  data    NLL    fact accuracy  exact memorization  ROUGE-L F1  routing shift
    model       forget  5.250  0.000          –                   –           –
    """
    shown = ("nll", "fact_accuracy", "exact_memorization", "rouge_l_f1", "routing_shift.changed")
    rows: list[tuple[object, ...]] = [("checkpoint", "data", *(NAMES[key] for key in shown))]
    for model, measures in checkpoints.items():
        for name, found in measures.items():
            flat = flatten(scalars(found))
            rows.append((model, name, *(flat.get(key) for key in shown)))
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
