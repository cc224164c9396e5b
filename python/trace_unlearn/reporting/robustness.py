"""The parts of a report about benchmarks and attacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trace_unlearn.evaluation.scores import NAMES, SCORES, conditions, is_main, score_title
from trace_unlearn.reporting import plots
from trace_unlearn.reporting.page import Page
from trace_unlearn.values import flatten, scalars, short_names

MEASURES = {
    "forget": ("exact_memorization", "extraction_strength", "fact_accuracy", "nll"),
    "retain": ("exact_memorization", "fact_accuracy", "nll"),
}


def describe_suites(page: Page, suites: Mapping[str, Mapping[str, Any]]) -> None:
    """The scores of each checkpoint on benchmarks, a column for each."""
    short = short_names(list(suites))
    columns = {short[model]: flatten(scalars(found)) for model, found in suites.items()}
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    if not names:
        return
    page.heading("Benchmarks")
    main = [name for name in SCORES if name in names]
    main += [name for name in names if is_main(name) and name not in main]
    for caption, shown in (
        ("Scores of each checkpoint", main),
        ("All other scores", [name for name in names if name not in main]),
    ):
        rows = [[score_title(name), *(values.get(name) for values in columns.values())] for name in shown]
        if rows:
            page.table(caption, ["score", *columns], rows, folded=shown is not main)


def describe_attacks(
    page: Page, models: Mapping[str, Mapping[str, Any]], checkpoints: Mapping[str, Mapping[str, Any]]
) -> None:
    """What came back of the forgotten under each attack.

    Args:
        page: where to write.
        models: the results of each attacked checkpoint, as `attack` writes them.
        checkpoints: what `evaluate` measured, by checkpoint; those that were not attacked are marked for comparison.
    """
    short = short_names(list(models))
    page.heading("Attacks")
    page.paragraph(
        "What someone gets back of the forgotten who has the weights: by training on a little of it, by quantising, by "
        "keeping tokens from the experts that they choose. Forgetting that holds leaves each row near the first one. "
        "Judge relearning against a checkpoint that never saw the data: that one learns from the shown rows too."
    )
    page.verdict([_strongest(short[model], found) for model, found in models.items()])
    others = {name: found for name, found in checkpoints.items() if name not in models}
    labels = list(dict.fromkeys(label for found in models.values() for label in conditions(found)))
    known = {
        short[model]: [
            conditions(found)[label]["forget"]["exact_memorization"] if label in conditions(found) else np.nan
            for label in labels
        ]
        for model, found in models.items()
    }
    marks = {
        name: found["forget"]["exact_memorization"]
        for name, found in zip(short_names(list(others)).values(), others.values(), strict=True)
        if found.get("forget", {}).get("exact_memorization") is not None
    }
    page.figure(
        "attacks",
        plots.dots(labels, known, x_label=f"forget: {NAMES['exact_memorization']}", marks=marks),
        alt=f"Dot plot of the {NAMES['exact_memorization']} of the forget set: "
        + "; ".join(
            f"{model}: "
            + ", ".join(
                f"{label} {value:.3f}" for label, value in zip(labels, values, strict=True) if not np.isnan(value)
            )
            for model, values in known.items()
        ),
        caption="The share of the forget set's tokens that are the most likely ones after those before them. "
        "After relearning on a part of the forget set, those of the rows that were not shown."
        + (" Dashed: checkpoints that were not attacked." if marks else ""),
    )
    _relearning(page, {short[model]: found["relearn"] for model, found in models.items() if "relearn" in found})
    for model, found in models.items():
        rows = [
            [label, *(measures[data].get(name) for data, names in MEASURES.items() for name in names)]
            for label, measures in conditions(found).items()
        ]
        columns = ["attack", *(f"{data}: {NAMES[name]}" for data, names in MEASURES.items() for name in names)]
        kept = [i for i in range(len(columns)) if i == 0 or any(row[i] is not None for row in rows)]
        caption = f"{short[model]} under attack"
        page.table(caption, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
    scores = {
        f"{short[model]}, {label}": flatten(scalars(measures["suites"]))
        for model, found in models.items()
        for label, measures in _with_suites(found).items()
    }
    if scores:
        names = list(dict.fromkeys(name for values in scores.values() for name in values))
        rows = [[score_title(name), *(values.get(name) for values in scores.values())] for name in names]
        page.table("Benchmarks under attack", ["score", *scores], rows, folded=True)


def _with_suites(found: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    rows = dict(conditions(found))
    if "relearn" in found:
        label = next(label for label in rows if label.startswith("relearned"))
        rows[label] = found["relearn"]  # its suites are measured once, at the end
    return {label: measures for label, measures in rows.items() if measures.get("suites")}


def _strongest(model: str, found: Mapping[str, Any]) -> str:
    shares = {label: measures["forget"]["exact_memorization"] for label, measures in conditions(found).items()}
    before = shares.pop("not attacked")
    if not shares:
        return f"{model}: recites {before:.1%} of the forget tokens; nothing was tried on it."
    start = dict.fromkeys(shares, before)
    if "relearn" in found:  # of the rows that were not shown
        start |= {
            label: found["relearn"]["curve"][0]["forget"]["exact_memorization"]
            for label in shares
            if label.startswith("relearned")
        }
    label = max(shares, key=lambda name: shares[name] - start[name])
    if shares[label] <= start[label]:
        return f"{model}: no attack brought anything back; it recites {before:.1%} of the forget tokens without one."
    back = f"it recites {shares[label]:.1%} of the forget tokens, {start[label]:.1%} before"
    return f'{model}: most comes back by "{label}": {back}.'


def _relearning(page: Page, curves: Mapping[str, Mapping[str, Any]]) -> None:
    if not curves:
        return
    panels: dict[str, dict[str, Any]] = {}
    for title, data in (("Shown rows", "shown"), ("Forget rows never shown", "forget"), ("Retain rows", "retain")):
        panels[title] = {
            model: [
                (
                    np.array([point["step"] for point in found["curve"]], dtype=np.float64),
                    np.array([point[data]["exact_memorization"] for point in found["curve"]], dtype=np.float64),
                )
            ]
            for model, found in curves.items()
        }
    ends = "; ".join(
        f"{model}: of the rows never shown {found['curve'][0]['forget']['exact_memorization']:.3f} before and "
        f"{found['curve'][-1]['forget']['exact_memorization']:.3f} after {found['curve'][-1]['step']} steps"
        for model, found in curves.items()
    )
    rows = next(iter(curves.values()))["rows"]
    page.figure(
        "relearning",
        plots.trade_off(panels, x_label="steps of relearning", y_label=NAMES["exact_memorization"], share=True),
        alt=f"Line plots of {NAMES['exact_memorization']} while relearning. {ends}.",
        caption=f"Relearning on {rows['shown']:,} rows. What rises in the middle was in the weights still, or follows "
        "from the shown rows.",
    )
