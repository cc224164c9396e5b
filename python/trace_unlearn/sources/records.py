"""Reads records (plain strings or JSON objects) from files and from the hub, each with the place where it stands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trace_unlearn.errors import UserError

SUFFIXES = (".jsonl", ".json", ".txt", ".parquet")
ALLOWED = (
    f"a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, or the name of a data set on the hub, owner/name[:config]"
)
CONVERT = "in Python: pandas.{reader}.to_json('{stem}.jsonl', orient='records', lines=True)"
_TABLES = {
    ".csv": "read_csv('{name}')",
    ".tsv": "read_csv('{name}', sep='\\t')",
    ".xlsx": "read_excel('{name}')",
    ".xls": "read_excel('{name}')",
}
HUB_NAME = re.compile(r"(?P<name>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<config>[\w.,=-]+))?")


class Record(NamedTuple):
    """A record and where it stands, for messages: "forget.jsonl: line 3"."""

    where: str
    value: Any


def read_records(source: str | os.PathLike[str], *, split: str = "train") -> Iterator[Record]:
    """Yields the records of a file or of a data set on the hub, lazily.

    .jsonl holds one JSON value a line, .json a list of values (or one value; JSON lines under this name are read too),
    .txt one document, .parquet and hub data one record a row. Raises UserError, at once or while reading, for whatever
    cannot be read: no such file, a folder, an empty file, another suffix, text that is not UTF-8, malformed JSON (with
    line and column), a damaged parquet file, and every failure of the hub, being offline included.
    """
    path, with_hub = _resolved(source)
    return _reader(path)(path) if with_hub is None else _hub(with_hub["name"], with_hub["config"], split)


def check_source(source: str | os.PathLike[str]) -> None:
    """UserError where `read_records` would refuse a file before it reads it; a hub name is not asked for."""
    path, with_hub = _resolved(source)
    if with_hub is None:
        _reader(path)


def _resolved(source: str | os.PathLike[str]) -> tuple[Path, re.Match[str] | None]:
    """As a path, and as a hub name where it means one."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    is_file = os.path.lexists(path) or path.suffix.lower() in SUFFIXES
    return path, None if is_file else HUB_NAME.fullmatch(name)


def _reader(path: Path) -> Callable[[Path], Iterator[Record]]:
    if path.is_dir():
        inside = sorted(item.name for item in path.iterdir() if item.suffix.lower() in SUFFIXES)[:5]
        hint = f" (it holds {', '.join(inside)})" if inside else ""
        raise UserError(f"{path}: a folder; name one file{hint}")
    if not path.exists():
        raise UserError(f"{path}: no such file; give {ALLOWED}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        reader = _TABLES.get(suffix, "").format(name=path.name)
        hint = f" ({CONVERT.format(reader=reader, stem=path.stem)})" if reader else ""
        raise UserError(f"{path}: cannot read {suffix or 'a file without a suffix'}; give {ALLOWED}{hint}")
    if path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    return {".jsonl": _json_lines, ".json": _json, ".txt": _text, ".parquet": _parquet}[suffix]


def _json_lines(path: Path) -> Iterator[Record]:
    try:
        with path.open("rb") as lines:  # bytes, so that only a line feed ends a line, not U+2028
            for number, raw in enumerate(lines, 1):
                line = _decode(raw, path, number).rstrip("\r\n")
                if not line.strip():
                    continue
                value = _parse(line, path, number)
                if isinstance(value, list):
                    raise UserError(
                        f"{path}: line {number}: a list; in .jsonl each line is one record "
                        "(a file that is one list is a .json file)"
                    )
                yield Record(f"{path}: line {number}", value)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}") from error


def _json(path: Path) -> Iterator[Record]:
    text = _whole_text(path)
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except _TwiceError as error:
        raise UserError(f"{path}: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and _ends_a_line(text, error.pos):
            yield from _json_lines(path)
            return
        raise _malformed(error, path, 1) from error
    if not isinstance(value, list):
        yield Record(str(path), value)
        return
    for number, item in enumerate(value, 1):
        yield Record(f"{path}: item {number}", item)


def _text(path: Path) -> Iterator[Record]:
    text = _whole_text(path)
    if "\0" in text:
        raise UserError(
            f"{path}: line {text.count(chr(10), 0, text.index(chr(0))) + 1}: holds a NUL byte: not a text file"
        )
    yield Record(str(path), text)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}: row {number}", value)
    except (pyarrow.ArrowException, OSError) as error:
        after = f" after row {number}" if number else ""
        raise UserError(f"{path}: not a readable parquet file{after}: {error}") from error


def _hub(name: str, config: str | None, split: str) -> Iterator[Record]:
    from trace_unlearn.sources.hub import load_dataset

    label = f"{name}:{config}" if config else name
    try:
        data = load_dataset(name, config, split)
    except Exception as error:  # every failure here is about a name, a network or foreign data
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{label}: no such file, and the hub gave no data set of this name with the split {split!r}: {reason}"
        ) from error
    return (Record(f"{label} [{split}]: row {number}", value) for number, value in enumerate(data, 1))


def _whole_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}") from error
    return _decode(raw, path, 1)


def _decode(raw: bytes, path: Path, line: int) -> str:
    if line == 1 and (raw[:2] in (b"\xff\xfe", b"\xfe\xff") or _every_other_is_nul(raw[:64])):
        raise UserError(f"{path}: UTF-16 text; save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`)")
    try:
        return raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        number = line + before.count(b"\n")
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise UserError(f"{path}: line {number}, byte {column}: not UTF-8 text") from error


def _every_other_is_nul(raw: bytes) -> bool:
    return len(raw) >= 4 and any(raw[::2]) != any(raw[1::2])


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_unique)
    except _TwiceError as error:
        raise UserError(f"{path}: line {number}: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise _malformed(error, path, number) from error


class _TwiceError(Exception):
    """A field of a JSON object is there twice: one of them would be lost without a word."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"the field {twice!r} is there twice in one object")
    return found


def _malformed(error: json.JSONDecodeError | RecursionError, path: Path, line: int) -> UserError:
    if isinstance(error, RecursionError):
        return UserError(f"{path}: line {line}: JSON nested too deeply")
    return UserError(f"{path}: line {line + error.lineno - 1}, column {error.colno}: not valid JSON: {error.msg}")


def _ends_a_line(text: str, position: int) -> bool:
    """Whether the JSON value before `position`, where the next one starts, ended with its line."""
    return "\n" in text[len(text[:position].rstrip()) : position]
