"""The study's figure: what is kept over the retain weight, and every comparison with uniform weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_unlearn.demo.compare import T_975, student

COLOURS = {"uniform": "#555555", "TRACE": "#c1440e", "shuffled": "#3a7ca5"}
PANELS = {"A_accuracy": "adjacent facts (A)", "N_accuracy": "neighbours (N)"}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG."""
    import matplotlib.pyplot as plt

    versus = [c for c in results["comparisons"] if c["family"] in ("uniform", "tuned")]
    height = max(3.2, 0.24 * len(versus) + 1.2)
    figure, axes = plt.subplots(1, 4, figsize=(13, height), width_ratios=(1.0, 1.0, 1.2, 1.2), layout="constrained")
    for axis, (measure, title) in zip(axes[:2], PANELS.items(), strict=True):
        _over_retain_weight(axis, results, measure, title)
    for i, (axis, (measure, title)) in enumerate(zip(axes[2:], PANELS.items(), strict=True)):
        _forest(axis, versus, measure, f"TRACE − uniform, {title}", named=i == 0)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _over_retain_weight(axis: Any, results: Mapping[str, Any], measure: str, title: str) -> None:
    counts: list[int] = []
    for weights, colour in COLOURS.items():
        points = sorted(
            (level["arm"]["retain_weight"], level[measure])
            for level in results["levels"]
            if _plain(level["arm"], weights) and level[measure] is not None
        )
        counts += [level["compared"] for level in results["levels"] if _plain(level["arm"], weights)]
        if points:
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=weights, markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("retain weight")
    axis.set_ylabel("accuracy at equal forgetting")
    models = f"{min(counts, default=0)} to {max(counts, default=0)} models" if len(set(counts)) > 1 else ""
    axis.set_title(f"{title}{': ' * bool(models)}{models}", fontsize=9)
    if axis.lines:
        axis.legend(frameon=False, fontsize=8)


def _plain(arm: Mapping[str, Any], weights: str) -> bool:
    """Whether nothing but the retain weight differs from the defaults."""
    from dataclasses import asdict

    from studies.method_study.cells import Arm

    return dict(arm) == {**asdict(Arm()), "weights": weights, "retain_weight": arm["retain_weight"]}


def _forest(axis: Any, comparisons: list[Mapping[str, Any]], measure: str, title: str, *, named: bool) -> None:
    for row, comparison in enumerate(comparisons):
        difference = comparison["differences"][measure]
        n = sum(value is not None for value in difference["values"])
        if n < 2:
            continue
        colour = "#c1440e" if comparison["adjusted"][measure] < 0.05 else "#555555"
        error = student(T_975, n) * difference["standard_error"]
        axis.errorbar(difference["mean"], row, xerr=error, fmt="o", color=colour, markersize=4, linewidth=1)
    axis.axvline(0, color="#bbbbbb", linewidth=1, zorder=0)
    names = [
        f"{c['arm'].removeprefix('TRACE, ')} (n = {sum(v is not None for v in c['differences'][measure]['values'])})"
        for c in comparisons
    ]
    axis.set_yticks(range(len(comparisons)), names if named else [""] * len(names), fontsize=7)
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("difference and its 95 % interval (Student's t)", fontsize=8)
