"""What the demo found: read from its folder, said in plain words, and as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trace_unlearn import files
from trace_unlearn.calibration.calibrate import Calibration
from trace_unlearn.demo.compare import BASELINE, FORGET_NLL, MEASURES, Comparison, Curve, compare, verdict
from trace_unlearn.demo.corpus import FACT_GROUPS, make_corpus
from trace_unlearn.demo.unlearn import ARMS, Recipe, read_curve
from trace_unlearn.reporting import plots
from trace_unlearn.reporting.page import Page
from trace_unlearn.reporting.report import describe_calibration, describe_choices, footer
from trace_unlearn.routing.profile import RoutingStatistics

TRACE, CONTROL = ARMS[1], ARMS[2]
TITLES = {"grad_diff": "gradient ascent (GradDiff)", "npo": "NPO", "wga": "WGA", "ce_u": "CE-U"}


@dataclass(frozen=True)
class ModelResult:
    """One model: what it knew, its calibration, and a curve for each arm.

    Attributes:
        adjacent_weight: the mean weight of retain tokens about A under TRACE and under the shuffled control.
    """

    seed: int
    knowledge: dict[str, float]
    stats: RoutingStatistics
    calibration: Calibration
    adjacent_weight: dict[str, float]
    curves: dict[str, Curve]

    @property
    def error_before(self) -> float:
        """The mean mismatch of the selected experts with uniform weights."""
        return float((self.calibration.r - self.calibration.f).abs().mean())


@dataclass(frozen=True)
class Results:
    objective: str
    models: tuple[ModelResult, ...]
    comparison: Comparison


def collect(folders: Sequence[Path], objective: str, recipe: Recipe) -> Results:
    """Read the results of all models from their folders."""
    models = []
    for seed, folder in enumerate(folders):
        calibration = Calibration.load(folder / "calibration")
        corpus = make_corpus(seed, pretrain_documents=0, forget_documents=0, retain_documents=recipe.retain_documents)
        weights = {TRACE: calibration, CONTROL: calibration.shuffled(seed)}
        models.append(
            ModelResult(
                seed=seed,
                knowledge=files.read_json(folder / "checkpoint" / "knowledge.json"),
                stats=RoutingStatistics.load(folder / "profile"),
                calibration=calibration,
                adjacent_weight={
                    arm: float(np.mean([float(w.weights_of(d).mean()) for d in corpus.adjacent_documents]))
                    for arm, w in weights.items()
                },
                curves={arm: read_curve(folder, objective, arm) for arm in ARMS},
            )
        )
    return Results(objective, tuple(models), compare([model.curves for model in models]))


def explain(results: Results, say: Callable[[str], None]) -> None:
    """Print the calibration before and after, utility at equal forgetting, and the verdict."""
    say(f"\nCalibration of model {results.models[0].seed}:\n{_indent(results.models[0].calibration.summary())}")
    say("\nCalibration of every model: retain frequencies of the forget-critical experts against the forget set's")
    say(_indent(_text_table(*_calibration_rows(results))))
    say("  A: facts of the domain to forget from that must stay and are 5 % of the retain set. The weights know of")
    say("  routing alone; on the control's A they should be about 1.")
    say(f"\nUtility at equal forgetting, by {TITLES[results.objective]} (averaged over forget NLL {_range(results)}):")
    if results.comparison.models:
        say(_indent(_text_table(*_utility_rows(results))))
        for group, meaning in FACT_GROUPS.items():
            say(f"  {group}: {meaning}")
    say("")
    for sentence in verdict(results.comparison, TRACE, CONTROL):
        say(sentence)


def write_report(output: Path, results: Results, recipe: Recipe) -> Path:
    """Write report.html, its figures and results.json."""
    first = results.models[0]
    comparison = results.comparison
    page = Page(
        "TRACE on tiny models",
        f"{counted(len(results.models), 'independent Mixture-of-Experts model')}, unlearning by "
        f"{TITLES[results.objective]}",
    )
    page.verdict(verdict(comparison, TRACE, CONTROL))
    page.paragraph(
        "Each model learnt invented facts of five domains and is made to forget some facts of the first one (F). To be "
        "kept are: neighbours in the same domain, of which the retain set has nothing (N); adjacent facts of the same "
        "domain, which are 5 % of the retain set (A); held-out facts of the other domains (R). Three arms differ in "
        "the weights of the retain tokens only: uniform, TRACE's, and TRACE's shuffled over the tokens as a control."
    )
    if comparison.models:
        page.heading("Utility at equal forgetting")
        caption = f"Averaged over forget NLL {_range(results)}; differences are paired, ± standard error over models"
        page.table(caption, *_utility_rows(results))
    page.figure(
        "trade-off",
        plots.trade_off(
            {
                f"{group}: {FACT_GROUPS[group]}": {
                    arm: [_curve(model.curves[arm], f"{group}_accuracy") for model in results.models] for arm in ARMS
                }
                for group in "NAR"
            },
            x_label="forget NLL (nats)",
            y_label="fact accuracy",
            band=FORGET_NLL,
        ),
        alt="Fact accuracy against forget NLL for N, A and R, one line an arm. "
        + " ".join(
            f"{MEASURES[measure]}: " + ", ".join(f"{arm} {comparison.utility[measure][arm]:.3f}" for arm in ARMS) + "."
            for measure in ("N_accuracy", "A_accuracy", "R_accuracy")
            if comparison.models
        ),
        caption="What is kept (up) for what is forgotten (right); bold: mean over models; shaded: the range compared.",
    )
    page.heading("Calibration of every model")
    page.table("Mean error on the forget-critical experts, and the weights that mend it", *_calibration_rows(results))
    describe_calibration(page, first.stats, first.calibration, title=f"Calibration of model {first.seed} in detail")
    describe_choices(
        page,
        {
            "recipe": dataclasses.asdict(recipe),
            f"calibration of model {first.seed}": first.calibration.choices,
            f"profile of model {first.seed}": first.stats.meta,
        },
    )
    files.write_json(
        output / f"results-{results.objective}.json",
        {
            "objective": results.objective,
            "comparison": comparison,
            "verdict": verdict(comparison, TRACE, CONTROL),
            "models": [
                {
                    "seed": model.seed,
                    "knowledge": model.knowledge,
                    "ess": model.calibration.ess,
                    "largest_weight": model.calibration.largest_weight,
                    "mean_error_before": model.error_before,
                    "mean_error": model.calibration.mean_error,
                    "adjacent_weight": model.adjacent_weight,
                    "end": {arm: curve[-1] for arm, curve in model.curves.items()},
                }
                for model in results.models
            ],
        },
    )
    return page.write(output, footer=footer())


def _calibration_rows(results: Results) -> tuple[list[str], list[list[object]]]:
    columns = ["model", "experts", "error before", "after", "ESS", "largest weight", "weight of A", "of A, control"]
    rows: list[list[object]] = [
        [
            str(model.seed),
            len(model.calibration.selected),
            model.error_before,
            model.calibration.mean_error,
            model.calibration.ess,
            model.calibration.largest_weight,
            model.adjacent_weight[TRACE],
            model.adjacent_weight[CONTROL],
        ]
        for model in results.models
    ]
    return columns, rows


def _utility_rows(results: Results) -> tuple[list[str], list[list[object]]]:
    comparison = results.comparison
    columns = ["", "before", *ARMS, *(f"{arm} − {BASELINE}" for arm in ARMS if arm != BASELINE)]
    rows: list[list[object]] = []
    for measure, title in MEASURES.items():
        before = float(np.mean([model.curves[BASELINE][0][measure] for model in results.models]))
        rows.append(
            [
                title,
                before,
                *(comparison.utility[measure][arm] for arm in ARMS),
                *(str(comparison.differences[measure][arm]) for arm in ARMS if arm != BASELINE),
            ]
        )
    return columns, rows


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "model"), counted(3, "model")
    ('1 model', '3 models')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _range(results: Results) -> str:
    low, high = FORGET_NLL
    text = f"{low} to {high}, {counted(results.comparison.models, 'model')}"
    cut = [f"{top:.1f}" for _, top in results.comparison.ranges if top < high]
    if cut:
        text += f"; {len(cut)} of them only to {', '.join(cut)}, where an arm stopped"
    if results.comparison.left_out:
        text += f"; left out, as an arm forgot too little: {', '.join(map(str, results.comparison.left_out))}"
    return text


def _curve(curve: Curve, measure: str) -> plots.Curve:
    return np.array([point["F_nll"] for point in curve]), np.array([point[measure] for point in curve])


def _text_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    from trace_unlearn.values import show

    cells = [list(columns), *([show(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]))
    return "\n".join(lines)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
