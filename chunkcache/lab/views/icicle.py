"""The prefix tree as a picture: an icicle of SVG, for a file, a page or a notebook.

A band is a node. It lies under the one that it stands behind, so that prompts are read downwards, and is
as wide as the tokens stored in it and in all that stands behind it. Its colour tells how many prompts
reused it. Where nothing lies under a part of a band, the tokens are its own.

Rejected: token positions as height (beside a prompt of 100,000 tokens, a question is thinner than a
line), and each prompt as wide as the others (it says nothing about memory).

The picture is made of elements, never of strings: prompts are what users wrote. It has no script and no
ids, so several can stand in one page, and no background: words are of a grey that can be read on white
and on black.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

from chunkcache.lab.views.tree import facts, left_out, most_reused, names, parents, snippet, sums
from chunkcache.lab.views.words import counted, duration, number, size, visible

WIDTH = 960
THIN = 0.5  # pixels; what is thinner cannot be seen
_TALL = 22.0  # of a level, if there are not too many
_TALLEST, _FLATTEST = 880.0, 2.0  # of all levels together; of one
_HEAD, _FOOT = 44.0, 22.0
_FONT = 11.0
_GREY = "#767676"
# From cold to hot. Blue and orange differ for the colour-blind; every step is lighter than the last, so
# that the order survives print.
_RAMP = ((45, 75, 115), (94, 104, 146), (158, 122, 136), (219, 143, 96), (255, 184, 77))
_READING = (
    "Prompts are read downwards. Width: tokens stored in a prefix and in all that stands behind it."
)
_FEWEST = 5  # letters of a label that was cut
_LONGEST = 300  # characters of a prompt in a tooltip
_TABLE_ROWS = 50

Row = Mapping[str, Any]


class Band(NamedTuple):
    """A rectangle: one node, or nodes too thin to be seen one by one.

    Attributes:
        row: index of the node's row; None for several.
        above: index of the row that it lies under; None at the top.
        level: 0 at the top; x, width: pixels.
        inside: indices of the rows that it stands for: the node, or the thin ones and all behind them.
        tokens: stored in it and behind it.
    """

    row: int | None
    above: int | None
    level: int
    x: float
    width: float
    inside: tuple[int, ...]
    tokens: int


def icicle(rows: Sequence[Row], width: int = WIDTH, thin: float = THIN) -> str:
    """The SVG of the dictionaries of `TreeRow.to_dict()`, which come depth first.

    Equal rows make an equal picture. Everything is drawn; siblings thinner than `thin` are drawn as one.

    Args:
        width, thin: pixels.

    Raises:
        ValueError: the picture is narrower than 200 pixels.

    Complexity: O(rows); the picture has at most `2 * width / thin` bands a level.
    """
    if width < 200:
        raise ValueError(f"an icicle needs at least 200 pixels of width, not {width}")
    bands = layout(rows, width, thin)
    levels = 1 + max((band.level for band in bands), default=-1)
    tall = min(_TALL, max(_FLATTEST, _TALLEST / max(1, levels)))
    picture = _canvas(rows, width, _HEAD + levels * tall + _FOOT)
    most = max((row["hits"] for row in rows), default=0)
    if rows:
        _legend(picture, most, any(row["pinned"] for row in rows))
        _write(picture, 0, _HEAD + levels * tall + 15, _READING)
    for band in bands:
        _draw(picture, band, rows, most, tall)
    return tostring(picture, encoding="unicode")


def layout(rows: Sequence[Row], width: float, thin: float = THIN) -> list[Band]:
    """Where the bands are. Siblings stand side by side in the order of `rows`, the thin ones last.

    Args:
        width, thin: pixels.

    Complexity: O(rows).
    """
    above = parents(rows)
    tokens = _behind(rows, above)
    scale = width / max(1, sum(row["tokens"] for row in rows))
    bands: list[Band] = []
    ends: dict[int | None, float] = {None: 0.0}  # how far the bands under each row reach
    levels: dict[int | None, int] = {None: 0}  # of what lies under each row
    host: dict[int, int | None] = {}  # of a thin row, and of those behind it: where it is counted
    hidden: dict[int | None, list[int]] = {}  # the same the other way round
    for index, parent in enumerate(above):
        wide = tokens[index] * scale
        if parent in host or wide < thin:
            host[index] = parent if parent is None else host.get(parent, parent)
            hidden.setdefault(host[index], []).append(index)
            continue
        x, level = ends[parent], levels[parent]
        bands.append(Band(index, parent, level, x, wide, (index,), tokens[index]))
        ends[parent], ends[index], levels[index] = x + wide, x, level + 1
    for parent, inside in hidden.items():
        held = sum(rows[index]["tokens"] for index in inside)
        x, level = ends[parent], levels[parent]
        bands.append(Band(None, parent, level, x, held * scale, tuple(inside), held))
    return bands


def _behind(rows: Sequence[Row], above: Sequence[int | None]) -> list[int]:
    """Tokens of each row and of all that stands behind it."""
    tokens = [int(row["tokens"]) for row in rows]
    for index in range(len(rows) - 1, -1, -1):
        parent = above[index]
        if parent is not None:
            tokens[parent] += tokens[index]
    return tokens


# -- drawing


def _canvas(rows: Sequence[Row], width: int, height: float) -> Element:
    told = sums(rows) if rows else "No prefixes are stored."
    if not rows:
        height = _HEAD / 2
    picture = Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "width": f"{width}",
            "height": _px(height),
            "viewBox": f"0 0 {width} {_px(height)}",
            "role": "img",
            "aria-label": f"Prefix tree: {told}",
            "font-family": "system-ui, sans-serif",
            "font-size": _px(_FONT),
            "style": "max-width:100%;height:auto",
        },
    )
    SubElement(picture, "title").text = f"Prefix tree: {told}"
    _write(picture, 0, 14, told).set("font-size", "13")
    return picture


def _legend(picture: Element, most: int, pinned: bool) -> None:
    """Under the head: what colours and the bar of pinned prefixes mean."""
    y, side = 24.0, 12.0
    _write(picture, 0, y + 10, "hits: 0")
    x = 40.0
    for step in range(len(_RAMP) if most else 1):
        _rect(picture, x, y, side, side, _colour(step / (len(_RAMP) - 1)))
        x += side
    if most:
        word = _write(picture, x + 5, y + 10, number(most))
        x += 5 + _length(word.text or "")
    if pinned:
        _rect(picture, x + 20, y, 18, side, _colour(0))
        _mark(picture, x + 20, y, 18, side)
        _write(picture, x + 43, y + 10, "pinned")


def _draw(picture: Element, band: Band, rows: Sequence[Row], most: int, tall: float) -> None:
    inside = [rows[index] for index in band.inside]
    hits = max(row["hits"] for row in inside)
    colour = _colour(math.log1p(hits) / math.log1p(most) if most else 0.0)
    group = SubElement(picture, "g")
    y = _HEAD + band.level * tall
    told = _several(inside) if band.row is None else _one(inside[0], band)
    SubElement(group, "title").text = told
    # A gap between neighbours, which must not eat up a thin band.
    wide, high = band.width - min(1.0, band.width / 8), tall - min(1.0, tall / 8)
    _rect(group, band.x, y, wide, high, colour)
    left = 4.0
    if any(row["pinned"] for row in inside):
        left += _mark(group, band.x, y, wide, high)
    if high > _FONT + 4 and (text := _cut(_label(inside, band), wide - left - 4)):
        # An inner picture clips what a font sets wider than expected; a clip path would need an id.
        box = {"x": _px(band.x), "y": _px(y), "width": _px(wide), "height": _px(high)}
        clip = SubElement(group, "svg", box)
        _write(clip, left, high / 2 + 4, text).set("fill", _ink(colour))


def _label(inside: Sequence[Row], band: Band) -> str:
    if band.row is None:
        return f"{number(len(inside))} more"
    row = inside[0]
    text = visible(row["text"]) or f"from token {number(row['start'])}"
    return f"{names(row)}: {text}" if row["names"] else text


def _one(row: Row, band: Band) -> str:
    """A tooltip."""
    tokens, held, _, reused, idle, state = facts(row)
    behind = band.tokens - row["tokens"]
    lines = [
        *([names(row)] if row["names"] else []),
        snippet(row, _LONGEST),
        f"{tokens} tokens from token {number(row['start'])}, {held}",
        *([f"{number(behind)} tokens behind it"] if behind else []),
        f"{counted(row['hits'], 'hit')}, {reused} tokens reused",
        f"last used {idle} ago",
        state,
    ]
    return "\n".join(lines)


def _several(inside: Sequence[Row]) -> str:
    """A tooltip."""
    lines = [
        f"{number(len(inside))} more, too thin to be drawn one by one",
        f"{number(sum(row['tokens'] for row in inside))} tokens, "
        f"{size(sum(row['bytes'] for row in inside))}",
        f"at most {counted(max(row['hits'] for row in inside), 'hit')}, "
        f"{number(sum(row['hit_tokens'] for row in inside))} tokens reused",
        f"last used {duration(min(row['idle'] for row in inside))} ago",
    ]
    if pinned := sum(bool(row["pinned"]) for row in inside):
        lines.append(f"{number(pinned)} of them pinned")
    return "\n".join(lines)


def _write(parent: Element, x: float, y: float, text: str) -> Element:
    word = SubElement(parent, "text", {"x": _px(x), "y": _px(y), "fill": _GREY})
    word.text = text
    return word


def _rect(parent: Element, x: float, y: float, wide: float, high: float, colour: str) -> None:
    box = {"x": _px(x), "y": _px(y), "width": _px(wide), "height": _px(high), "fill": colour}
    SubElement(parent, "rect", box)


def _mark(parent: Element, x: float, y: float, wide: float, high: float) -> float:
    """A bar inside the left end of what is pinned, white within black; returns the room it takes."""
    bar = min(6.0, wide)
    _rect(parent, x, y, bar, high, "#000000")
    _rect(parent, x + bar / 3, y + high / 8, bar / 3, high * 3 / 4, "#ffffff")
    return bar


def _px(value: float) -> str:
    """A length in the fewest digits; a thousandth of a pixel is less than anyone sees."""
    return f"{value:.3f}".rstrip("0").rstrip(".")


# -- colours and lengths


def _colour(heat: float) -> str:
    """A point of the ramp; `heat` is from 0 to 1."""
    place = heat * (len(_RAMP) - 1)
    step = min(int(place), len(_RAMP) - 2)
    (low, high), part = list(pairwise(_RAMP))[step], place - step
    mixed = [round(a + part * (b - a)) for a, b in zip(low, high, strict=True)]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, 0 to 1 (WCAG 2.2).

    >>> luminance("#000000"), luminance("#ffffff")
    (0.0, 1.0)
    """
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return round(0.2126 * red + 0.7152 * green + 0.0722 * blue, 6)


def _ink(colour: str) -> str:
    """Black or white: on any colour one of them has a contrast of 4.5 and more."""
    return "#000000" if luminance(colour) > 0.179 else "#ffffff"


def _cut(text: str, room: float) -> str:
    """As much of a text as fits, estimated; empty where only a few letters would be left."""
    if _length(text) <= room:
        return text
    left = room - _length("...")
    for count, letter in enumerate(text):
        left -= _length(letter)
        if left < 0:
            return text[:count] + "..." if count >= _FEWEST else ""
    return text


def _length(text: str) -> float:
    """Pixels of a text; no font is asked, so letters are taken for wide ones of their kind."""
    return sum(_FONT * _em(letter) for letter in text)


def _em(letter: str) -> float:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0.0
    if unicodedata.east_asian_width(letter) in "WF":
        return 1.2
    return 0.3 if letter in " .,:;'!|il" else 0.6


# -- notebooks


def notebook(rows: Sequence[Row], top: int = _TABLE_ROWS) -> str:
    """The picture, and under it a table, as a piece of HTML.

    Args:
        top: rows of the table, see `tree.most_reused`; 0 for all.
    """
    box = Element("div")
    shown = most_reused(rows, top)
    if rows:
        _table(box, shown)
    if note := left_out(rows, shown):
        SubElement(box, "p").text = note
    return f"<div>{icicle(rows)}</div>{tostring(box, encoding='unicode', method='html')}"


def _table(box: Element, rows: Sequence[Row]) -> None:
    table = SubElement(box, "table")
    _line(table, "th", ["prefix", "tokens", "size", "hits", "reused", "idle", "state"], 0)
    for row in rows:
        label = f"{names(row)} {snippet(row, 48)}".strip()
        _line(table, "td", [label, *facts(row)], row["depth"])


def _line(table: Element, kind: str, cells: Sequence[str], depth: int) -> None:
    line = SubElement(table, "tr")
    for column, text in enumerate(cells):
        side = "left" if column in (0, len(cells) - 1) else "right"
        indent = 0.4 if column else 0.4 + min(depth, 12)
        style = f"text-align:{side};padding:0.1em 0.4em 0.1em {indent}em"
        SubElement(line, kind, {"style": style}).text = text
