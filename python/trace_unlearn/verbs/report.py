"""The verb `report`: one self-contained HTML page and PNG plots about a run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trace_unlearn.checks import check_integers
from trace_unlearn.errors import UserError
from trace_unlearn.reporting.report import footer, report_run

MAKES = "report.html"
PLACES = ("run", "output")


@dataclass
class ReportOptions:
    """Writes report.html, one self-contained page, and its plots as PNG files about a run folder.

    Args:
        run: the run folder, with what the verbs wrote into it: profile/, calibration/, model/, metrics.json,
            attacks.json. What is not there yet is left out of the page.
        output: where to write; by default the run folder itself.
        show_tokens: show so many of the retain tokens with the largest weights, in their context; reads the retain
            data again. 0 for none.
    """

    run: str
    output: str | None = None
    show_tokens: int = 10


def report(run: str | Path, output: str | Path | None = None, *, show_tokens: int = 10) -> Path:
    """Writes report.html and its plots about a run folder; returns the page's path. See `ReportOptions`."""
    main(ReportOptions(str(run), None if output is None else str(output), show_tokens), say=lambda message: None)
    return Path(run if output is None else output) / "report.html"


def main(options: ReportOptions, say: Callable[[str], None] = print) -> None:
    """Runs the verb."""
    folder = Path(options.run)
    output = Path(options.output) if options.output else folder
    if not folder.is_dir():
        raise UserError(f"run: {folder} is not a folder")
    check_integers(options, show_tokens=0)
    say(f"report: {folder} -> {output / 'report.html'}")
    page = report_run(folder, options.show_tokens)
    say(f"wrote {page.write(output, footer=footer())}")
