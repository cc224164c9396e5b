"""The page about a run folder, and its parts.

`describe_calibration` and its like add a part to a `Page`; the demo's report is made of the same parts.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from trace_unlearn import files
from trace_unlearn.errors import UserError
from trace_unlearn.evaluation.scores import NAMES
from trace_unlearn.reporting import plots
from trace_unlearn.reporting.page import Page
from trace_unlearn.reporting.robustness import describe_attacks, describe_suites
from trace_unlearn.values import flatten, scalars, short_names, show

if TYPE_CHECKING:
    from trace_unlearn.calibration.calibrate import Calibration
    from trace_unlearn.routing.statistics import RoutingStatistics

LISTED_EXPERTS = 24  # rows of the experts' table that are shown unfolded
_TOKENS = 1 << 13  # whose routes are read at a time


def report_run(folder: Path, show_tokens: int = 10) -> Page:
    """The page about a run folder, with so many of the retain tokens that have the largest weights.

    Raises:
        UserError: the folder holds nothing to report, or a file in it is broken.
    """
    from trace_unlearn.calibration.calibrate import Calibration
    from trace_unlearn.routing.statistics import RoutingStatistics

    stats = RoutingStatistics.load(folder / "profile") if (folder / "profile").is_dir() else None
    calibration = Calibration.load(folder / "calibration") if (folder / "calibration").is_dir() else None
    metrics = files.read_json(folder / "metrics.json") if (folder / "metrics.json").is_file() else None
    attacked = files.read_json(folder / "attacks.json") if (folder / "attacks.json").is_file() else None
    training = files.read_json(folder / "model" / "trace.json") if (folder / "model" / "trace.json").is_file() else None
    if metrics is not None and not (isinstance(metrics, dict) and {"checkpoints", "choices"} <= metrics.keys()):
        raise UserError(f"{folder / 'metrics.json'}: not measures that evaluate wrote")
    if attacked is not None and not (isinstance(attacked, dict) and {"models", "choices"} <= attacked.keys()):
        raise UserError(f"{folder / 'attacks.json'}: not measures that attack wrote")
    if training is not None and not (isinstance(training, dict) and "log" in training):
        raise UserError(f"{folder / 'model' / 'trace.json'}: not a record that train wrote")
    if all(part is None for part in (stats, calibration, metrics, attacked, training)):
        raise UserError(
            f"run: {folder} holds none of profile/, calibration/, model/, metrics.json, attacks.json: nothing to report"
        )
    model = stats.meta.get("model") if stats is not None else None
    page = Page("Unlearning report", f"{model or folder.name}, {datetime.date.today().isoformat()}")
    if metrics is not None:
        describe_verdicts(page, metrics.get("verdicts") or {})
        describe_metrics(page, metrics["checkpoints"])
        describe_suites(page, metrics.get("suites", {}))
    if attacked is not None:
        describe_attacks(page, attacked["models"], metrics["checkpoints"] if metrics is not None else {})
    if training is not None:
        describe_training(page, training.pop("log"))
    if stats is not None and calibration is not None:
        describe_calibration(page, stats, calibration)
        if show_tokens:
            heaviest(page, stats, calibration, show_tokens)
    elif stats is not None:
        page.heading("Routing")
        heatmaps(page, {"Forget set": stats.forget_frequency, "Retain set": stats.retain_frequency}, [])
    choices: dict[str, Any] = {}
    if stats is not None:
        choices["profile"] = stats.meta
    if calibration is not None:
        choices["calibrate"] = calibration.facts()
    if training is not None:
        choices["train"] = training
    if metrics is not None:
        choices["evaluate"] = metrics["choices"]
    if attacked is not None:
        choices["attack"] = attacked["choices"]
    describe_choices(page, choices)
    return page


def describe_calibration(
    page: Page, stats: RoutingStatistics, calibration: Calibration, *, title: str = "Calibration"
) -> None:
    """What calibration did to the retain set's routing: key figures, experts, heatmaps, weights."""
    selected = [(int(layer), int(expert)) for layer, expert in calibration.selected]
    f, r, weighted = (_array(values) for values in (calibration.f, calibration.r, calibration.weighted_r))
    before = np.abs(r - f)
    page.heading(title)
    page.paragraph(
        f"{len(selected)} forget-critical experts were chosen: the forget set uses them more than the retain set does. "
        f"Every retain token got a weight (rule {calibration.rule!r}, unit {calibration.unit!r}, mean 1), so that the "
        "retain set, weighted, uses them as the forget set does. The effective sample size says what share of the "
        "retain tokens the weighted set is worth: 1 is uniform, and exact matching would cost nearly all of it."
    )
    page.tiles(
        [
            ("mean error, uniform weights → these", f"{before.mean():.3f} → {calibration.mean_error:.3f}"),
            ("largest error, uniform weights → these", f"{before.max():.3f} → {calibration.max_error:.3f}"),
            ("effective sample size", float(calibration.ess)),
            *([("of documents", float(calibration.unit_ess))] if calibration.unit == "document" else []),
            ("largest weight", float(calibration.largest_weight)),
        ]
    )
    maps = {
        "Forget set": stats.forget_frequency,
        "Retain set": stats.retain_frequency,
        "Retain set, weighted": weighted_frequency(stats, calibration.token_weight),
    }
    heatmaps(page, maps, selected)
    intervals(page, calibration)
    page.figure(
        "calibration",
        plots.calibration_scatter(f, r, weighted),
        alt=f"Scatter plot of {len(selected)} experts: the retain-side frequencies lie {before.mean():.3f} from the "
        f"forget-side ones on average before weighting and {calibration.mean_error:.3f} after.",
        caption="Each forget-critical expert: on the dashed line the retain set uses it as much as the forget set.",
    )
    weights = _array(calibration.token_weight)
    page.figure(
        "weights",
        plots.weight_histogram(weights),
        alt=f"Histogram of {len(weights)} token weights from {weights.min():.3f} to {weights.max():.2f}, mean "
        f"{weights.mean():.2f}, median {np.median(weights):.2f}.",
        caption="Weights of the retain tokens; both axes are logarithmic.",
    )
    shares = calibration.quantiles()
    page.table("Quantiles of the weights", ["", *shares], [["weight", *shares.values()]])
    names = (f"layer {layer}, expert {expert}" for layer, expert in selected)
    f_spans, r_spans = (map(_span, values) for values in (calibration.f_interval, calibration.r_interval))
    rows = list(zip(names, f, f_spans, r, r_spans, weighted, weighted - f, strict=True))
    for note in calibration.notes:
        page.paragraph(f"Note: {note}.")
    columns = ["expert", "forget", "95 % interval", "retain", "95 % interval", "retain, weighted", "error left"]
    page.table("Share of tokens that use each forget-critical expert", columns, rows, folded=len(rows) > LISTED_EXPERTS)


def intervals(page: Page, calibration: Calibration) -> None:
    """How often forget-critical experts are used on either side, with intervals; of many, those furthest apart."""
    apart = (calibration.f - calibration.r).abs()
    shown = apart.sort(descending=True, stable=True).indices[:LISTED_EXPERTS].sort().values
    if len(shown) == 0:
        return
    labels = [f"{layer} / {expert}" for layer, expert in calibration.selected[shown].tolist()]
    c = calibration
    f, f_span, r, r_span, weighted = (
        _array(values[shown]) for values in (c.f, c.f_interval, c.r, c.r_interval, c.weighted_r)
    )
    which = f"the {len(shown)} of {len(apart)} furthest apart" if len(shown) < len(apart) else "all of them"
    sure = int(((f_span[:, 0] > r_span[:, 1]) | (f_span[:, 1] < r_span[:, 0])).sum())
    page.figure(
        "intervals",
        plots.frequency_intervals(labels, f, f_span, r, r_span, weighted),
        alt=f"Dot plot of {len(shown)} experts with 95 % intervals; those of forget and retain set do not overlap for "
        f"{sure} of them. Furthest apart is expert {labels[int(np.abs(f - r).argmax())]} (MoE layer / expert).",
        caption=f"Forget-critical experts, {which}, with 95 % intervals, before and after weighting.",
    )


def heaviest(page: Page, stats: RoutingStatistics, calibration: Calibration, count: int) -> None:
    """What the weights fall on: kinds, documents and tokens, if the data is still where profile read it."""
    from trace_unlearn.calibration.fallen import avoided
    from trace_unlearn.calibration.top_tokens import heaviest_of_profile

    try:
        kinds, documents, tokens = heaviest_of_profile(calibration, stats.meta, count)
    except UserError as error:
        page.paragraph(f"The retain tokens with the largest weights cannot be shown: {error}.")
        return
    page.table(
        "Mean weight by kind of the token that is predicted",
        ["kind", "share of the tokens", "mean weight"],
        [[kind.name, f"{kind.share:.0%}", kind.weight] for kind in kinds],
    )
    if (sentence := avoided(kinds)) is not None:
        page.paragraph(sentence)
    page.table(
        "Retain documents with the largest mean weights",
        ["document", "weight", "text"],
        [[str(document.document), document.weight, document.text] for document in documents],
        text=True,
    )
    page.table(
        "Retain tokens with the largest weights, in brackets",
        ["document", "weight", "text"],
        [[str(token.document), token.weight, token.text] for token in tokens],
        text=True,
    )


def heatmaps(page: Page, frequencies: Mapping[str, torch.Tensor], selected: Sequence[tuple[int, int]]) -> None:
    """Expert heatmaps, one per [L, E] entry."""
    arrays = {title: _array(values) for title, values in frequencies.items()}
    layers, experts = next(iter(arrays.values())).shape
    busiest = ", ".join(
        f"{title.lower()}: expert {int(values.argmax()) % experts} of layer {int(values.argmax()) // experts} with "
        f"{values.max():.0%}"
        for title, values in arrays.items()
    )
    page.figure(
        "experts",
        plots.expert_heatmaps(arrays, selected),
        alt=f"Heatmaps of {layers} layers by {experts} experts. The most used experts are, {busiest}. "
        f"{len(selected)} forget-critical experts are outlined.",
        caption="How often each expert is used; outlined are the forget-critical ones.",
    )


def weighted_frequency(stats: RoutingStatistics, token_weight: torch.Tensor) -> torch.Tensor:
    """[L, E] float64: the retain set's activation frequencies when token t counts token_weight[t]."""
    L, E = stats.retain_counts.shape
    routes, weight = stats.retain_routes.numpy(), _array(token_weight)
    total = np.zeros((L, E + 1))  # an empty slot has a number of E or more
    for begin in range(0, len(weight), _TOKENS):
        part = routes[begin : begin + _TOKENS].transpose(1, 0, 2).reshape(L, -1)
        each = np.repeat(weight[begin : begin + _TOKENS], routes.shape[2])  # a token's weight for each of its k experts
        for layer in range(L):
            total[layer] += np.bincount(part[layer], each, minlength=E + 1)[: E + 1]
    return torch.from_numpy(total[:, :E] / weight.sum())


def describe_training(page: Page, log: Sequence[Mapping[str, Any]]) -> None:
    """Utility against forgetting along the training: the retain NLL against the forget NLL of the log's entries."""
    points = [entry for entry in log if "forget_nll" in entry and "retain_nll" in entry]
    if len(points) < 2:
        return
    forget, retain = (np.array([point[name] for point in points]) for name in ("forget_nll", "retain_nll"))
    page.heading("Trade-off while training")
    page.figure(
        "trade-off",
        plots.trade_off(
            {"Retain against forget": {"this run": [(forget, retain)]}},
            x_label="forget NLL (nats per token)",
            y_label="retain NLL (nats per token)",
        ),
        alt=f"Line plot of {len(points)} points: while the forget NLL goes from {forget[0]:.3f} to {forget[-1]:.3f}, "
        f"the retain NLL goes from {retain[0]:.3f} to {retain[-1]:.3f}.",
        caption="What the model lost on the retain set (up) for what it forgot (right), on the training batches.",
    )


def describe_verdicts(page: Page, verdicts: Mapping[str, Mapping[str, str]]) -> None:
    """Before all else, whether it is forgotten and the rest is kept: a sentence for each unlearned checkpoint."""
    if not verdicts:
        return
    short = {name: f"{title}: " for name, title in short_names(list(verdicts)).items()} if len(verdicts) > 1 else {}
    page.verdict([f"{short.get(name, '')}{found['sentence']}" for name, found in verdicts.items()])


def describe_metrics(page: Page, checkpoints: Mapping[str, Mapping[str, Any]]) -> None:
    """The main measures, a column for each checkpoint, and all others in a folded table."""
    page.heading("Metrics")
    short = short_names(list(checkpoints))
    columns = {short[name]: flatten(scalars(measures)) for name, measures in checkpoints.items()}
    names = list(dict.fromkeys(key for values in columns.values() for key in values))
    if len(columns) == 2:
        _tiles(page, *columns.values())
    main = [name for name in names if name.partition(".")[2] in NAMES]
    for caption, shown in (
        ("Main measures of each checkpoint", main),
        ("All other measures", [name for name in names if name not in main]),
    ):
        rows = [[_title(name), *(values.get(name) for values in columns.values())] for name in shown]
        page.table(caption, ["measure", *columns], rows, folded=shown is not main)


def _tiles(page: Page, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """What two checkpoints, one made from the other, are compared by first."""
    shown = [
        (f"{data}: {NAMES[measure]}", f"{show(before[name])} → {show(after[name])}")
        for data in ("forget", "retain")
        for measure in ("fact_accuracy", "exact_memorization", "nll")
        if (name := f"{data}.{measure}") in before and name in after
    ]
    page.tiles(shown)


def _title(name: str) -> str:
    data, _, measure = name.partition(".")
    return f"{data}: {NAMES.get(measure, measure)}"


def describe_choices(page: Page, choices: Mapping[str, Any]) -> None:
    """Every choice and version, as a folded table for each part."""
    if not choices:
        return
    page.heading("Choices and versions")
    for part, values in choices.items():
        page.table(part, ["name", "value"], list(flatten(values).items()), text=True, folded=True)


def footer() -> str:
    """What made a page, and when."""
    import trace_kernels

    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    return f"Written by trace-unlearn {trace_kernels.__version__} on {now}."


def _span(interval: torch.Tensor) -> str:
    return "{:.3f} to {:.3f}".format(*interval.tolist())


def _array(values: torch.Tensor) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = values.detach().cpu().double().numpy()
    return array
