"""The prefix tree in a terminal, and what its picture says too.

Rows are the dictionaries of `TreeRow.to_dict()`, since they may come from a server. Prompts are shown as
`rich.text.Text`, never parsed as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from chunkcache.lab.views.tables import grid
from chunkcache.lab.views.words import counted, duration, number, size, visible

_SNIPPET = 96
_LEVELS = 8  # deeper rows of a tree are not moved further to the right


def tree(rows: Sequence[Mapping[str, Any]], top: int = 0) -> RenderableType:
    """The prefix tree of `TreeRow.to_dict()` rows, which come depth first.

    Args:
        top: how many prefixes to show, see `most_reused`; 0 for all.
    """
    if not rows:
        return Text(sums(rows), style="bold")
    shown = most_reused(rows, top)
    table = grid(sums(rows), "", "tokens", "size", "hits", "reused", "idle", "state")
    table.columns[-1].justify = "left"
    for guide, row in zip(_guides([row["depth"] for row in shown]), shown, strict=True):
        table.add_row(_label(guide, row), *(Text(fact, no_wrap=True) for fact in facts(row)))
    parts: list[RenderableType] = [table]
    if note := left_out(rows, shown):
        parts.append(Text(note, style="dim"))
    return Group(*parts)


def most_reused(rows: Sequence[Mapping[str, Any]], top: int) -> list[Mapping[str, Any]]:
    """The rows that saved most tokens, and what they stand behind, in the order of `rows`.

    Args:
        top: how many, without those they stand behind; 0 for all.

    Complexity: O(n log n), plus the depth of each that is shown.
    """
    if not 0 < top < len(rows):
        return list(rows)
    above = parents(rows)
    shown: set[int] = set()
    for best in sorted(range(len(rows)), key=lambda index: _worth(rows[index]))[-top:]:
        step: int | None = best
        while step is not None and step not in shown:
            shown.add(step)
            step = above[step]
    return [row for index, row in enumerate(rows) if index in shown]


def _worth(row: Mapping[str, Any]) -> tuple[float, ...]:
    return row["hit_tokens"], row["hits"], row["tokens"]


def parents(rows: Sequence[Mapping[str, Any]]) -> list[int | None]:
    """The index of the row that each row stands behind; None where a prompt begins. O(n).

    >>> parents([{"depth": depth} for depth in (0, 1, 1, 2, 0)])
    [None, 0, 0, 2, None]
    """
    path: list[int] = []
    found: list[int | None] = []
    for index, row in enumerate(rows):
        while path and rows[path[-1]]["depth"] >= row["depth"]:
            path.pop()
        found.append(path[-1] if path else None)
        path.append(index)
    return found


def sums(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much is stored, in words."""
    tokens, held = sum(row["tokens"] for row in rows), sum(row["bytes"] for row in rows)
    noun = "prefix" if len(rows) == 1 else "prefixes"
    return f"{number(len(rows))} stored {noun}, {number(tokens)} tokens, {size(held)}"


def left_out(rows: Sequence[Mapping[str, Any]], shown: Sequence[Mapping[str, Any]]) -> str:
    """What of `rows` is not shown, in words; empty if all is."""
    count = len(rows) - len(shown)
    if not count:
        return ""
    tokens = sum(row["tokens"] for row in rows) - sum(row["tokens"] for row in shown)
    noun = "prefix" if count == 1 else "prefixes"
    return f"{number(count)} more {noun} with {number(tokens)} tokens left out, the least reused"


def facts(row: Mapping[str, Any]) -> list[str]:
    """Of a row: tokens, size, hits, tokens reused, time since the last use, state."""
    state = [
        visible(row["tier"]),
        *(["pinned"] if row["pinned"] else []),
        *([f"in use by {row['leases']}"] if row["leases"] else []),
        *([counted(row["snapshots"], "snapshot")] if row["snapshots"] else []),
    ]
    counts = [number(row["tokens"]), size(row["bytes"]), number(row["hits"])]
    return [*counts, number(row["hit_tokens"]), duration(row["idle"]), ", ".join(state)]


def _label(guide: str, row: Mapping[str, Any]) -> Text:
    """In one line, so that the tree's lines stay whole: what is too long is cut."""
    label = Text(guide, style="dim", no_wrap=True, overflow="ellipsis")
    if row["names"]:
        label.append(f"{names(row)} ", style="not dim bold green")
    return label.append(snippet(row, _SNIPPET), style="not dim cyan")


def _guides(depths: Sequence[int]) -> list[str]:
    """The lines of a tree before each row, which come depth first.

    >>> _guides([0, 1, 2, 1, 0])
    ['', '├ ', '│ └ ', '└ ', '']
    """
    later: list[bool] = []  # by depth, whether a sibling of the path to this row is below it
    guides = []
    for depth in reversed(depths):
        later = [*later[: depth + 1], *[False] * (depth + 1 - len(later))]
        guides.append(_guide(later))
        later[depth] = True
    return guides[::-1]


def _guide(later: Sequence[bool]) -> str:
    depth = len(later) - 1
    if depth > _LEVELS:
        return f"{'  ' * _LEVELS}level {number(depth)}: "
    lines = "".join("│ " if more else "  " for more in later[1:-1])
    return lines + ("├ " if later[-1] else "└ ") if depth else ""


def names(row: Mapping[str, Any]) -> str:
    """The names of a row, with commas between; empty without any."""
    return ", ".join(map(visible, row["names"]))


def snippet(row: Mapping[str, Any], most: int) -> str:
    r"""How a row's text begins, in quotes, or where the row does if it has no text.

    >>> snippet({"text": "You\nare a bot", "start": 0, "skipped": 3}, 9)
    '"...You are a..."'

    Args:
        most: characters of the text.
    """
    flat = visible(row["text"])
    if not flat:
        return f"from token {number(row['start'])}"
    return f'"{"..." if row["skipped"] else ""}{flat[:most]}{"..." if len(flat) > most else ""}"'
