"""Tables of rows on stdout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Column = Callable[[Row], str]


def column(key: str, spec: str = "", scale: int | None = None) -> Column:
    """A column of a table of rows: the value under `key`, as the format `spec` says; None is
    empty."""

    def text(row: Row) -> str:
        value = row[key]
        return "" if value is None else format(scale * value if scale else value, spec)

    return text


def print_rows(title: str, rows: Sequence[Row], columns: Mapping[str, Column]) -> None:
    """A titled table of rows: the first column to the left, numbers to the right."""
    lines = [list(columns), *([text(row) for text in columns.values()] for row in rows)]
    widths = [max(len(cell) for cell in cells) for cells in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        print("  " + "  ".join(cells).rstrip())
