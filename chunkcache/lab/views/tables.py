"""Tables for a terminal, or plain text in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 120


def console() -> Console:
    """Standard output: as wide as the terminal, or 120 columns of plain text in a pipe."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH)


def plain(shown: RenderableType) -> str:
    """Text without colours, in lines of 120 characters."""
    page = StringIO()
    Console(file=page, width=_PLAIN_WIDTH, highlight=False, color_system=None).print(shown)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def pairs(title: str, values: Mapping[str, str]) -> Table:
    """A title and lines of a name and a value."""
    table = grid(title, "", "")
    table.show_header = False
    table.columns[1].justify = "left"
    for name, value in values.items():
        table.add_row(name, Text(value))
    return table


def grid(title: str, first: str, *numbers: str) -> Table:
    """An empty table without lines; columns behind the first are aligned right, if they have a name."""
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right" if name else "left")
    return table


def columns(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are aligned right, if they have a name."""
    table = grid(title, names[0], *names[1:])
    for row in rows:
        table.add_row(*map(Text, row))
    return table
