"""The README.md of an unlearned model, with what was measured of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_unlearn import files
from trace_unlearn.evaluation.scores import NAMES, conditions, is_main, score_title
from trace_unlearn.training.card import UNMEASURED, short_name, training_card
from trace_unlearn.values import flatten, markdown_table, scalars

MEASURES = ("fact_accuracy", "exact_memorization", "extraction_strength", "rouge_l_f1", "nll")


def model_card(run_facts: Mapping[str, Any]) -> str:
    """The card as Markdown with Hugging Face's front matter. It names data by file name and digest, and shows none.

    Args:
        run_facts: see `training_card`; and where there are any `evaluation` and `attacks`, what evaluate and attack
            wrote.

    >>> "None is recorded here" in model_card({"options": {"model": "owner/moe", "objective": "npo"}})
    True
    """
    facts: dict[str, Any] = json.loads(files.to_json(run_facts))
    base = str((facts.get("options") or {}).get("model") or "unknown")
    measured = (_evaluation(facts.get("evaluation"), base), _attacks(facts.get("attacks")))
    verdicts = (facts.get("evaluation") or {}).get("verdicts") or {}
    sentence = list(verdicts.values())[-1]["sentence"] if verdicts else ""
    return training_card(facts, "\n".join(part for part in measured if part), sentence)


def write_evaluated(model: Path, run: Path) -> None:
    """Writes the card of the checkpoint folder `model` anew, with what evaluate and attack wrote into `run`."""
    facts = files.read_json(model / "trace.json")
    for name, file in (("evaluation", "metrics.json"), ("attacks", "attacks.json")):
        if (run / file).is_file():
            facts[name] = files.read_json(run / file)
    card, path = model_card(facts), model / "README.md"
    if not path.is_file() or path.read_text(encoding="utf-8") != card:
        files.write_text(path, card)


def _evaluation(metrics: Mapping[str, Any] | None, base: str) -> str:
    if not metrics:
        return UNMEASURED
    checkpoints = metrics["checkpoints"]
    *before, _ = checkpoints
    columns = ["base" if name == base else short_name(name) for name in before] + ["this model"]
    rows: list[list[Any]] = [
        [f"{data}: {NAMES[measure]}", *(found.get(data, {}).get(measure) for found in checkpoints.values())]
        for data in dict.fromkeys(data for found in checkpoints.values() for data in found)
        for measure in MEASURES
    ]
    scores = [flatten(scalars(metrics.get("suites", {}).get(name, {}))) for name in checkpoints]
    main = [name for name in dict.fromkeys(name for found in scores for name in found) if is_main(name)]
    rows += [[score_title(name), *(found.get(name) for found in scores)] for name in main]
    kept = [row for row in rows if any(cell is not None for cell in row[1:])]
    return "## Evaluation\n\n" + markdown_table(["", *columns], kept)


def _attacks(attacks: Mapping[str, Any] | None) -> str:
    if not attacks or not attacks.get("models"):
        return ""
    found = next(iter(attacks["models"].values()))
    shown = (("forget", "exact_memorization"), ("forget", "nll"), ("retain", "exact_memorization"))
    columns = ["", *(f"{data}: {NAMES[measure]}" for data, measure in shown)]
    rows = []
    for label, measures in conditions(found).items():
        rows.append([label, *(measures[data][measure] for data, measure in shown)])
    return "## Under attack\n\n" + markdown_table(columns, rows)
