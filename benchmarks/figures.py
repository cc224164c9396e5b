"""The README's figures and docs/unlearn_your_model.md's table of steps, from results of one machine and one commit.

    python -m benchmarks.figures              # draw them from benchmarks/results
    python -m benchmarks.figures --measure    # first measure again: up to an hour on a quiet machine

`--measure` runs `benchmarks.cpu` and `benchmarks.end_to_end`; peers of requirements/benchmarks.txt are columns where
they are installed. Each table stands between two comments in its page.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from trace_unlearn.files import read_json, write_text

RESULTS = ROOT / "benchmarks" / "results"
# Of the table's rows. Not bfloat16: where a processor does not multiply it, torch's products take minutes.
SIZES = r"fp32 \(1024, 1024, 32000|16384, 128\), k"
MEASURE = {
    "cpu": [
        "benchmarks.cpu",
        *(f"--only={name}" for name in ("peers", "peers_of_today", "router")),
        f"--rows={SIZES}",
        "--json",
    ],
    "end_to_end": ["benchmarks.end_to_end", "--output"],
    "end_to_end_all": ["benchmarks.end_to_end", "--trainable", "all", "--only", "memory", "--output"],
}
BEGIN, END = "<!-- figures: python -m benchmarks.figures -->", "<!-- end of figures -->"
PICTURE = ROOT / "docs" / "whole_step.svg"
OBJECTIVES = {"grad_diff": "GradDiff", "npo": "NPO", "npo_kl": "NPO + KL"}
# Row of the table, its inputs and the figure of benchmarks.cpu that a peer's name stands in: their time / ours.
HEAD = "(1024, 1024, 32000)"
ROWS = [
    ("`linear_cross_entropy`, frozen head", f"fp32 {HEAD}", r"(.+) / ours, frozen"),
    ("`linear_cross_entropy`, trainable head", f"fp32 {HEAD}", r"(.+) / ours, trainable"),
    ("`router_topk` with counts and scores", "fp32 (16384, 128), k = 8", r"router_topk: (.+) / ours"),
]
NAMES = {"eager": "plain torch", "torch": "plain torch", "torch chunked": "torch's chunked loss"}


def table(measured: dict[str, Any]) -> str:
    """Times of others in units of ours."""
    found: list[tuple[str, dict[str, float]]] = []
    for title, inputs, pattern in ROWS:
        peers = {}
        for row in measured["rows"]:
            if row["inputs"] == inputs and (match := re.fullmatch(pattern, row["what"])):
                peers[NAMES.get(match[1], match[1])] = row["figure"]
        if peers:
            found.append((title, peers))
    columns = list(dict.fromkeys(name for _, peers in found for name in peers))
    lines = [f"| Time, ours = 1 | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for title, peers in found:
        cells = [f"{peers[name]:.2f}" if name in peers else "" for name in columns]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    machine = measured["machine"]
    lines += [
        "",
        "Float32. Forward and backward of 1024 tokens, hidden size 1024, 32000 words; the router's forward of 16384 "
        "tokens, 128 experts, top 8. Medians of ratios from one run of `python -m benchmarks.cpu` on "
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}.",
    ]
    return "\n".join(lines)


def steps(*measured: dict[str, Any]) -> str:
    """Whole steps, ours and plain: memory and time."""
    lines = ["| Trained | Objective | Memory, ours and plain (MiB) | | Time, ours / plain |", "|---|---|---|---|---|"]
    for row in (row for results in measured for row in results["rows"]):
        ours, plain = (row["memory"][arm]["beyond"] / 2**20 for arm in ("ours", "plain"))
        time = f"{row['time_ratio']:.2f}" if "time_ratio" in row else "not measured"
        lines.append(
            f"| {row['trainable']} | {OBJECTIVES[row['objective']]} | {ours:.0f} and {plain:.0f} | "
            f"1/{plain / ours:.1f} | {time} |"
        )
    machine = measured[0]["machine"]
    lines += [
        "",
        f"On {machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}.",
    ]
    return "\n".join(lines)


def draw(measured: dict[str, Any], path: Path) -> None:
    """Bars: time and memory of one whole step, plain transformers and ours."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams.update({"svg.hashsalt": "trace-kernels", "font.size": 10, "svg.fonttype": "none"})
    rows = measured["rows"]
    names = [OBJECTIVES[row["objective"]] for row in rows]
    seconds = {arm: [statistics.median(row["milliseconds"][arm]) / 1e3 for row in rows] for arm in ("plain", "ours")}
    mebibytes = {arm: [row["memory"][arm]["beyond"] / 2**20 for row in rows] for arm in ("plain", "ours")}
    figure, axes = pyplot.subplots(1, 2, figsize=(8.6, 2.8), layout="constrained", sharey=True)
    for axis, title, values, form in (
        (axes[0], "Time of one step (s)", seconds, "{:.2f}"),
        (axes[1], "Memory beyond model, optimiser, gradients (MiB)", mebibytes, "{:.0f}"),
    ):
        for offset, (arm, colour, label) in enumerate(
            (("plain", "#9ca3af", "plain transformers"), ("ours", "#0b63ce", "trace-kernels"))
        ):
            at = [index + (offset - 0.5) * 0.38 for index in range(len(names))]
            bars = axis.barh(at, values[arm], 0.36, color=colour, label=label)
            axis.bar_label(bars, [form.format(value) for value in values[arm]], padding=3, fontsize=9)
        axis.set_title(title, loc="left", fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    bars_of_arms = axes[0].get_legend_handles_labels()
    figure.legend(*bars_of_arms, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def blocks() -> dict[Path, str]:
    """What stands in each page, from the committed results."""
    measured = {name: read_json(RESULTS / f"{name}.json") for name in MEASURE}
    return {
        ROOT / "README.md": table(measured["cpu"]),
        ROOT / "docs" / "unlearn_your_model.md": steps(measured["end_to_end"], measured["end_to_end_all"]),
    }


def insert(page: str, block: str) -> str:
    """The page with the block between its two comments."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"a page has no place for figures: it needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--measure", action="store_true", help="measure before drawing")
    options = parser.parse_args(arguments)
    if options.measure:
        RESULTS.mkdir(exist_ok=True)
        for name, command in MEASURE.items():
            subprocess.run([sys.executable, "-m", *command, str(RESULTS / f"{name}.json")], cwd=ROOT, check=True)
    for page, block in blocks().items():
        write_text(page, insert(page.read_text(encoding="utf-8"), block))
    draw(read_json(RESULTS / "end_to_end.json"), PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
