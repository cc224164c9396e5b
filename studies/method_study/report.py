"""The results record as Markdown tables and as words: what the numbers support and what they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from studies.method_study.statistics import Difference
from trace_unlearn.errors import UserError

ALPHA = 0.05
BEGIN_MARK, END_MARK = "<!-- results -->", "<!-- end of results -->"
GROUPS = {"A_accuracy": "A", "N_accuracy": "N", "R_accuracy": "R"}
WHO = {
    "A_accuracy": "on what the retain set holds a little of (A)",
    "N_accuracy": "on what it holds nothing of (N)",
}
Row = Sequence[str]
_MARKS = ("", "†", "‡", "§", "¶")  # by machine


def markdown(results: Mapping[str, Any]) -> str:
    """All tables and sentences; a pure function of the record."""
    tables = {
        "TRACE against uniform weights, at equal forgetting": _against(results, "uniform", "tuned", steps=True),
        "TRACE against its control (the same weights, shuffled), at equal forgetting": _against(
            results, "control", steps=True
        ),
        "The control against uniform weights, at equal forgetting": _against(results, "shuffled", steps=True),
        "Other settings against the default ones, at equal forgetting": _against(results, "default", steps=True),
        "Retain weight and learning rate of uniform weights, at equal forgetting": _against(
            results, "weight", "pace", steps=True
        ),
        "TRACE against uniform weights at the same step, and at the same damage to R": _against(
            results, "uniform, equal steps", "uniform, equal damage", forgotten=True
        ),
        "The same seeds on two machines, at equal forgetting": _repetitions(results),
        "What each arm kept, and its calibration": _levels(results),
    }
    told = "\n".join(f"- {sentence}" for sentence in sentences(results))
    parts = [_head(results), f"### What the numbers say\n\n{told}"]
    return "\n\n".join([*parts, *(f"### {title}\n\n{table}" for title, table in tables.items() if table)]) + "\n"


def publish(page: str, tables: str) -> str:
    """`page` with `tables` between its two marks, in place of what was there."""
    if BEGIN_MARK not in page or END_MARK not in page.split(BEGIN_MARK, 1)[1]:
        raise UserError(f"--publish: the page lacks the lines {BEGIN_MARK} and {END_MARK}")
    before, rest = page.split(BEGIN_MARK, 1)
    return f"{before}{BEGIN_MARK}\n\n{tables}\n{END_MARK}{rest.split(END_MARK, 1)[1]}"


def _head(results: Mapping[str, Any]) -> str:
    told = [f"commit {m['commit']} on {m['device']}, torch {m['torch']}" for m in results["machines"]]
    said = f"Tables made at {told[0]}."
    if len(told) > 1:
        marks = "; ".join(f"{_MARKS[i]} {machine}" for i, machine in enumerate(told[1:], 1))
        said = f"Tables made at {told[0]}, but rows with a mark, which had more models there: {marks}."
    return (
        f"{results['models']} models asked for, n finished in each row. Differences are paired over models: mean ± "
        "standard error (p of the exact sign-flip test). Accuracies are shares. **bold**: p < 0.05 after Holm's "
        f"correction over A and N of the whole table; *italic*: p < 0.05 before it only. {said}"
    )


def _cell(difference: Mapping[str, Any], adjusted: float | None, digits: int = 3) -> str:
    if difference["mean"] is None:
        return "–"
    text = f"{difference['mean']:+.{digits}f}"
    error = difference["standard_error"]
    if error is None:
        return text
    text += f" ± {error:.{digits}f}"
    if adjusted is None:
        return text
    text += f" ({_p(difference['p'])})"
    mark = "**" if adjusted < ALPHA else "*" if difference["p"] < ALPHA else ""
    return f"{mark}{text}{mark}"


def _p(value: float) -> str:
    return f"{value:.4f}".lstrip("0") if value < 0.01 else f"{value:.2f}".lstrip("0")


def _against(results: Mapping[str, Any], *families: str, steps: bool = False, forgotten: bool = False) -> str:
    comparisons = [c for family in families for c in results["comparisons"] if c["family"] == family]
    held = {"steps": "same step", "damage": "same damage"}
    columns = ["arm", "against", "n", "A accuracy", "N accuracy", "R accuracy"]
    columns += ["steps"] * steps + ["forget NLL"] * forgotten
    rows = []
    for c in comparisons:
        found, adjusted = c["differences"], c["adjusted"]
        row = [
            c["arm"] + _MARKS[c["machine"]],
            c["against"] + (f" ({held[c['view']]})" if c["view"] in held else ""),
            str(_n(found["A_accuracy"])),
            *(_cell(found[m], adjusted.get(m)) for m in ("A_accuracy", "N_accuracy")),
            _cell(found["R_accuracy"], None) if "R_accuracy" in found else "–",
        ]
        if steps:
            row.append(_cell(found["steps"], None, 1) if "steps" in found else "–")
        if forgotten:
            row.append(_cell(found["F_nll"], None, 2))
        rows.append(row)
    return _table(columns, rows)


def _repetitions(results: Mapping[str, Any]) -> str:
    """Means by machine, and of each seed's mean over the machines with its test: seeds are what is independent."""
    rows = []
    for entry in results.get("repeated", []):
        row = [entry["arm"], entry["against"]]
        for measure in WHO:
            runs = [run[measure] for run in entry["runs"].values()]
            row.append(" and ".join(f"{sum(values) / len(values):+.3f}" for values in runs))
            both = Difference.of([sum(values) / len(values) for values in zip(*runs, strict=True)])
            row.append(_cell(asdict(both), 1.0))
        rows.append(row)
    return _table(["arm", "against", "A", "A, both", "N", "N, both"], rows)


def _levels(results: Mapping[str, Any]) -> str:
    columns = ["arm", "n", "A", "N", "R", "steps", "experts", "error", "ESS", "largest weight", "weight of A"]
    rows = []
    for level in results["levels"]:
        found = level.get("calibration", {})
        error = f"{found['error_before']:.3f} → {found['error']:.3f}" if found else "–"
        rows.append(
            [
                level["label"] + _MARKS[level["machine"]],
                f"{level['n']}" if level["compared"] == level["n"] else f"{level['compared']} of {level['n']}",
                *(_number(level[m], 3) for m in GROUPS),
                _number(level["steps"], 0),
                _number(found.get("experts"), 1),
                error,
                _number(found.get("ess"), 2),
                _number(found.get("largest_weight"), 1),
                _number(found.get("adjacent_weight"), 2),
            ]
        )
    return _table(columns, rows)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(columns: Row, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _n(difference: Mapping[str, Any]) -> int:
    return sum(value is not None for value in difference["values"])


def sentences(results: Mapping[str, Any]) -> list[str]:
    """In words, from the numbers alone."""
    said = []
    found = {(c["family"], c["arm"], c["against"]): c for c in results["comparisons"]}
    for family, arm, against in (
        ("uniform", "TRACE", "uniform"),
        ("control", "TRACE", "shuffled"),
        ("shuffled", "shuffled", "uniform"),
        ("uniform", "TRACE, retain weight 32", "uniform, retain weight 32"),
        ("control", "TRACE, retain weight 32", "shuffled, retain weight 32"),
        ("weight", "uniform, retain weight 32", "uniform"),
        ("tuned", "TRACE, retain weight tuned", "uniform, retain weight tuned"),
        ("pace", "uniform, learning rate x 0.5", "uniform"),
        ("pace", "TRACE", "uniform, learning rate x 0.5"),
        ("uniform", "TRACE, NPO", "uniform, NPO"),
        ("uniform", "TRACE, manuals", "uniform, manuals"),
        ("control", "TRACE, manuals", "shuffled, manuals"),
        ("uniform", "TRACE, manuals, retain weight 32", "uniform, manuals, retain weight 32"),
        ("control", "TRACE, manuals, retain weight 32", "shuffled, manuals, retain weight 32"),
        ("weight", "uniform, manuals, retain weight 32", "uniform, manuals"),
        ("tuned", "TRACE, manuals, retain weight tuned", "uniform, manuals, retain weight tuned"),
        ("pace", "uniform, manuals, learning rate x 0.5", "uniform, manuals"),
        ("pace", "TRACE, manuals", "uniform, manuals, learning rate x 0.5"),
    ):
        if (family, arm, against) in found:
            said += [_sentence(found[family, arm, against], measure) for measure in WHO]
    said += _about_settings(results)
    slower = found.get(("uniform", "TRACE", "uniform"))
    if slower:
        steps = slower["differences"]["steps"]
        said.append(f"To forget as much, TRACE takes {_cell(steps, None, 1)} steps more than uniform weights.")
    said += [f"Diverged: {name}." for name in results["diverged"]]
    return said


def _sentence(comparison: Mapping[str, Any], measure: str) -> str:
    difference = comparison["differences"][measure]
    n = _n(difference)
    head = f"{comparison['arm']} against {comparison['against']}, {WHO[measure]}, n = {n}:"
    text = f"{head} {_cell(difference, None)}"
    if n < 2:
        return f"{text}: one model cannot tell a gain from noise."
    adjusted = comparison["adjusted"][measure]
    text += f", p {_p(difference['p'])}, corrected {_p(adjusted)}"
    better = "kept more" if difference["mean"] > 0 else "kept less"
    if adjusted < ALPHA:
        return f"{text}: {better}, also after the correction for the number of comparisons."
    if difference["p"] < ALPHA:
        return f"{text}: {better}, but not after the correction: a hint, no finding."
    if 2 / 2**n > ALPHA:
        return f"{text}: {n} models are too few for any finding by this test."
    return f"{text}: not told apart from noise."


def _about_settings(results: Mapping[str, Any]) -> list[str]:
    defaults = [c for c in results["comparisons"] if c["family"] == "default"]
    if not defaults:
        return []
    cells = [(c["arm"], m, c["differences"][m], c["adjusted"][m]) for c in defaults for m in WHO]
    cells = [cell for cell in cells if _n(cell[2])]
    differ = [(arm, m, d) for arm, m, d, adjusted in cells if adjusted < ALPHA]
    hints = [(arm, m, d) for arm, m, d, adjusted in cells if d["p"] < ALPHA <= adjusted]
    head = f"Of {len(cells)} comparisons of a setting with the default one"
    told = [f"{arm} {'better' if d['mean'] > 0 else 'worse'} on {GROUPS[m]}" for arm, m, d in differ]
    hinted = [f"{arm} {'better' if d['mean'] > 0 else 'worse'} on {GROUPS[m]}" for arm, m, d in hints]
    said = [f"{head}, {len(differ)} differ after the correction{': ' + '; '.join(told) if told else ''}."]
    if hints:
        said.append(f"{head}, {len(hints)} more only before it: {'; '.join(hinted)}.")
    return said
