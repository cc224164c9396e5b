"""The command line of the study."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

from studies import units
from studies.method_study.cells import UNIFORM, Arm
from studies.method_study.work import arm_tasks, model_folder
from studies.method_study.worlds import SIZES, Sizes
from studies.units.arms import check_text, restore
from studies.units.cells import RANGES, SEEDS, ordered
from trace_unlearn.demo.workers import TaskBar, run_tasks
from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json, write_json, write_text
from trace_unlearn.verbs.lock import alone

MARKER = "sizes.json"
ARMS = "arms"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.units",
        description=units.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/units"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--corpus", choices=list(SIZES), nargs="+", default=list(SIZES), help="only these")
    parser.add_argument("--seeds", type=int, choices=SEEDS, nargs="+", default=list(SEEDS), help="only these models")
    parser.add_argument("--uniform-only", action="store_true", help="only the arms whose weights are all 1")
    parser.add_argument("--report-only", action="store_true", help="no computation: the tables of what is there")
    parser.add_argument(
        "--publish",
        type=Path,
        help="go on from the arms in this folder, and bring its arms, tables, figure and record up to date",
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error("--jobs: allowed are numbers from 1")
    return options


def sizes_of(arm: Arm) -> Sizes:
    """Facts: every step is recorded once forget NLL passes 0.1. Manuals: slow arms are recorded half as often."""
    sizes = SIZES[arm.corpus]
    change: dict[str, float] = {"every_step_from_nll": 0.1} if arm.corpus == "facts" else {}
    if arm.corpus == "manuals" and arm.retain_weight >= 16:
        change = {"evaluate_every": 8}
    recipe = dataclasses.replace(sizes.recipe, **change)  # type: ignore[arg-type]
    return dataclasses.replace(sizes, recipe=recipe, forget_rise=RANGES[arm.corpus][1])


def _claim(output: Path) -> None:
    """A folder holds models and arms of one size only."""
    made_with = {corpus: dataclasses.asdict(sizes_of(Arm(corpus=corpus))) for corpus in SIZES}
    marker = output / MARKER
    if marker.is_file() and read_json(marker) != made_with:
        raise UserError(f"--output: {output} holds a study with other sizes; give another folder")
    if not marker.is_file():
        write_json(marker, made_with)


def _run(options: argparse.Namespace) -> None:
    from studies.method_study.worlds import shared_text

    cells = [
        (seed, arm)
        for seed, arm in ordered()
        if arm.corpus in options.corpus
        and seed in options.seeds
        and (arm.weights == UNIFORM or not options.uniform_only)
    ]
    tasks = arm_tasks(options.output, cells, sizes_of)
    seconds = sum(task.cost for task in tasks) / options.jobs
    print(f"{len(tasks)} tasks, about {seconds / 60:.0f} minutes", flush=True)
    if any(task.name.startswith("manuals") for task in tasks):
        shared_text(options.output / "manuals")  # here, and not by several processes at once
        if options.publish is not None:
            check_text(options.publish / ARMS, options.output)
    with TaskBar(tasks) as on_progress:
        run_tasks(tasks, options.jobs, on_progress)


def _report(options: argparse.Namespace) -> None:
    """results.json, results.md and frontier.png, in the output folder or the one to publish in."""
    import torch

    from benchmarks.machine import describe
    from studies.units.arms import keep
    from studies.units.figure import draw
    from studies.units.report import markdown
    from studies.units.results import collect, read_runs

    runs = read_runs(options.output)
    if not runs:
        raise UserError(f"--output: {options.output} holds no finished arm")
    results = collect(runs, describe(torch.device("cpu")))
    folder = options.publish or options.output
    keep(runs, folder / ARMS, options.output)
    write_text(folder / "results.json", json.dumps(results) + "\n")
    write_text(folder / "results.md", f"# Results\n\n{markdown(results)}")
    draw(results, folder / "frontier.png")
    print(f"{len(runs)} arms; tables and figure: {folder}")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.publish is not None and (laid := restore(options.publish / ARMS, options.output)):
            print(f"{laid} finished arms from {options.publish / ARMS}", flush=True)
        if not options.report_only:
            with contextlib.ExitStack() as stack:
                for corpus in options.corpus:
                    for seed in options.seeds:  # other commands may be at work on other models
                        folder = model_folder(options.output, corpus, seed)
                        folder.mkdir(parents=True, exist_ok=True)
                        stack.enter_context(alone(folder))
                _claim(options.output)
                _run(options)
        _report(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
