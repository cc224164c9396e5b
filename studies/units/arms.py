"""The finished arms as they are kept beside the tables: one file per model, one line per arm.

    {"seed": 12, "arm": {...}, "diverged": "", "calibration": {...}, "columns": ["step", ...], "rows": [[0, ...], ...]}

So another machine goes on where this one stopped, and anyone can make the tables again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies.method_study.cells import Arm
from studies.method_study.work import arm_file
from trace_unlearn.errors import UserError
from trace_unlearn.files import write_json, write_text

TEXT = "manuals-text.sha256"


def keep(runs: Mapping[tuple[int, Arm], Mapping[str, Any]], folder: Path, output: Path) -> None:
    """Writes the finished arms, in the order of the protocol."""
    files: dict[str, list[str]] = {}
    for (seed, arm), run in runs.items():
        columns = list(run["curve"][0])
        rows = [[point[column] for column in columns] for point in run["curve"]]
        line = {**{key: value for key, value in run.items() if key != "curve"}, "columns": columns, "rows": rows}
        files.setdefault(f"{arm.corpus}-{seed}", []).append(json.dumps(line, separators=(",", ":")))
    if any(arm.corpus == "manuals" for _, arm in runs) and (text := text_digest(output)):
        write_text(folder / TEXT, text + "\n")
    for name, lines in files.items():
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


def text_digest(output: Path) -> str:
    """Of the text of "manuals", which is what this machine has installed; empty before it was gathered."""
    windows = output / "manuals" / "text" / "windows.json"
    return hashlib.sha256(windows.read_bytes()).hexdigest() if windows.is_file() else ""


def check_text(folder: Path, output: Path) -> None:
    """Arms are compared in pairs, so all of them must be of one text."""
    if (folder / TEXT).is_file() and (folder / TEXT).read_text(encoding="utf-8").strip() != text_digest(output):
        raise UserError(
            f"--publish: the arms of manuals in {folder} are of other text than this machine has installed; "
            "give another folder, or --corpus facts"
        )


def restore(folder: Path, output: Path) -> int:
    """Lays the kept arms where the study looks for finished ones, unless they are there. Returns how many it laid."""
    laid = 0
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            columns, rows = run.pop("columns"), run.pop("rows")
            run["curve"] = [dict(zip(columns, row, strict=True)) for row in rows]
            target = arm_file(output, run["seed"], Arm(**run["arm"]))
            if not target.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                write_json(target, run)
                laid += 1
    return laid
