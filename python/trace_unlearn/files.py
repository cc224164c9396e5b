"""Files that are either old or new, never half-written.

A file is written under a hidden temporary name in its own folder, flushed to the disk and renamed into place; a
folder is built in a hidden sibling and renamed. A killed process leaves at most such a temporary name; the next writer
of the same path removes it once that process is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trace_unlearn.errors import UserError

PathLike = str | os.PathLike[str]
HASHED_BYTES = 1 << 30  # of larger files, the size and the time of change stand for the content


def write_json(path: PathLike, value: Any) -> None:
    """Writes `value` as indented UTF-8 JSON, atomically.

    Dataclasses become objects, paths strings, tensors and numpy values lists or numbers. JSON has no NaN and no
    infinity: they become null.

    >>> import tempfile; folder = tempfile.mkdtemp()
    >>> write_json(folder + "/metrics.json", {"nll": 1.5, "broken": float("nan")})
    >>> read_json(folder + "/metrics.json")
    {'nll': 1.5, 'broken': None}
    """
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: PathLike) -> Any:
    """Reads a JSON file; UserError names the file, and the line and column of a syntax error."""
    with explained(path, "read"):
        raw = Path(path).read_bytes()
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): a JSON file is expected") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error


def check_made_by(verb: str, folder: PathLike, meta: str) -> None:
    """UserError unless `folder` holds `meta`, which the verb writes; it names a folder inside that does.

    >>> import tempfile; run = Path(tempfile.mkdtemp())
    >>> write_json(run / "profile" / "routing.json", {})
    >>> check_made_by("profile", run / "profile", "routing.json")
    >>> check_made_by("profile", run, "routing.json")
    Traceback (most recent call last):
    trace_unlearn.errors.UserError: ...: no routing.json there, so not written by ...; did you mean .../profile?
    """
    folder = Path(folder)
    if (folder / meta).is_file():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; `trace-unlearn {verb}` writes one")
    near = sorted(inner.parent for inner in folder.glob(f"*/{meta}"))
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{folder}: no {meta} there, so not written by `trace-unlearn {verb}`{hint}")


def write_text(path: PathLike, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def save_tensors(
    path: PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a .safetensors file atomically; tensors may be views, strided, or on any device."""
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with staged_file(path) as temporary:
        save_file(copies, temporary, metadata=dict(metadata) if metadata else None)


def load_tensors(path: PathLike) -> dict[str, torch.Tensor]:
    """Reads all tensors of a .safetensors file onto the CPU."""
    with explained(path, "read"):
        if Path(path).is_dir():
            raise IsADirectoryError(21, "is a directory", str(path))
        Path(path).open("rb").close()
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error


def at_home(value: Any) -> Any:
    """`value`, and what an options class, list or mapping holds, with a leading ~ expanded in every string.

    A shell does it for words of their own only: not in YAML, nor after --output=.

    >>> at_home({"output": "~/run"})["output"] == os.path.expanduser("~/run")
    True
    """
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if isinstance(value, list):
        return [at_home(item) for item in value]
    if isinstance(value, dict):
        return {key: at_home(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{field.name: at_home(getattr(value, field.name)) for field in dataclasses.fields(value)}
        )
    return value


def refuse_existing(path: PathLike) -> None:
    """UserError when something is at `path`, or nothing can be made there; an empty folder may be there."""
    path = Path(path)
    _check_place(path)
    if not os.path.lexists(path):
        return
    if path.is_dir():
        with explained(path, "read"):
            if not any(path.iterdir()):
                return
        raise UserError(f"{path}: the folder exists and is not empty; name another one or remove it")
    raise UserError(f"{path}: exists already; name another path or remove it")


def _check_place(path: Path) -> None:
    folder = Path(os.path.abspath(path)).parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{path}: cannot be made: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be made: {folder} is not writable")


def digest_of(source: str, argument: str) -> str:
    """Identifies a file's or folder's content; a hub name stands for itself.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(source)
    try:
        if path.is_file():
            return _digest_file(path)
        if path.is_dir():
            names = sorted(item for item in path.rglob("*") if item.is_file())
            whole = hashlib.sha256()
            for item in names:
                whole.update(f"{item.relative_to(path)}\0{_digest_file(item)}\n".encode())
            return whole.hexdigest()
    except OSError as error:
        raise UserError(f"{argument}: cannot read {source}: {error.strerror or error}") from error
    return f"hub:{source}"


def _digest_file(path: Path) -> str:
    status = path.stat()
    if status.st_size > HASHED_BYTES:
        return f"{status.st_size} bytes, changed {status.st_mtime_ns}"
    with path.open("rb") as file:
        whole = hashlib.sha256()
        while chunk := file.read(1 << 20):
            whole.update(chunk)
    return whole.hexdigest()


@contextlib.contextmanager
def staged_file(path: PathLike) -> Iterator[Path]:
    """Yields a temporary path to write to; on success it replaces `path` in one step, on any failure it is removed.

    >>> import tempfile; target = Path(tempfile.mkdtemp()) / "plot.txt"
    >>> with staged_file(target) as temporary:
    ...     _ = temporary.write_text("all of it")
    ...     target.exists()
    False
    >>> target.read_text()
    'all of it'
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        with explained(path, "write"):
            if path.is_dir():
                raise IsADirectoryError(21, "a folder of this name is in the way", str(path))
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write it: {getattr(error, 'strerror', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def staged_folder(path: PathLike) -> Iterator[Path]:
    """Yields an empty hidden folder to fill; on success it becomes `path` in one step, on failure it is removed.

    What is at `path` already, an empty folder apart, is refused before and after the work (UserError).

    >>> import tempfile; target = Path(tempfile.mkdtemp()) / "profile"
    >>> with staged_folder(target) as temporary:
    ...     write_json(temporary / "routing.json", {"layers": 2})
    ...     target.exists()
    False
    >>> read_json(target / "routing.json")
    {'layers': 2}
    """
    path = Path(path)
    refuse_existing(path)
    temporary = _temporary(path)
    with explained(path, "write"):
        temporary.mkdir()
    try:
        yield temporary
        refuse_existing(path)
        with explained(path, "write"):
            for item in temporary.rglob("*"):
                _flush(item)
            os.rename(temporary, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A fresh hidden name beside `path`, whose folder is made; removes what dead writers on this host left."""
    with explained(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        host = re.sub(r"\W", "_", socket.gethostname())
        ours = re.compile(re.escape(f".{path.name}.{host}.") + r"(\d+)\.[0-9a-f]{8}\.partial")
        for leftover in path.parent.glob(f".*.{host}.*.partial"):
            match = ours.fullmatch(leftover.name)
            if match and not _alive(int(match[1])):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return path.parent / f".{path.name}.{host}.{os.getpid()}.{secrets.token_hex(4)}.partial"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(path: PathLike, verb: str) -> Iterator[None]:
    """Makes an OSError a UserError that says what could not be done with `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot {verb} it: {error.strerror or error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy arrays and scalars, torch tensors
        return _plain(value.tolist())
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise TypeError(f"cannot write a {type(value).__name__} as JSON")
