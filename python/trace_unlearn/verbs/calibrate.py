"""The verb `calibrate`: forget-critical experts, and retain weights that make them as active as on forget data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from trace_unlearn import files
from trace_unlearn.calibration.calibrate import calibrate, check_settings
from trace_unlearn.calibration.fallen import table_of_kinds
from trace_unlearn.calibration.selection import Selection
from trace_unlearn.calibration.top_tokens import heaviest_of_profile
from trace_unlearn.checks import check_integers
from trace_unlearn.routing.statistics import DEFAULT_UNIT, RoutingStatistics

MAKES = "calibration"
PLACES = ("profile", "output")


@dataclass
class CalibrateOptions:
    """Finds the forget-critical experts and weights the retain tokens so that these experts are kept in use.

    Args:
        profile: the folder that `profile` wrote.
        output: the folder to write; must not exist.
        rule: how weights follow from frequencies: "balance", "additive", "product", "ratio" or "uniform"; or the
            control "shuffled".
        unit: whose routing a weight looks at: "token" (its own), "context" (the mean of what its loss reads)
            or "document" (the mean of its document's).
        experts_per_layer: at most so many forget-critical experts per layer; null for all that qualify.
        tau: an expert qualifies from tau times the activation of a perfectly even routing on.
        rank: what the most critical experts are: those of the highest "log_ratio" (f log(f / r)), "difference" (f - r),
            "ratio" (f / r) or "z_score" ((f - r) over its standard error).
        threshold: the least rank value; null for none.
        max_experts: at most so many forget-critical experts over all layers; null for no such limit.
        min_count: an expert qualifies when at least so many forget tokens activate it.
        min_ess: the least effective sample size of the weights, as a share of the retain tokens.
        max_weight: the largest weight; the mean is 1.
        ridge: how much mismatch "balance" trades for even weights when the bounds allow everything.
        show_tokens: print what the weights fall on: the mean weight by kind of token, and so many of the retain
            documents and tokens with the largest weights; reads the retain data again.
    """

    profile: str = "profile"
    output: str = "calibration"
    rule: str = "balance"
    unit: str = DEFAULT_UNIT
    experts_per_layer: int | None = 4
    tau: float = 1.0
    rank: str = "log_ratio"
    threshold: float | None = None
    max_experts: int | None = None
    min_count: int = 5
    min_ess: float = 0.5
    max_weight: float = 20.0
    ridge: float = 1e-6
    show_tokens: int = 0


def check(options: CalibrateOptions) -> None:
    """UserError for what can be told from the options alone."""
    check_settings(options.rule, options.unit, options.min_ess, options.max_weight, options.ridge)
    Selection(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Selection)})
    check_integers(options, show_tokens=0)


def main(options: CalibrateOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb: reads the statistics, calibrates, prints the outcome, writes the folder `options.output`."""
    check(options)
    files.refuse_existing(options.output)
    say(f"calibrate: {options.profile}, rule {options.rule} -> {options.output}")
    settings = dataclasses.asdict(options)
    stats = RoutingStatistics.load(settings.pop("profile"))
    found = calibrate(stats, **{k: v for k, v in settings.items() if k not in ("output", "show_tokens")})
    say(found.summary())
    found.save(options.output)
    say(f"written to {options.output}")
    if options.show_tokens:  # last: the retain data may be gone by now, and the weights are not to go with it
        shown = heaviest_of_profile(found, stats.meta, options.show_tokens)
        say(table_of_kinds(shown.kinds))
        head = f"the {len(shown.documents)} retain documents with the largest mean weights:"
        say("\n".join([head, *map(str, shown.documents)]))
        head = f"the {len(shown.tokens)} retain tokens with the largest weights, in brackets:"
        say("\n".join([head, *map(str, shown.tokens)]))
