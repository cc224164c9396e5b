"""One record from the records of two runs: each comparison from one of them, and side by side what both have made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studies.method_study.cells import SECTIONS
from studies.method_study.results import TESTED, corrected, label

_REPEATED = ("family", "arm", "against")
_ARMS = [label(arm) for arms in SECTIONS.values() for arm in arms]


def merged(record: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """`record`, with what an earlier run on another machine finished for more models.

    A comparison is paired within one run, so each is taken whole from one of them and says from which machine it is.
    Where both have finished one, "repeated" holds the values of both machines: the same seeds, but other rounding,
    which training makes into other models.
    """
    shift = len(record["machines"])
    parts: dict[str, list[dict[str, Any]]] = {}
    for kind, key in (("comparisons", _comparison_key), ("levels", lambda level: level["label"])):
        best = {key(item): item for item in record[kind]}
        for item in earlier[kind]:
            known = best.get(key(item))
            if known is None or _finished(known) < _finished(item):
                best[key(item)] = {**item, "machine": item["machine"] + shift}
        parts[kind] = list(best.values())
    used = sorted({item["machine"] for items in parts.values() for item in items})
    for items in parts.values():
        items.sort(key=_order)
        items[:] = [{**item, "machine": used.index(item["machine"])} for item in items]
    machines = [*record["machines"], *earlier["machines"]]
    return corrected(
        {
            "machines": [machines[i] for i in used],
            "models": max(record["models"], earlier["models"]),
            **parts,
            "repeated": _repeated(record, earlier),
            "diverged": sorted({*record["diverged"], *earlier["diverged"]}),
        }
    )


def _comparison_key(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(comparison[name] for name in ("family", "arm", "against", "view"))


def _finished(item: Mapping[str, Any]) -> int:
    """For how many models."""
    if "n" in item:
        return int(item["n"])
    return sum(value is not None for value in item["differences"]["A_accuracy"]["values"])


def _order(item: Mapping[str, Any]) -> int:
    """The study's own order: of sections for comparisons, of arms for levels."""
    return list(SECTIONS).index(item["section"]) if "section" in item else _ARMS.index(item["label"])


def _repeated(record: Mapping[str, Any], earlier: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{family, arm, against, runs: {machine: {measure: values by model}}}, at equal forgetting."""
    known = {tuple(entry[name] for name in _REPEATED): dict(entry["runs"]) for entry in earlier.get("repeated", [])}
    for made in (earlier, record):
        for comparison in made["comparisons"]:
            key = tuple(comparison[name] for name in _REPEATED)
            if comparison["view"] != "forgetting" or comparison["section"] not in ("base", "strong_retain", "pace"):
                continue
            values = {measure: comparison["differences"][measure]["values"] for measure in TESTED}
            known.setdefault(key, {})[made["machines"][comparison["machine"]]["device"]] = values
    return [
        {**dict(zip(_REPEATED, key, strict=True)), "runs": runs}
        for key, runs in known.items()
        if len(runs) > 1 and not any(None in values for run in runs.values() for values in run.values())
    ]
