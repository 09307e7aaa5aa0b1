"""What a store holds, in a terminal. Takes the dictionaries that are printed as JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from chunkcache.lab.views.tables import columns, pairs
from chunkcache.lab.views.words import duration, number, size

_DIGITS = 8  # the fewest of a name that are shown
_SHOWN = 20  # damaged values
_STATES = {
    "whole": "whole",
    "corrupt": "damaged",
    "lost": "lost",
    "unreachable": "out of reach",
    "foreign": "of another version",
}


def shortest(names: Collection[str], least: int = _DIGITS) -> int:
    """How many digits tell names apart.

    >>> shortest(["00000000aa", "00000000ab"]), shortest([])
    (10, 8)
    """
    digits = least
    while len({name[:digits] for name in names}) < len(set(names)):
        digits += 1
    return digits


def families(
    where: str, rows: Sequence[Mapping[str, Any]], digits: int, now: float
) -> RenderableType:
    """A line for each family. Names have as many digits as `digits`."""
    if not rows:
        return Text(f"Nothing is stored in {where}.")
    names = (
        "prefix", "model", "namespace", "prompts", "chunks", "tokens", "snapshots", "size", "used",
    )  # fmt: skip
    spaces = shortest({row["namespace"] for row in rows})
    lines = [
        (
            row["group"][:digits],
            row["model"] or "-",
            row["namespace"][:spaces] or "-",
            ", ".join(map(_prompt, row["prompts"])) or "-",
            number(row["chunks"]),
            number(row["tokens"]) if row["chunk_size"] else "-",
            number(row["snapshots"]),
            size(row["bytes"]),
            _ago(row["used"], now),
        )
        for row in rows
    ]
    table = columns(f"Prefixes in {where}", names, lines)
    for column in table.columns[1:4]:
        column.justify = "left"
    for column in (table.columns[0], table.columns[2]):
        column.no_wrap = True
    return table


def _prompt(prompt: Mapping[str, Any]) -> str:
    tokens = prompt["tokens"]
    return str(prompt["name"]) if tokens is None else f"{prompt['name']} ({number(tokens)})"


def _ago(used: float | None, now: float) -> str:
    return "-" if used is None else f"{duration(max(0.0, now - used))} ago"


def totals(where: str, found: Mapping[str, Any], now: float) -> RenderableType:
    """All sums, and those of each namespace."""
    budget = "" if found["budget"] is None else f" of {size(found['budget'])}"
    lines = {
        "values": number(found["values"]),
        "size": f"{size(found['bytes'])}{budget}",
        "chunks": number(found["chunks"]),
        "snapshots": number(found["snapshots"]),
        "notes": number(found["notes"]),
        "prefixes": number(found["families"]),
        "tokens": number(found["tokens"]),
        "used longest ago": _ago(found["oldest_use"], now),
        "used last": _ago(found["newest_use"], now),
    }
    parts: list[RenderableType] = [pairs(where, lines | _server(found.get("server")))]
    if found["namespaces"]:
        parts += [Text(), _spaces(found["namespaces"])]
    return Group(*parts)


def _server(memory: Mapping[str, Any] | None) -> dict[str, str]:
    if memory is None:
        return {}
    most = memory["maxmemory"]
    limit = "without a limit" if most is None else f"of {size(most)}"
    return {
        "memory of the server": f"{size(memory['used_memory'])} {limit}",
        "when that is full": str(memory["policy"]),
    }


def _spaces(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    names = (
        "namespace", "model", "numbers", "prefixes", "chunks", "tokens", "size", "a token takes",
        "on the device",
    )  # fmt: skip
    digits = shortest({row["namespace"] for row in rows})
    lines = [
        (
            row["namespace"][:digits] or "unknown",
            row["model"] or "-",
            row["dtype"] or "-",
            number(row["families"]),
            number(row["chunks"]),
            number(row["tokens"]) if row["tokens"] else "-",
            size(row["bytes"]),
            _size(row["stored_token_bytes"]),
            _size(row["token_bytes"]),
        )
        for row in rows
    ]
    table = columns("Namespaces", names, lines)
    for column in table.columns[1:3]:
        column.justify = "left"
    return table


def _size(value: float | None) -> str:
    return "-" if value is None else size(value)


def survey(where: str, found: Mapping[str, Any]) -> RenderableType:
    """How many values are in which state, and which are damaged."""
    lines = {"values": _sums(found)}
    lines |= {name: _sums(found["states"][state]) for state, name in _STATES.items()}
    if found["states"]["corrupt"]["values"]:
        lines["damaged"] += f", {number(found['reachable_corrupt'])} within reach"
    lines |= {
        "parts of no value": number(found["leftovers"]),
        "longest path": f"{number(found['longest_path'])} tokens",
    }
    parts: list[RenderableType] = [pairs(where, lines)]
    if damaged := found["corrupt_values"]:
        rows = [
            (one["key"], size(one["bytes"]), "yes" if one["reachable"] else "no", one["reason"])
            for one in damaged[:_SHOWN]
        ]
        table = columns("Damaged values", ("value", "size", "within reach", "why"), rows)
        table.columns[3].justify = "left"
        parts += [Text(), table]
        if more := len(damaged) - len(rows):
            parts.append(Text(f"and {number(more)} more"))
    return Group(*parts)


def _sums(found: Mapping[str, Any]) -> str:
    return f"{number(found['values'])}, {size(found['bytes'])}" if found["values"] else "0"


def swept(where: str, found: Mapping[str, int], dry: bool) -> RenderableType:
    """What was dropped, or would be."""
    lines = {
        "damaged values": number(found["corrupt"]),
        "lost values": number(found["lost"]),
        "values out of reach": number(found["unreachable"]),
        "notes about models that are gone": number(found["notes"]),
        "expired values, parts of no value": number(found["leftovers"]),
        "size": size(found["bytes"]),
    }
    if found["spared"]:
        lines["written anew meanwhile, and kept"] = number(found["spared"])
    return pairs(f"{'Would be dropped from' if dry else 'Dropped from'} {where}", lines)
