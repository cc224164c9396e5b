"""What the demo found: read from its folder, said in plain words, and as a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trace_unlearn import files
from trace_unlearn.calibration.calibrate import Calibration
from trace_unlearn.demo.compare import CONTROL, FORGET_NLL, MEASURES, TRACE, UNIFORM, Comparison, Curve, compare
from trace_unlearn.demo.corpus import FACT_GROUPS, make_corpus
from trace_unlearn.demo.positions import KINDS, WORDS, by_position, where_they_fall
from trace_unlearn.demo.unlearn import Recipe, read_curve
from trace_unlearn.demo.verdict import sentences
from trace_unlearn.reporting import plots
from trace_unlearn.reporting.page import Page
from trace_unlearn.reporting.report import describe_calibration, describe_choices, footer
from trace_unlearn.routing.profile import RoutingStatistics

TITLES = {"grad_diff": "gradient ascent (GradDiff)", "npo": "NPO", "wga": "WGA", "ce_u": "CE-U"}
POSITIONS = "Mean weight at each word of a retained fact; it multiplies the loss of the next word"


@dataclass(frozen=True)
class ModelResult:
    """One model: what it knew, its calibration, and a curve for each arm.

    Attributes:
        adjacent_weight: the mean weight of retain tokens about A under TRACE and under the shuffled control.
        position_weight: by kind of fact, the mean weight at each word of it.
    """

    seed: int
    knowledge: dict[str, float]
    stats: RoutingStatistics
    calibration: Calibration
    adjacent_weight: dict[str, float]
    position_weight: dict[str, list[float]]
    curves: dict[str, Curve]

    @property
    def error_before(self) -> float:
        """The mean mismatch of the selected experts with uniform weights."""
        return float((self.calibration.r - self.calibration.f).abs().mean())


@dataclass(frozen=True)
class Results:
    """All of it.

    Attributes:
        verdict: `trace_unlearn.demo.verdict.sentences`.
    """

    objective: str
    recipe: Recipe
    models: tuple[ModelResult, ...]
    comparison: Comparison

    @property
    def verdict(self) -> list[str]:
        return sentences(self.comparison, self.recipe.strength)

    @property
    def position_weight(self) -> dict[str, list[float]]:
        """The mean over the models."""
        return {
            kind: np.mean([model.position_weight[kind] for model in self.models], axis=0).tolist() for kind in KINDS
        }


def collect(folders: Mapping[int, Path], objective: str, arms: Mapping[int, Sequence[str]], recipe: Recipe) -> Results:
    """Read the results of all models from their folders and arms, by seed."""
    models = []
    for seed, folder in folders.items():
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
                position_weight=by_position(calibration, corpus),
                curves={arm: read_curve(folder, objective, arm) for arm in arms[seed]},
            )
        )
    return Results(objective, recipe, tuple(models), compare({model.seed: model.curves for model in models}))


def explain(results: Results, say: Callable[[str], None]) -> None:
    """Print the verdict, utility at equal forgetting, where the weights fall, and the calibration."""
    say("")
    for sentence in results.verdict:
        say(sentence)
    say(f"\nUtility at equal forgetting, by {TITLES[results.objective]} (averaged over forget NLL {_range(results)}):")
    if results.comparison.models:
        say(_indent(_text_table(*_levels(results))))
        say("  Paired differences, mean [95 % interval]:")
        say(_indent(_text_table(*_differences(results))))
        for group, meaning in FACT_GROUPS.items():
            say(f"  {group}: {meaning}")
    say(f"\n{POSITIONS}:")
    say(_indent(_text_table(*_positions(results))))
    say(f"  {where_they_fall(results.position_weight)}")
    say("\nCalibration: retain frequencies of the forget-critical experts against the forget set's")
    say(_indent(_text_table(*_calibrations(results))))
    say("  A: facts of the domain to forget from that must stay and are 5 % of the retain set. The weights know of")
    say("  routing alone; on the control's A they should be about 1.")
    first = results.models[0]
    say(f"\nCalibration of model {first.seed}:\n{_indent(first.calibration.summary())}")


def write_report(output: Path, results: Results) -> Path:
    """Write report.html, its figures and results-OBJECTIVE.json."""
    first, comparison = results.models[0], results.comparison
    page = Page(
        "TRACE on tiny models",
        f"{counted(len(results.models), 'independent Mixture-of-Experts model')}, unlearning by "
        f"{TITLES[results.objective]}",
    )
    page.verdict(results.verdict)
    if comparison.models:
        _gains(page, comparison)
    page.paragraph(
        "Each model learnt invented facts of five domains and is made to forget some facts of the first one (F). To be "
        "kept are: neighbours in the same domain, of which the retain set has nothing (N); adjacent facts of the same "
        "domain, which are 5 % of the retain set (A); held-out facts of the other domains (R). The arms differ in the "
        "weights of the retain tokens only: uniform, TRACE's, and TRACE's on random documents as a control."
    )
    page.heading("Utility at equal forgetting")
    if comparison.models:
        page.table(f"Averaged over forget NLL {_range(results)}", *_levels(results))
        page.table("Paired differences, mean [95 % interval]", *_differences(results))
    _trade_off(page, results)
    page.heading("What the weights fall on")
    page.table(POSITIONS, *_positions(results))
    page.paragraph(where_they_fall(results.position_weight))
    page.heading("Calibration of every model")
    page.table("Mean error on the forget-critical experts, and the weights that mend it", *_calibrations(results))
    describe_calibration(page, first.stats, first.calibration, title=f"Calibration of model {first.seed} in detail")
    describe_choices(
        page,
        {
            "recipe": dataclasses.asdict(results.recipe),
            f"calibration of model {first.seed}": first.calibration.choices,
            f"profile of model {first.seed}": first.stats.meta,
        },
    )
    files.write_json(output / f"results-{results.objective}.json", _record(results))
    return page.write(output, footer=footer())


def _gains(page: Page, comparison: Comparison) -> None:
    """The one picture: what TRACE kept more than uniform weights and than the control, by model."""
    rows = {
        f"{group}, over {other}": comparison.differences[f"{group}_accuracy"][TRACE, other]
        for group in "ANR"
        for other in (UNIFORM, CONTROL)
        if (TRACE, other) in comparison.differences["A_nll"]
    }
    page.figure(
        "gains",
        plots.paired_differences(
            {name: difference.values for name, difference in rows.items()},
            {name: difference.interval for name, difference in rows.items()},
            x_label="accuracy that TRACE kept more, at equal forgetting",
        ),
        alt="What TRACE kept more: " + "; ".join(f"{name}: {difference}" for name, difference in rows.items()) + ".",
        caption="Each pale dot is one model; the diamond is their mean, the bar its 95 % interval.",
    )


def _trade_off(page: Page, results: Results) -> None:
    arms = results.comparison.arms
    page.figure(
        "trade-off",
        plots.trade_off(
            {
                f"{group}: {FACT_GROUPS[group]}": {
                    arm: [_curve(m.curves[arm], f"{group}_accuracy") for m in results.models if arm in m.curves]
                    for arm in arms
                }
                for group in "ANR"
            },
            x_label="forget NLL (nats)",
            y_label="fact accuracy",
            band=FORGET_NLL,
        ),
        alt="Fact accuracy against forget NLL for A, N and R, one line for each arm. "
        + " ".join(
            f"{MEASURES[measure]}: "
            + ", ".join(f"{arm} {value:.3f}" for arm, value in results.comparison.utility[measure].items())
            + "."
            for measure in ("A_accuracy", "N_accuracy", "R_accuracy")
            if results.comparison.models
        ),
        caption="What is kept (up) for what is forgotten (right); bold: mean over models; shaded: the range compared.",
    )


def _record(results: Results) -> dict[str, object]:
    comparison = results.comparison
    return {
        "objective": results.objective,
        "verdict": results.verdict,
        "comparison": {
            **{field.name: getattr(comparison, field.name) for field in dataclasses.fields(comparison)},
            "differences": {
                measure: [
                    {"arm": arm, "against": other, "values": d.values, "mean": d.mean, "interval": d.interval}
                    for (arm, other), d in pairs.items()
                ]
                for measure, pairs in comparison.differences.items()
            },
        },
        "position_weight": {kind: dict(zip(WORDS, row, strict=True)) for kind, row in results.position_weight.items()},
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
    }


def _calibrations(results: Results) -> tuple[list[str], list[list[object]]]:
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


def _positions(results: Results) -> tuple[list[str], list[list[object]]]:
    return ["", *WORDS], [[kind, *weights] for kind, weights in results.position_weight.items()]


def _levels(results: Results) -> tuple[list[str], list[list[object]]]:
    comparison = results.comparison
    rows: list[list[object]] = []
    for measure, title in MEASURES.items():
        before = float(np.mean([model.curves[UNIFORM][0][measure] for model in results.models]))
        rows.append([title, before, *(comparison.utility[measure].get(arm) for arm in comparison.arms)])
    rows.append(["steps", None, *(_rounded(comparison.utility["step"].get(arm)) for arm in comparison.arms)])
    return ["", "before", *comparison.arms], rows


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _differences(results: Results) -> tuple[list[str], list[list[object]]]:
    by_measure = results.comparison.differences
    pairs = list(by_measure["A_nll"])
    rows: list[list[object]] = [
        [title, *(str(by_measure[measure][pair]) for pair in pairs)] for measure, title in MEASURES.items()
    ]
    return ["", *(f"{arm} − {other}" for arm, other in pairs)], rows


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "model"), counted(3, "model")
    ('1 model', '3 models')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _range(results: Results) -> str:
    low, high = FORGET_NLL
    text = f"{low} to {high}, {counted(results.comparison.models, 'model')}"
    for arm, models in results.comparison.left_out.items():
        text += f"; {arm} forgot too little to be compared in model {', '.join(map(str, models))}"
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
