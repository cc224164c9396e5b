"""The frontier: what each kind of weights keeps of A and of N for what it keeps of R, over the retain weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = {"uniform": "#555555", "document": "#c1440e", "token": "#3a7ca5"}
ROWS = {"A": "adjacent (A)", "N": "neighbours (N)"}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG."""
    import matplotlib.pyplot as plt

    panels = {name: frontier for name, frontier in results["frontier"].items() if frontier["points"]}
    if not panels:
        return
    figure, axes = plt.subplots(
        len(ROWS), len(panels), figsize=(4.3 * len(panels), 6.4), squeeze=False, layout="constrained"
    )
    for column, (name, frontier) in enumerate(panels.items()):
        for row, (group, title) in enumerate(ROWS.items()):
            axis = axes[row][column]
            for line, colour in COLOURS.items():
                points = [point for point in frontier["points"] if point["line"] == line]
                if points:
                    _line(axis, points, group, line, colour)
            axis.set_title(f"{name}: {title}, {len(frontier['seeds'])} models", fontsize=9)
            axis.set_xlabel("R accuracy at equal forgetting", fontsize=8)
            axis.set_ylabel(f"{group} accuracy at equal forgetting", fontsize=8)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def _line(axis: Any, points: list[Mapping[str, Any]], group: str, name: str, colour: str) -> None:
    x, y = ([point[f"{which}_accuracy"] for point in points] for which in ("R", group))
    axis.plot(x, y, "o-", color=colour, label=name, markersize=4)
    for point, at_x, at_y in zip(points, x, y, strict=True):
        axis.annotate(
            f"{point['retain_weight']:g}",
            (at_x, at_y),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
            color=colour,
        )
