"""The figures of a report: expert heatmaps, calibration scatter, weight histogram, trade-off curve."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

Array = npt.NDArray[np.float64]
Curve = tuple[Array, Array]  # x and y, in the order of training

INK, MUTED, GRID = "#1f2937", "#6b7280", "#e5e7eb"
MARK = "#d1400c"  # outlines of the selected experts, on a blue scale
COLOURS = ("#4b5563", "#0b63ce", "#d1700c", "#0a7d5a", "#9a3fb5", "#b3261e")  # told apart by colour-blind readers too
LINES = ("-", "-", "--", "-.", ":", "-")
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names of models and files may hold a $
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "legend.frameon": False,
}


def png(figure: Figure) -> bytes:
    """The figure as a PNG file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def expert_heatmaps(frequencies: Mapping[str, Array], selected: Sequence[tuple[int, int]]) -> Figure:
    """One panel per entry: [L, E] frequencies on one colour scale; the `selected` (layer, expert) outlined."""
    layers, experts = next(iter(frequencies.values())).shape
    largest = max(float(values.max()) for values in frequencies.values())
    height = min(1.0 + 0.22 * layers, 3.6)
    with mpl.rc_context(STYLE):
        figure, axes = _subplots(len(frequencies), 1, (9.0, 0.4 + height * len(frequencies)), sharex=True)
        for ax, (title, values) in zip(axes, frequencies.items(), strict=True):
            image = ax.imshow(values, cmap="Blues", vmin=0.0, vmax=largest, aspect="auto", interpolation="nearest")
            for layer, expert in selected:
                box = Rectangle(
                    (expert - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=MARK, linewidth=1.6, clip_on=False
                )
                ax.add_patch(box)
            ax.set_title(title)
            ax.set_ylabel("MoE layer")
            ax.grid(False)
            ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 8)))
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
        axes[-1].set_xlabel(f"expert, 0 to {experts - 1}   (outlined: forget-critical experts)")
        bar = figure.colorbar(
            image, ax=list(axes), fraction=0.03, pad=0.02, label="share of tokens that use the expert"
        )
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        bar.outline.set_visible(False)
    return figure


def calibration_scatter(forget: Array, retain: Array, weighted: Array) -> Figure:
    """Frequencies of the selected experts: the forget side across, the retain side up, before and after weighting."""
    limit = 1.08 * max(float(forget.max()), float(retain.max()), float(weighted.max()))
    with mpl.rc_context(STYLE):
        figure, (ax,) = _subplots(1, 1, (5.6, 5.0))
        ax.plot([0, limit], [0, limit], color=MUTED, linewidth=1, linestyle="--", label="perfect match")
        ax.vlines(forget, retain, weighted, color=GRID, linewidth=2, zorder=1)
        ax.scatter(
            forget,
            retain,
            s=42,
            facecolor="white",
            edgecolor=COLOURS[0],
            linewidth=1.5,
            label="before",
            zorder=2,
        )
        ax.scatter(
            forget, weighted, s=42, color=COLOURS[1], marker="D", label="after: retain tokens weighted", zorder=3
        )
        ax.set_xlim(0, limit)
        ax.set_ylim(0, limit)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_xlabel("share of forget tokens that use the expert")
        ax.set_ylabel("share of retain tokens that use it")
        ax.legend(loc="upper left")
    return figure


def frequency_intervals(
    labels: Sequence[str], forget: Array, forget_interval: Array, retain: Array, retain_interval: Array, weighted: Array
) -> Figure:
    """A row per selected expert: f and r with their intervals [M, 2], and the weighted r."""
    rows = np.arange(len(labels))
    with mpl.rc_context(STYLE):
        figure, (ax,) = _subplots(1, 1, (7.0, 1.4 + 0.24 * len(labels)))
        sides = ((forget, forget_interval, MARK, "forget"), (retain, retain_interval, COLOURS[0], "retain"))
        for shift, (value, interval, colour, name) in zip((-0.15, 0.15), sides, strict=True):
            ax.hlines(rows + shift, interval[:, 0], interval[:, 1], color=colour, linewidth=2)
            ax.scatter(value, rows + shift, s=18, color=colour, label=f"{name}, 95 % interval", zorder=3)
        ax.scatter(weighted, rows, s=26, color=COLOURS[1], marker="D", label="retain, weighted", zorder=4)
        ax.set_yticks(rows, labels)
        ax.invert_yaxis()
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        ax.set_xlabel("share of tokens that use the expert (MoE layer / expert)")
        ax.legend(loc="best")
    return figure


def weight_histogram(weights: Array) -> Figure:
    """How many retain tokens have which weight, both axes logarithmic."""
    low, high = max(float(weights.min()), 1e-4), float(weights.max())
    low, high = min(low, 0.5), max(high, 2.0)
    with mpl.rc_context(STYLE):
        figure, (ax,) = _subplots(1, 1, (7.0, 3.6))
        bins = np.geomspace(low / 1.05, high * 1.05, 40)
        ax.hist(np.clip(weights, low, None), bins=bins, color=COLOURS[1], edgecolor="white", linewidth=0.6)
        ax.axvline(1.0, color=MARK, linewidth=1.4, linestyle="--")
        ax.annotate(
            "uniform",
            (1.0, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            color=MARK,
            va="top",
        )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel("weight of a retain token (mean 1)")
        ax.set_ylabel("tokens")
    return figure


def trade_off(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]],
    *,
    x_label: str,
    y_label: str,
    band: tuple[float, float] | None = None,
    share: bool = False,
) -> Figure:
    """Curves against forgetting, one panel per entry; an arm with several curves (one per model) shows
    them pale and their mean bold.

    `band` shades the range of x over which arms are compared. `share` is for y from 0 to 1, on one scale, without the
    first colour, which is a baseline's.
    """
    with mpl.rc_context(STYLE):
        columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
        rows = -(-len(panels) // columns)
        figure, axes = _subplots(rows, columns, (max(4.0 * columns, 6.0), 3.6 * rows))
        for ax, (title, arms) in zip(axes, panels.items(), strict=False):
            if band is not None:
                ax.axvspan(*band, color="#f3f4f6", zorder=0)
            styles = zip(itertools.cycle(COLOURS[share:]), itertools.cycle(LINES[share:]))
            for (colour, line), (arm, curves) in zip(styles, arms.items(), strict=False):
                for x, y in curves if len(curves) > 1 else ():
                    ax.plot(x, y, color=colour, linewidth=0.9, alpha=0.3)
                x, y = _mean_curve(curves)
                ax.plot(x, y, color=colour, linewidth=2.2, linestyle=line, label=arm)
            ax.set_title(title)
            ax.set_xlabel(x_label)
            ax.set_ylabel(y_label)
            if share:
                ax.set_ylim(-0.03, 1.03)
        axes[0].legend(loc="best")
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
    return figure


def dots(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """A line for each label, on it a dot for each series; `marks` are vertical lines, named."""
    shapes = ("o", "D", "s", "^", "v", "P")
    with mpl.rc_context(STYLE):
        figure, (ax,) = _subplots(1, 1, (8.0, 0.9 + 0.42 * len(labels) + 0.25 * len(series)))
        heights = np.arange(len(labels))[::-1]
        ax.hlines(heights, 0, 1, color=GRID, linewidth=1, transform=ax.get_yaxis_transform())
        for name, x in (marks or {}).items():
            ax.axvline(x, color=MUTED, linewidth=1.2, linestyle="--")
            place = {"xycoords": ("data", "axes fraction"), "xytext": (4, 2), "textcoords": "offset points"}
            ax.annotate(name, (x, 1.0), color=MUTED, **place)
        styles = zip(itertools.cycle(COLOURS[1:]), itertools.cycle(shapes))
        for (colour, shape), (name, values) in zip(styles, series.items(), strict=False):
            ax.scatter(values, heights, s=52, color=colour, marker=shape, label=name, zorder=3)
        ax.set_yticks(heights, labels)
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.grid(visible=False, axis="y")
        ax.spines["left"].set_visible(False)
        ax.set_ylim(-0.6, len(labels) - 0.4)
        ax.set_xlabel(x_label)
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=min(len(series), 3))
    return figure


def paired_differences(
    values: Mapping[str, Sequence[float]], intervals: Mapping[str, tuple[float, float] | None], *, x_label: str
) -> Figure:
    """A row for each entry: its values as pale dots, their mean as a diamond, and a bar for its interval, if any.

    Rows whose interval leaves out 0 are coloured.
    """
    with mpl.rc_context(STYLE):
        figure, (ax,) = _subplots(1, 1, (8.0, 1.0 + 0.45 * len(values)))
        ax.axvline(0, color=MUTED, linewidth=1.2)
        for height, (name, row) in zip(range(len(values), 0, -1), values.items(), strict=True):
            interval = intervals[name]
            apart = interval is not None and (interval[0] > 0 or interval[1] < 0)
            colour = COLOURS[1] if apart else COLOURS[0]
            ax.scatter(row, [height] * len(row), s=26, color=colour, alpha=0.35, linewidth=0)
            if interval is not None:
                ax.hlines(height, *interval, color=colour, linewidth=2.4)
            ax.scatter([float(np.mean(row))], [height], s=56, color=colour, marker="D", zorder=3)
        ax.set_yticks(range(len(values), 0, -1), list(values))
        ax.tick_params(axis="y", length=0, labelcolor=INK)
        ax.grid(visible=False, axis="y")
        ax.spines["left"].set_visible(False)
        ax.set_ylim(0.4, len(values) + 0.6)
        ax.set_xlabel(x_label)
    return figure


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of y over the x that every curve covers; a single curve is returned as it is."""
    if len(curves) == 1:
        return curves[0]
    grid = np.linspace(max(float(x.min()) for x, _ in curves), min(float(x.max()) for x, _ in curves), 60)
    return grid, np.mean([np.interp(grid, np.maximum.accumulate(x), y) for x, y in curves], axis=0)


def _subplots(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # no window system, no global state of pyplot
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)
