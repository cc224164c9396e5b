"""From the files of finished arms to the study's record: every contrast with its values by model."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from studies.method_study.cells import ORACLE, SHUFFLED, UNIFORM, Arm
from studies.method_study.results import plain
from studies.method_study.statistics import Curve, Difference, View, at_equal, holm
from studies.method_study.work import arm_file
from studies.units.cells import RANGES, SEEDS, ordered
from studies.units.contrasts import CONTRASTS, FRONTIER, Contrast
from trace_unlearn.files import read_json

GROUPS = ("A", "N", "R")
MEASURES = tuple(f"{group}_{measure}" for group in GROUPS for measure in ("accuracy", "nll"))
LEAST_KNOWN = 0.95  # of the facts of every group, before unlearning
Runs = Mapping[tuple[int, Arm], Mapping[str, Any]]


def view(corpus: str) -> View:
    return View("F_nll", *RANGES[corpus])


def read_runs(output: Path) -> dict[tuple[int, Arm], dict[str, Any]]:
    """What has finished."""
    paths = {cell: arm_file(output, *cell) for cell in ordered()}
    return {cell: read_json(path) for cell, path in paths.items() if path.is_file()}


def unknowing(runs: Runs) -> list[int]:
    """The seeds whose model of facts does not know them well enough."""
    seeds = set()
    for (seed, arm), run in runs.items():
        start = run["curve"][0]
        if arm.corpus == "facts" and min(start[f"{group}_accuracy"] for group in (*GROUPS, "F")) < LEAST_KNOWN:
            seeds.add(seed)
    return sorted(seeds)


def collect(runs: Runs, machine: Mapping[str, str]) -> dict[str, Any]:
    """The record, in what JSON can hold: None for what does not exist."""
    left_out = unknowing(runs)
    kept = {(s, a): run for (s, a), run in runs.items() if a.corpus != "facts" or s not in left_out}
    contrasts = [_contrast(c, kept) for c in CONTRASTS]
    record = {
        "machine": dict(machine),
        "arms": len(runs),
        "planned": sum(1 for _ in ordered()),
        "contrasts": [c for c in contrasts if any(d["n"] for d in c["differences"].values())],
        "frontier": {name: _frontier(lines, kept) for name, lines in FRONTIER.items()},
        "calibrations": _calibrations(kept),
        "unknowing": left_out,
        "diverged": sorted(f"{label(arm)}, model {seed}" for (seed, arm), run in runs.items() if run["diverged"]),
    }
    _correct(record["contrasts"])
    found: dict[str, Any] = plain(record)
    return found


def _contrast(contrast: Contrast, runs: Runs) -> dict[str, Any]:
    corpus = contrast.arm.corpus
    pairs = {
        seed: (runs[seed, contrast.arm]["curve"], runs[seed, contrast.against]["curve"])
        for seed in SEEDS
        if (seed, contrast.arm) in runs and (seed, contrast.against) in runs
    }
    found = {
        "arm": label(contrast.arm),
        "against": label(contrast.against),
        "corpus": corpus,
        "families": {family: list(measures) for family, measures in contrast.families},
        "seeds": list(pairs),
        "differences": _differences(pairs, view(corpus)),
    }
    found["too_short"] = [seed for seed, pair in pairs.items() if view(corpus).levels(pair) is None]
    return found


def _differences(pairs: Mapping[int, tuple[Curve, Curve]], held: View) -> dict[str, Any]:
    found = {}
    for measure in (*MEASURES, "step"):
        difference = Difference.of([round(held.difference(*pair, measure), 5) for pair in pairs.values()])
        found[measure] = {
            **dataclasses.asdict(difference),
            "n": difference.n,
            "interval": difference.interval,
            "smallest": difference.smallest,
        }
    return found


def _correct(contrasts: list[dict[str, Any]]) -> None:
    """Adds Holm's p to every tested difference, over its whole family: a test that has no arms yet counts as p = 1."""
    planned = Counter(family for c in CONTRASTS for family, measures in c.families for _ in measures)
    families: dict[str, list[dict[str, Any]]] = {}
    for contrast in contrasts:
        for family, measures in contrast["families"].items():
            families.setdefault(family, []).extend(contrast["differences"][measure] for measure in measures)
    for family, members in families.items():
        p = [1.0 if math.isnan(member["p"]) else member["p"] for member in members]
        adjusted = holm([*p, *[1.0] * (planned[family] - len(p))])
        for member, value in zip(members, adjusted[: len(members)], strict=True):
            member["adjusted"] = value


def _frontier(lines: Mapping[str, list[Arm]], runs: Runs) -> dict[str, Any]:
    """What every arm keeps at equal forgetting, over the models that all arms of the panel have."""
    done = [arm for arms in lines.values() for arm in arms if any((seed, arm) in runs for seed in SEEDS)]
    seeds = [seed for seed in SEEDS if done and all((seed, arm) in runs for arm in done)]
    points = [
        {"line": line, "retain_weight": arm.retain_weight, **_kept(arm, seeds, runs)}
        for line, arms in lines.items()
        for arm in arms
        if arm in done and seeds
    ]
    return {"seeds": seeds, "points": points}


def _kept(arm: Arm, seeds: list[int], runs: Runs) -> dict[str, float | None]:
    curves = [runs[seed, arm]["curve"] for seed in seeds]
    held, middle = view(arm.corpus), sum(RANGES[arm.corpus]) / 2
    kept = {measure: _mean([held.value(curve, measure) for curve in curves]) for measure in MEASURES}
    steps = [float(at_equal(c, "F_nll", np.array([c[0]["F_nll"] + middle]), "step")[0]) for c in curves]
    return {**kept, "steps": _mean(steps)}


def _calibrations(runs: Runs) -> list[dict[str, Any]]:
    """By arm, the means over its models."""
    found = []
    for arm in dict.fromkeys(arm for _, arm in ordered()):
        known = [runs[seed, arm]["calibration"] for seed in SEEDS if "calibration" in runs.get((seed, arm), {})]
        if known:
            means = {key: _mean([math.nan if c[key] is None else c[key] for c in known]) for key in known[0]}
            found.append({"arm": label(arm), "n": len(known), **means})
    return found


def _mean(values: list[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return round(float(np.mean(known)), 4) if known else None


def label(arm: Arm) -> str:
    """In words."""
    kind = {UNIFORM: "uniform", SHUFFLED: "shuffled", ORACLE: "oracle"}.get(arm.weights)
    if kind is None:
        kind = "other domain" if arm.forget_from == "other" else "mild" if arm.as_heavy_as else arm.unit
    objective = "NPO" if arm.objective == "npo" else "GradDiff"
    experts = ", experts only" if arm.trained == "experts" else ""
    return f"{kind}, {arm.corpus}, {objective} at {arm.retain_weight:g}{experts}"
