"""Reports as sections of text and tables, which a terminal, Markdown or a page show each in their way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from chunkcache.lab.views.tables import columns, pairs, plain
from chunkcache.lab.views.words import visible

_BLOCKS = "▏▎▍▌▋▊▉█"
_WIDTH = 24  # characters of a full bar


@dataclass(frozen=True)
class Section:
    """A title over a table, a list of names and values, or sentences.

    Attributes:
        names: of the columns, the first of which is text, as are others without a name; a list of names and
            values has none.
        rows: cells; those of sentences have one.
        note: below it.
    """

    title: str
    rows: Sequence[Sequence[str]]
    names: Sequence[str] = ()
    note: str = ""

    def __post_init__(self) -> None:
        """Prompts and names of others are only shown: nothing in them may act on a terminal or a page."""
        object.__setattr__(self, "title", visible(self.title))
        object.__setattr__(self, "rows", [tuple(map(visible, row)) for row in self.rows])


def bar(part: float, whole: float) -> str:
    """A share as a bar of characters.

    >>> bar(1, 2), bar(1, 1000), bar(0, 1)
    ('████████████', '▏', '')
    """
    eighths = round(8 * _WIDTH * part / whole) if whole else 0
    if part > 0 and whole:
        eighths = max(1, eighths)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_BLOCKS[rest - 1] if rest else "")


def to_terminal(sections: Iterable[Section]) -> RenderableType:
    """For `rich`."""
    parts: list[RenderableType] = []
    for section in sections:
        parts += [*([Text()] if parts else []), _shown(section)]
        if section.note:
            parts.append(Text(section.note, style="dim"))
    return Group(*parts)


def to_text(sections: Iterable[Section]) -> str:
    """Plain text."""
    return plain(to_terminal(sections))


def _shown(section: Section) -> RenderableType:
    """The title apart: that of a table would be as narrow as the table."""
    body: list[RenderableType]
    if section.names:
        body = [columns("", section.names, section.rows)]
    elif all(len(row) == 1 for row in section.rows):
        body = [Text(f"- {row[0]}") for row in section.rows]
    else:
        body = [pairs("", {row[0]: row[1] for row in section.rows})]
    return Group(Text(section.title, style="bold"), *body)


def to_markdown(title: str, sections: Iterable[Section]) -> str:
    """A document of CommonMark with tables."""
    parts = [f"# {_escaped(title)}"]
    for section in sections:
        parts.append(f"## {_escaped(section.title)}")
        if all(len(row) == 1 for row in section.rows):
            parts.append("\n".join(f"- {_escaped(row[0])}" for row in section.rows))
        else:
            parts.append(_table(section))
        if section.note:
            parts.append(_escaped(section.note))
    return "\n\n".join(parts) + "\n"


def _table(section: Section) -> str:
    names = section.names or ("", "")
    left = "---" if section.names else "---|---"
    rest = "".join("|---:" if name else "|---" for name in section.names[1:])
    lines = [_line(names), f"|{left}{rest}|", *map(_line, section.rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """Prompts and names are shown as they are, on one line."""
    flat = " ".join(text.split())
    return "".join("\\" + one if one in "\\`*_{}[]<>#|~" else one for one in flat)
