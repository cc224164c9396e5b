"""The verb `demo`: TRACE end to end on tiny models that it makes itself, and what it bought, with its noise."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trace_unlearn.errors import UserError
from trace_unlearn.verbs.lock import alone

if TYPE_CHECKING:
    from trace_unlearn.demo.results import Results
    from trace_unlearn.demo.unlearn import Recipe
    from trace_unlearn.demo.workers import Task

OBJECTIVES = ("grad_diff", "npo", "wga", "ce_u")  # that forget far enough to be compared, and weigh the retain loss
STRONG_MODELS = 3  # of the arm with a larger retain weight, whose difference is plain to see
MARKER = "demo.json"  # says that a folder is ours, and what it was made with


@dataclass
class DemoOptions:
    """Shows TRACE on tiny Mixture-of-Experts models that it pre-trains itself on generated facts; no downloads, no GPU.

    A finished demo in the output folder is shown again, an interrupted one goes on, and more models or another
    objective are added to it.

    Args:
        output: the folder for models, results and report.html.
        quick: one model in about a minute. It cannot tell a gain from noise.
        models: how many independent models (other facts, other initial weights); 6, or 1 with --quick.
        seed: of the first model; the others follow it.
        objective: "grad_diff" (gradient ascent on the forget set), "npo", "wga" or "ce_u".
        workers: processes, one thread each; by default one per core.
        overwrite: replace what an earlier demo left in the output folder.
    """

    output: str = "runs/demo"
    quick: bool = False
    models: int | None = None
    seed: int = 0
    objective: str = "grad_diff"
    workers: int | None = None
    overwrite: bool = False


def main(options: DemoOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb."""
    from trace_unlearn.demo.unlearn import Recipe

    run_demo(options, Recipe(), say)


def run_demo(options: DemoOptions, recipe: Recipe, say: Callable[[str], None] = print) -> Results:
    """Do what is missing in the output folder, print the results and write the report; returns the results."""
    from trace_unlearn.demo.compare import STRONG
    from trace_unlearn.demo.results import collect, explain, write_report
    from trace_unlearn.demo.unlearn import ARMS
    from trace_unlearn.demo.workers import TaskBar, run_tasks

    models = _checked(options)
    output = Path(options.output)
    seeds = range(options.seed, options.seed + models)
    folders = {seed: output / f"model-{seed}" for seed in seeds}
    strong = () if options.quick else seeds[:STRONG_MODELS]
    arms = {seed: (*ARMS, STRONG) if seed in strong else ARMS for seed in seeds}
    started = time.monotonic()
    _claim(output, recipe, options.overwrite)
    with alone(output):
        tasks = _missing(folders, options.objective, arms, recipe)
        workers = min(options.workers or os.cpu_count() or 1, max(len(tasks), 1))
        _announce(say, options, len(folders), tasks, workers)
        with TaskBar(tasks) as on_progress:
            run_tasks(tasks, workers, on_progress)
        results = collect(folders, options.objective, arms, recipe)
        explain(results, say)
        page = write_report(output, results)
    say(f"\nReport: {page}    ({time.monotonic() - started:.0f} s)")
    return results


def _missing(
    folders: Mapping[int, Path], objective: str, arms: Mapping[int, Sequence[str]], recipe: Recipe
) -> list[Task]:
    """The work whose products are not there."""
    from trace_unlearn.demo.unlearn import prepare, unlearn
    from trace_unlearn.demo.workers import Task

    tasks = []
    for seed, folder in folders.items():
        name = f"model {seed}"
        if not (folder / "calibration").is_dir():
            tasks.append(Task(name, prepare, (folder, seed, recipe), cost=0.03 * recipe.pretrain.steps + 4))
        tasks += [
            Task(
                f"{name}, {arm}",
                unlearn,
                (folder, seed, objective, arm, recipe),
                after=(name,),
                cost=0.08 * recipe.unlearn_steps,
            )
            for arm in arms[seed]
            if not (folder / objective / arm).is_dir()
        ]
    return tasks


def _checked(options: DemoOptions) -> int:
    """The number of models.

    Raises:
        UserError: an option out of range.
    """
    models = options.models if options.models is not None else 1 if options.quick else 6
    if models < 1:
        raise UserError(f"--models: got {models}, allowed are numbers from 1")
    if options.seed < 0:
        raise UserError(f"--seed: got {options.seed}, allowed are numbers from 0")
    if options.workers is not None and options.workers < 1:
        raise UserError(f"--workers: got {options.workers}, allowed are numbers from 1")
    if options.objective not in OBJECTIVES:
        raise UserError(f"--objective: got {options.objective!r}, allowed are {', '.join(OBJECTIVES)}")
    return models


def _claim(output: Path, recipe: Recipe, overwrite: bool) -> None:
    """Make the folder ours, or see that it is, made with the same recipe."""
    import trace_kernels
    from trace_unlearn.files import read_json, refuse_existing, write_json

    made_with = {"demo": trace_kernels.__version__, "recipe": dataclasses.asdict(recipe)}
    marker = output / MARKER
    if overwrite and marker.is_file():
        old = output.with_name(f".{output.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)  # gone in one step, however long the removal takes
        shutil.rmtree(old)
    if marker.is_file():
        if read_json(marker) != made_with:
            raise UserError(
                f"--output: {output} holds a demo of another version; give --overwrite to replace it, or "
                "another --output"
            )
        return
    refuse_existing(output)
    write_json(marker, made_with)


def _announce(
    say: Callable[[str], None], options: DemoOptions, models: int, tasks: Sequence[Task], workers: int
) -> None:
    plural = "s" if models > 1 else ""
    say(
        f"demo: {models} tiny Mixture-of-Experts model{plural}, pre-trained on invented facts, then made to forget some"
        f" of them\n      by {options.objective} with uniform retain weights, with TRACE's, and with TRACE's shuffled "
        f"over the documents (control).\n      Output: {options.output}"
    )
    if not tasks:
        say("      All of it is there already; here are its results. --overwrite makes it anew.")
        return
    seconds = sum(task.cost for task in tasks) / workers + 10
    say(f"      {len(tasks)} tasks for {workers} processes, about {seconds / 60:.1f} minutes on a free machine.")
