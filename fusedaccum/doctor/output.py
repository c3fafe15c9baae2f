"""Tables and a progress bar: with rich and tqdm where they are installed and somebody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Cells = Sequence[str]
Row = Mapping[str, Any]
Column = Callable[[Row], str]


def column(key: str, spec: str = "", scale: int | None = None) -> Column:
    """A column of a table of rows: the value under `key`, as the format `spec` says; None is
    empty."""

    def text(row: Row) -> str:
        value = row[key]
        return "" if value is None else format(scale * value if scale else value, spec)

    return text


def plain_table(headers: Cells, rows: Sequence[Cells]) -> str:
    """Columns of text: the first to the left, numbers to the right."""
    everything = [headers, *rows]
    widths = [max(len(row[i]) for row in everything) for i in range(len(headers))]
    lines = []
    for row in everything:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def print_rows(title: str, rows: Sequence[Row], columns: Mapping[str, Column]) -> None:
    """A titled table of rows on stdout, by the headers of its columns."""
    headers, cells = list(columns), [[text(row) for text in columns.values()] for row in rows]
    plain = plain_table(headers, cells)
    width = max(len(line) for line in plain.splitlines())
    if not (sys.stdout.isatty() and _print_rich(title, headers, cells, width)):
        print(f"\n{title}\n{plain}")


def _print_rich(title: str, headers: Cells, rows: Sequence[Cells], width: int) -> bool:
    """The table by rich; False where that is missing, or would cut a table of `width` columns."""
    try:
        from rich import box, console, markup
        from rich.table import Table
    except ImportError:
        return False
    screen = console.Console()
    if screen.width < width + 2 * len(headers):
        return False
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(markup.escape(cell) for cell in row))
    screen.print(table)
    return True


class Progress:
    """A bar on stderr, nothing where that is no terminal.

    Args:
        total: steps in all.
        unit: what one step is.
        quiet: never show it.
    """

    def __init__(self, total: int, unit: str, quiet: bool = False) -> None:
        self.total, self.unit, self.done, self.text = total, unit, 0, ""
        self.quiet = quiet or not sys.stderr.isatty()
        self.bar = None
        if not self.quiet:
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self.bar = tqdm(total=total, unit=unit, leave=False)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif not self.quiet:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def describe(self, text: str) -> None:
        """Say what is being done."""
        self.text = text
        if self.bar is not None:
            self.bar.set_description_str(text)

    def advance(self, n: int = 1) -> None:
        """So many steps more."""
        self.done += n
        if self.bar is not None:
            self.bar.update(n)
        elif not self.quiet:
            line = f"{self.done}/{self.total} {self.unit} {self.text}"
            print(f"\r\033[K{line[:78]}", end="", file=sys.stderr, flush=True)
