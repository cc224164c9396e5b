"""Training checkpoints that are complete or do not count: the marker is written last and removed first."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from trace_unlearn.files import write_json

MARKER = "complete.json"


def mark_complete(folder: Path) -> None:
    """Everything is written."""
    write_json(folder / MARKER, {"step": _step(folder)})


def is_complete(folder: Path) -> bool:
    return (folder / MARKER).exists()


def remove(folder: Path) -> None:
    """Removes a checkpoint; one that a kill leaves half-removed does not count."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def last_complete(run: Path, *, remove_partial: bool = False) -> Path | None:
    """The complete checkpoint of the highest step in this folder, or None."""
    found = _checkpoints(run)
    if remove_partial:
        for folder in found:
            if not is_complete(folder):
                remove(folder)
    return next((folder for folder in reversed(found) if is_complete(folder)), None)


def rotate(run: Path, limit: int | None, keep: str | None) -> None:
    """Removes the oldest complete checkpoints beyond `limit`, never `keep`."""
    if not limit or limit < 0:
        return
    complete = [folder for folder in _checkpoints(run) if is_complete(folder)]
    for folder in complete[:-limit]:
        if keep is None or folder.resolve() != Path(keep).resolve():
            remove(folder)


def _checkpoints(run: Path) -> list[Path]:
    """In the order of their steps."""
    return sorted((folder for folder in run.glob("checkpoint-*") if _step(folder) >= 0), key=_step)


def _step(folder: Path) -> int:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1
