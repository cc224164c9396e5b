"""The command line of the study."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

from studies import method_study
from studies.method_study.cells import QUICK, SECTIONS, ordered
from trace_unlearn.demo.workers import Task, TaskBar, run_tasks
from trace_unlearn.errors import UserError
from trace_unlearn.files import read_json, write_json, write_text
from trace_unlearn.verbs.lock import alone

MARKER = "sizes.json"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.method_study",
        description=method_study.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/method_study"))
    parser.add_argument("--models", type=int, help="independently pre-trained models; 12, or 2 with --quick")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), help="sections; all, or a few with --quick")
    parser.add_argument("--quick", action="store_true", help="two models, shorter, a few arms: shows that it works")
    parser.add_argument("--report-only", action="store_true", help="no computation: the tables of what is there")
    parser.add_argument(
        "--publish",
        type=Path,
        help="a page of docs/ whose tables, figure and record to bring up to date; what had more models there stays",
    )
    options = parser.parse_args(arguments)
    options.models = options.models or (2 if options.quick else 12)
    options.only = options.only or list(QUICK if options.quick else SECTIONS)
    if options.models < 1 or options.jobs < 1:
        parser.error("--models and --jobs: allowed are numbers from 1")
    return options


def tasks_of(options: argparse.Namespace) -> list[Task]:
    """What is missing in the output folder, in the study's order."""
    from studies.method_study import work

    sizes = work.default_sizes(options.quick)
    return work.arm_tasks(options.output, ordered(options.only, options.models), lambda arm: sizes[arm.corpus])


def _claim(options: argparse.Namespace) -> None:
    """A folder holds models and arms of one size only."""
    from studies.method_study.work import default_sizes

    for corpus, sizes in default_sizes(options.quick).items():
        marker = options.output / corpus / MARKER
        made_with = dataclasses.asdict(sizes)
        if marker.is_file() and read_json(marker) != made_with:
            raise UserError(f"--output: {options.output} holds a study with other sizes; give another folder")
        if not marker.is_file() and any(arm.corpus == corpus for section in options.only for arm in SECTIONS[section]):
            write_json(marker, made_with)


def _report(options: argparse.Namespace) -> None:
    """results.json, results.md and results.png in the output folder, and what --publish asks for."""
    import torch

    from benchmarks.machine import describe
    from studies.method_study.figure import draw
    from studies.method_study.merge import merged
    from studies.method_study.report import markdown, publish, sentences
    from studies.method_study.results import collect, read_runs

    runs = read_runs(options.output, options.models)
    if not runs:
        raise UserError(f"--output: {options.output} holds no finished arm")
    results = collect(runs, options.models, describe(torch.device("cpu")))
    if options.publish is not None and (known := options.publish.with_suffix(".json")).is_file():
        results = merged(results, read_json(known))
    record = json.dumps(results) + "\n"
    write_text(options.output / "results.json", record)
    write_text(options.output / "results.md", markdown(results))
    draw(results, options.output / "results.png")
    print("\n".join(sentences(results)))
    print(f"{len(runs)} arms of {options.models} models; tables and figure: {options.output}/results.*")
    if options.publish is not None:
        write_text(options.publish, publish(options.publish.read_text(), markdown(results)))
        for kind in ("json", "png"):
            shutil.copy(options.output / f"results.{kind}", options.publish.with_suffix(f".{kind}"))


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if not options.report_only:
            _claim(options)
            with alone(options.output):
                from studies.method_study.worlds import shared_text

                tasks = tasks_of(options)
                print(
                    f"{len(tasks)} tasks, about {sum(t.cost for t in tasks) / options.jobs / 60:.0f} minutes",
                    flush=True,
                )
                if any(task.name.startswith("manuals") for task in tasks):
                    shared_text(options.output / "manuals")  # here, and not by several processes at once
                with TaskBar(tasks) as on_progress:
                    run_tasks(tasks, options.jobs, on_progress)
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
