"""The record as Markdown tables: what the numbers support and what they do not. A pure function of the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ALPHA = 0.05
TITLES = {
    "primary": "Primary family: A",
    "secondary": "Secondary family: N",
    "confirmations": "Confirmations: weights at a retain weight of 8 against uniform weights at more, on manuals",
}
NAMES = {"A": "what the retain set holds a little of", "N": "what it holds nothing of", "R": "other domains"}


def markdown(results: Mapping[str, Any]) -> str:
    parts = [_head(results)]
    for family, title in TITLES.items():
        rows = [row for c in results["contrasts"] for row in _tested(c, family)]
        if rows:
            columns = ["arm", "against", "n", "measure", "difference [95 %]", "p", "corrected", "finding", "smallest"]
            parts.append(f"### {title}\n\n{_table(columns, rows)}")
    columns = ["arm", "against", "n", "A", "N", "R", "A NLL", "N NLL", "R NLL", "steps"]
    rows = [_described(c) for c in results["contrasts"]]
    parts.append(f"### Every comparison, with its price on R\n\n{_table(columns, rows)}")
    for name, frontier in results["frontier"].items():
        if frontier["points"]:
            parts.append(f"### Frontier: {name}\n\n{_frontier(frontier)}")
    parts.append(f"### Calibrations\n\n{_calibrations(results)}")
    return "\n\n".join(parts) + "\n"


def _head(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    said = (
        f"{results['arms']} of {results['planned']} planned arms finished, at commit {machine['commit']} on "
        f"{machine['device']}, torch {machine['torch']}. Differences are paired over models, at equal forgetting; "
        "accuracies are shares, NLL is in nats (less is better). p: exact sign-flip test; corrected: Holm over the "
        "family; smallest: the difference that would be seen in 8 of 10 such studies."
    )
    for key, words in (("unknowing", "Models left out, since they did not know their facts"), ("diverged", "Diverged")):
        if results[key]:
            said += f" {words}: {', '.join(map(str, results[key]))}."
    short = [f"{c['arm']} against {c['against']}: {c['too_short']}" for c in results["contrasts"] if c["too_short"]]
    return said + (f" Models that forgot too little to be compared: {'; '.join(short)}." if short else "")


def _tested(contrast: Mapping[str, Any], family: str) -> list[list[str]]:
    rows = []
    for measure in contrast["families"].get(family, []):
        found = contrast["differences"][measure]
        if found["n"] > 1:
            finding = "yes" if found["adjusted"] < ALPHA else "no"
            rows.append(
                [
                    contrast["arm"],
                    contrast["against"],
                    str(found["n"]),
                    measure.replace("_", " ").replace("nll", "NLL"),
                    interval(found),
                    _p(found["p"]),
                    _p(found["adjusted"]),
                    finding,
                    f"{found['smallest']:.3f}",
                ]
            )
    return rows


def _described(contrast: Mapping[str, Any]) -> list[str]:
    found = contrast["differences"]
    measures = [f"{group}_{measure}" for measure in ("accuracy", "nll") for group in NAMES]
    return [
        contrast["arm"],
        contrast["against"],
        str(found["A_accuracy"]["n"]),
        *(interval(found[measure]) for measure in measures),
        interval(found["step"], 0),
    ]


def _frontier(frontier: Mapping[str, Any]) -> str:
    columns = ["weights", "retain weight", "A", "N", "R", "A NLL", "N NLL", "R NLL", "steps"]
    measures = [f"{group}_{measure}" for measure in ("accuracy", "nll") for group in NAMES]
    rows = [
        [
            point["line"],
            f"{point['retain_weight']:g}",
            *(number(point[measure]) for measure in measures),
            number(point["steps"], 0),
        ]
        for point in frontier["points"]
    ]
    return f"Models {', '.join(map(str, frontier['seeds']))}.\n\n{_table(columns, rows)}"


def _calibrations(results: Mapping[str, Any]) -> str:
    columns = ["arm", "n", "experts", "mismatch", "ESS", "largest weight", "weight of A"]
    rows = [
        [
            c["arm"],
            str(c["n"]),
            number(c["experts"], 1),
            f"{number(c['error_before'])} → {number(c['error'])}",
            number(c["ess"], 2),
            number(c["largest_weight"], 1),
            number(c["adjacent_weight"], 2),
        ]
        for c in results["calibrations"]
    ]
    return _table(columns, rows)


def interval(found: Mapping[str, Any], digits: int = 3) -> str:
    """The mean with its interval, in bold where that leaves out 0."""
    if found["mean"] is None:
        return "–"
    text = f"{found['mean']:+.{digits}f}"
    if found["n"] < 2:
        return text
    low, high = found["interval"]
    text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _p(value: float) -> str:
    return f"{value:.4f}".lstrip("0") if value < 0.01 else f"{value:.2f}".removeprefix("0")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
