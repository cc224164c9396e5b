"""How values are shown to people: numbers, nested records, tables of text and of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def show(value: object) -> str:
    """How a value is printed: floats with four significant digits or three decimals, None as a dash.

    Example:
        >>> [show(value) for value in (0.5, 123.456, 1.2e-5, True, None, 12345)]
        ['0.500', '123.5', '1.2e-05', 'yes', '–', '12,345']
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != 0 and abs(value) < 1e-3:
            return f"{value:.3g}"
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    return str(value)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, the keys joined by dots.

    Example:
        >>> flatten({"forget": {"nll": 1.5}, "steps": [1, 2]})
        {'forget.nll': 1.5, 'steps': '1, 2'}
    """
    if isinstance(value, Mapping):
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return {prefix: value}


def scalars(value: Mapping[str, Any]) -> dict[str, Any]:
    """Without the lists, such as one value a layer."""
    return {
        key: scalars(item) if isinstance(item, Mapping) else item
        for key, item in value.items()
        if not isinstance(item, list)
    }


def table_of(rows: Sequence[Sequence[object]]) -> str:
    """Rows as aligned text for a terminal, the first one the heading.

    Example:
        >>> print(table_of([("set", "NLL"), ("forget", 1.5), ("held out", None)]))
        set       NLL
        forget    1.500
        held out  –
    """
    cells = [[show(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The fewest last parts of each path that tell them all apart.

    Example:
        >>> short_names(["runs/a/model", "runs/b/model", "owner/base"])
        {'runs/a/model': 'a/model', 'runs/b/model': 'b/model', 'owner/base': 'base'}
    """
    parts = {path: path.rstrip("/").split("/") for path in paths}
    short = {}
    for path, mine in parts.items():
        ends = (mine[-n:] for n in range(1, len(mine) + 1))
        alone = (end for end in ends if sum(other[-len(end) :] == end for other in parts.values()) == 1)
        short[path] = "/".join(next(alone, mine))
    return short


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as a table of Markdown.

    Example:
        >>> print(markdown_table(["set", "NLL"], [["forget", 1.5]]), end="")
        | set | NLL |
        | --- | --- |
        | forget | 1.500 |
    """
    lines = [columns, ["---"] * len(columns), *([show(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
