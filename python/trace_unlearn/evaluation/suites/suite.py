"""What every suite does, and how the suites read their data."""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from trace_unlearn.errors import UserError
from trace_unlearn.sources.records import SUFFIXES, Record, read_records


class Suite(abc.ABC):
    """A benchmark; its subclasses are dataclasses, whose fields are its options.

    `check`, then `read`, both before a model is loaded; then `measure` for each model.
    """

    @abc.abstractmethod
    def check(self) -> None:
        """UserError for what can be told from the options alone."""

    @abc.abstractmethod
    def read(self, tokenizer: Tokenizer) -> None:
        """Reads all data and turns it into tokens; UserError for whatever is wrong with it."""

    @abc.abstractmethod
    def measure(
        self, model: PreTrainedModel, tokenizer: Tokenizer, *, batch_size: int = 8, progress: bool = True
    ) -> dict[str, Any]:
        """The scores of a model, and lists of what is compared between models."""

    def compare(self, found: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
        """What follows from the scores of a model and, where given, of one that never saw the forget data."""
        return {}

    def sources(self) -> dict[str, str]:
        """The files, folders and hub names that are read, by option."""
        return {}


def read_part(data: str, config: str, split: str, *, limit: int | None = None) -> list[Record] | None:
    """The records of one part of a benchmark; None for a part that the folder `data` does not hold.

    Args:
        data: a folder with CONFIG/SPLIT.json or, where the split is "train", CONFIG.json (or .jsonl, .parquet); or a
            name on the hub.
        config: the part's name, in the folder and on the hub.
        split: likewise.
        limit: only the first ones.
    """
    folder = Path(data).expanduser()
    if not folder.is_dir():
        return _first(read_records(f"{data}:{config}", split=split), limit)
    names = [f"{config}/{split}"] + ([config] if split == "train" else [])
    for name in names:
        for suffix in SUFFIXES:
            if (path := folder / f"{name}{suffix}").is_file():
                return _first(read_records(path), limit)
    return None


def _first(records: Any, limit: int | None) -> list[Record]:
    return [record for record, _ in zip(records, range(limit), strict=False)] if limit else list(records)


def check_data(data: Any) -> None:
    """UserError unless `data` is a folder or looks like a hub name."""
    path = Path(data).expanduser() if isinstance(data, str) else Path()
    if not isinstance(data, str) or path.is_file() or not (path.is_dir() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", data)):
        raise UserError(f"data: got {data!r}, allowed are a folder and the name of a data set on the hub, owner/name")


def check_number(name: str, value: Any, least: float, *, most: float = math.inf, whole: bool = True) -> None:
    """UserError unless `value` is None or a number in [least, most], an integer if `whole`."""
    kinds = int if whole else (int, float)
    if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most):
        return
    kind = "integers" if whole else "numbers"
    up_to = "" if math.isinf(most) else f" to {most}"
    raise UserError(f"{name}: got {value!r}, allowed are {kind} from {least}{up_to}")


def text(record: Record, field: str) -> str:
    """A field that holds text; UserError says where it does not."""
    value = record.value.get(field) if isinstance(record.value, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{record.where}: needs the field {field!r} with text in it")
    return value


def texts(record: Record, field: str) -> list[str]:
    """A field that holds a list of texts, at least one."""
    value = record.value.get(field) if isinstance(record.value, dict) else None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UserError(f"{record.where}: needs the field {field!r} with a list of texts in it")
    if not all(isinstance(item, str) and item.strip() for item in value):
        raise UserError(f"{record.where}: the field {field!r} holds something that is no text")
    return list(value)
