"""The picture of a tree: geometry on random forests, text that cannot break out, what readers are told."""

from __future__ import annotations

import doctest
import math
from collections import Counter
from itertools import pairwise
from typing import Any
from xml.etree.ElementTree import Element, fromstring

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkcache.hf.ledger import tree_rows
from chunkcache.lab import TreeRow
from chunkcache.lab.records import TreeRows
from chunkcache.lab.views import icicle
from chunkcache.lab.views.icicle import Band, layout, luminance
from chunkcache.lab.views.tree import parents
from chunkcache.tree import PrefixTree
from tests.tree.oracle import run_of

NS = "{http://www.w3.org/2000/svg}"
NASTY = (
    "<script>alert(1)</script>",
    "a & b &amp; ]]> <!--",
    "\"quoted\" 'twice'",
    "\x00\x1b[31m\x7f\x9b\ud800\ufffe\uffff",
    "🙂👩\u200d👩\u200d👧 emoji",
    "\u200f\u05e9\u05dc\u05d5\u05dd\u200e \u202eevil\u2066",
    "new\nlines\r\ttabs\u2028",
    "日本語のとても長いプロンプト" * 9,
)


def row(depth: int, tokens: int = 64, **fields: Any) -> TreeRow:
    values: dict[str, Any] = {
        "start": 0,
        "bytes": 3072 * tokens,
        "hits": 0,
        "idle": 90.0,
        "pinned": False,
        "leases": 0,
        "names": (),
        "tier": "device",
        "text": "You are",
    }
    return TreeRow(depth=depth, tokens=tokens, **values | fields)


@st.composite
def forests(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of a forest, depth first; some of them far smaller than others."""
    rows: list[dict[str, Any]] = []
    texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=20))
    for _ in range(draw(st.integers(0, 40))):
        deepest = rows[-1]["depth"] + 1 if rows else 0
        made = row(
            draw(st.integers(0, deepest)),
            draw(st.sampled_from((1, 16, 64, 640, 100_000))),
            hits=draw(st.integers(0, 10_000)),
            hit_tokens=draw(st.integers(0, 10**6)),
            pinned=draw(st.booleans()),
            names=tuple(draw(st.lists(texts, max_size=2))),
            text=draw(texts),
        )
        rows.append(made.to_dict())
    return rows


def parse(svg: str) -> Element:
    """The picture, as a reader of XML takes it; nothing in it runs or is fetched."""
    picture = fromstring(svg.encode())
    known = {"svg", "title", "g", "rect", "text"}
    assert {element.tag.removeprefix(NS) for element in picture.iter()} <= known
    assert not any(
        "http" in value for element in picture.iter() for value in element.attrib.values()
    )
    return picture


@settings(deadline=None)
@given(forests(), st.sampled_from((200, 960)))
def test_bands_tile_their_parents_and_stand_for_every_row(
    rows: list[dict[str, Any]], width: int
) -> None:
    bands = layout(rows, width)
    counted = Counter(index for band in bands for index in band.inside)
    assert counted == Counter(range(len(rows)))
    assert sum(band.width for band in bands if band.level == 0) == pytest.approx(
        width if rows else 0
    )
    above = parents(rows)
    places = {band.row: band for band in bands if band.row is not None}
    for band in bands:
        assert_under(band, places, above, width, rows)
    for parent in {band.above for band in bands}:
        assert_beside([band for band in bands if band.above == parent])


def assert_under(
    band: Band,
    places: dict[int, Band],
    above: list[int | None],
    width: float,
    rows: list[dict[str, Any]],
) -> None:
    """A band lies under its parent's, and is as wide as its tokens."""
    total = sum(one["tokens"] for one in rows)
    assert math.isclose(band.width, width * band.tokens / total, abs_tol=1e-9)
    assert band.row is None or band.width >= icicle.THIN
    if band.row is not None:
        assert band.above == above[band.row]
    if band.above is None:
        assert band.level == 0
        return
    over = places[band.above]
    assert band.level == over.level + 1
    assert over.x - 1e-6 <= band.x
    assert band.x + band.width <= over.x + over.width + 1e-6


def assert_beside(siblings: list[Band]) -> None:
    """Siblings stand in a row without holes; there is one of thin nodes at most, the last."""
    ordered = sorted(siblings, key=lambda band: band.x)
    for left, right in pairwise(ordered):
        assert math.isclose(left.x + left.width, right.x, abs_tol=1e-6)
    thin = [band for band in siblings if band.row is None]
    assert len(thin) <= 1 and (not thin or ordered[-1].width == 0 or ordered[-1] == thin[0])


@settings(deadline=None)
@given(forests())
def test_a_picture_is_xml_and_always_the_same(rows: list[dict[str, Any]]) -> None:
    svg = icicle.icicle(rows)
    assert svg == icicle.icicle([dict(one) for one in rows])
    picture = parse(svg)
    groups = picture.findall(f"{NS}g")
    bands = layout(rows, 960)
    assert len(groups) == len(bands)
    height = float(picture.attrib["height"])
    for group, band in zip(groups, bands, strict=True):
        assert group[0].tag == f"{NS}title" and group[0].text
        for box in group.findall(f"{NS}rect"):
            assert_inside(box, band, height)


def assert_inside(box: Element, band: Band, height: float) -> None:
    x, y, wide, high = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
    assert band.x - 0.001 <= x and x + wide <= band.x + band.width + 0.002
    assert 0 < y < y + high < height


@pytest.mark.parametrize("text", NASTY)
def test_what_users_wrote_stays_text(text: str) -> None:
    rows = TreeRows([row(0, names=(text,), text=text, tier=text), row(1, names=("fine",))])
    picture = parse(icicle.icicle([one.to_dict() for one in rows]))
    (told, *_) = [title.text for title in picture.iter(f"{NS}title")][1:]
    assert told is not None
    kept = [one for one in " ".join(text.split()) if one.isalnum()]
    assert set(kept) <= set(told)
    assert not any(one in told for one in "\x00\x1b\x7f\x9b\ud800\ufffe\uffff\u202e\u2066")
    html = rows._repr_html_()
    html.encode()
    assert "<script" not in html and "fine" in html and "\x00" not in html


def test_a_band_tells_everything_about_its_node() -> None:
    rows = [
        row(0, 4096, names=("support-bot", "b"), hits=7, hit_tokens=28_000, pinned=True, leases=2),
        row(1, 512, start=4096, text="What is", skipped=3, snapshots=1),
    ]
    picture = parse(icicle.icicle([one.to_dict() for one in rows]))
    assert picture.attrib["role"] == "img"
    summary = "Prefix tree: 2 stored prefixes, 4,608 tokens, 13.5 MiB"
    assert picture.attrib["aria-label"] == summary
    whole, first, second = [title.text for title in picture.iter(f"{NS}title")]
    assert whole == summary
    assert first == (
        'support-bot, b\n"You are"\n4,096 tokens from token 0, 12.0 MiB\n512 tokens behind it\n'
        "7 hits, 28,000 tokens reused\nlast used 1.5 min ago\ndevice, pinned, in use by 2"
    )
    assert second is not None
    assert second.startswith('"...What is"\n512 tokens from token 4,096, 1.5 MiB\n0 hits')
    assert second.endswith("device, 1 snapshot")
    words = [word.text for word in picture.iter(f"{NS}text")]
    assert {"support-bot, b: You are", "What is", "pinned", "7"} <= set(words)


def test_thin_nodes_are_one_band() -> None:
    tails = [row(1, hits=number % 5, pinned=number == 9) for number in range(5000)]
    rows = [one.to_dict() for one in [row(0, 1000, hits=9), *tails]]
    picture = parse(icicle.icicle(rows))
    assert len(picture.findall(f"{NS}g")) == 2
    assert "5,000 more" in [word.text for word in picture.iter(f"{NS}text")]
    told = list(picture.iter(f"{NS}title"))[-1].text or ""
    assert "at most 4 hits" in told and "320,000 tokens, 937.5 MiB" in told
    assert "1 of them pinned" in told


def test_an_empty_tree_says_so() -> None:
    picture = parse(icicle.icicle([]))
    assert float(picture.attrib["height"]) < 50
    assert "No prefixes are stored." in [word.text for word in picture.iter(f"{NS}text")]
    assert "No prefixes are stored." in TreeRows()._repr_html_()


def test_a_chain_of_thousands_is_drawn_without_recursion() -> None:
    rows = [row(depth).to_dict() for depth in range(5000)]
    picture = parse(icicle.icicle(rows))
    assert float(picture.attrib["height"]) < 10_100


def test_a_narrow_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="200 pixels"):
        icicle.icicle([], width=199)


def test_labels_have_contrast_and_heat_gets_lighter() -> None:
    """Also for those who see no colours; WCAG asks for 4.5."""
    shades = [luminance(icicle._colour(step / 50)) for step in range(51)]
    assert shades == sorted(set(shades))
    for step in range(51):
        colour = icicle._colour(step / 50)
        light, dark = sorted((luminance(colour), luminance(icicle._ink(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_a_notebook_shows_the_picture_and_the_most_reused_rows() -> None:
    rows = TreeRows(row(0, hit_tokens=number, text=f"number {number}") for number in range(60))
    html = rows._repr_html_()
    assert html.startswith("<div><svg ") and html.count("<tr>") == 51
    assert "10 more prefixes with 640 tokens left out" in html
    assert "number 59" in html and rows[59].text == "number 59"
    assert isinstance(rows, list)


def test_text_begins_shortly_before_what_tells_siblings_apart() -> None:
    tree = PrefixTree(64)

    def insert(tokens: list[int]) -> None:
        tree.insert(tokens, lambda first, count: run_of(tokens, 64, first, count))

    common = list(range(40))
    for last in ([1] * 24, [1] * 20 + [2] * 4, [9] * 24):
        insert([*range(100, 164), *common, *last])
    insert([7] * 64)
    first, other, *tails = tree_rows(tree, 2, lambda ids: " ".join(map(str, ids)))
    assert (first.depth, first.skipped, first.text[:5]) == (0, 0, "7 7 7")
    assert (other.skipped, other.text[:11]) == (0, "100 101 102")
    assert [(tail.depth, tail.skipped) for tail in tails] == [(1, 54), (1, 54), (1, 34)]
    assert tails[1].text == "1 1 1 1 1 1 2 2 2 2"
    assert tails[2].text.startswith("34 35 36 37 38 39 9 9")


def test_doctests() -> None:
    assert doctest.testmod(icicle).failed == 0
