"""Where a prompt leaves what is known, and whether it comes back to it.

Two prompts that are the same but for a date near their beginning share nothing behind it: KV depends on
all tokens before. What is the same again behind such a hole could be shared if the hole came last.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from chunkcache.lab.simulation.trie import common
from chunkcache.tree import TOKEN_BYTES

_WINDOW = 16  # tokens by which two texts are recognised as the same
_SHORT = 64  # tokens of a hole that is looked for closely
_LONG = 2048  # tokens of one that is looked for by whole windows
_LEAST = 32  # tokens that must be the same behind a short hole
_HOLES = 16  # of one prompt
_TRIES = 2  # places of one window; text that repeats itself has many


class Hole(NamedTuple):
    """Tokens that differ between texts that do not.

    Attributes:
        at, length: where they are in a prompt; there, old: in the other one.
        run: tokens behind them that are the same in both.
    """

    at: int
    length: int
    there: int
    old: int
    run: int


class Windows:
    """Which prompt had a piece of text last, wherever it was. Some 200 bytes for 16 tokens that are new."""

    def __init__(self) -> None:
        self._prompts: dict[bytes, int] = {}

    def add(self, number: int, prompt: bytes, begin: int) -> None:
        """Notes the text of a prompt from token `begin` on."""
        for at in range(-(-begin // _WINDOW) * _WINDOW, len(prompt) // TOKEN_BYTES, _WINDOW):
            self._prompts[_window(prompt, at)] = number

    def find(self, prompt: bytes, begin: int, end: int, most: int) -> list[int]:
        """At most so many prompts that have text of this one from between two tokens, the first first."""
        found: dict[int, None] = {}
        for at in range(begin, min(end, begin + _LONG) - _WINDOW + 1):
            number = self._prompts.get(_window(prompt, at))
            if number is not None:
                found[number] = None
                if len(found) == most:
                    break
        return list(found)


def holes(prompt: bytes, other: bytes, end: int) -> list[Hole]:
    """The holes of a prompt from its first token that differs on, each with text behind it that is the same.

    Args:
        prompt, other: packed tokens; end: tokens of the prompt that count.
    """
    found: list[Hole] = []
    here = there = common(prompt, 0, other, 0, TOKEN_BYTES, len(prompt)) // TOKEN_BYTES
    while here < end and len(found) < _HOLES:
        hole = _short(prompt, other, here, there) or _long(prompt, other, here, there)
        if hole is None:
            break
        found.append(hole)
        here, there = hole.at + hole.length + hole.run, hole.there + hole.old + hole.run
    return found


def _short(prompt: bytes, other: bytes, here: int, there: int) -> Hole | None:
    """The nearest text that goes on, if it is very near."""
    known = other[there * TOKEN_BYTES : (there + _SHORT + _WINDOW) * TOKEN_BYTES]
    for skipped in range(_SHORT + 1):
        window = _window(prompt, here + skipped)
        if len(window) < _WINDOW * TOKEN_BYTES:
            return None
        for place in islice(_places(known, window), _TRIES):
            hole = _hole(prompt, other, here, skipped, there, place)
            if hole.run >= _LEAST:
                return hole
    return None


def _places(text: bytes, part: bytes) -> Iterator[int]:
    """Tokens at which a part begins in a text."""
    place = text.find(part)
    while place >= 0:
        if place % TOKEN_BYTES == 0:
            yield place // TOKEN_BYTES
        place = text.find(part, place + 1)


def _long(prompt: bytes, other: bytes, here: int, there: int) -> Hole | None:
    """Text that goes on further away; it must be half as long as what is skipped, or it is chance."""
    windows = {
        _window(other, there + place): place
        for place in range(_LONG - _LONG % _WINDOW, -1, -_WINDOW)
        if (there + place + _WINDOW) * TOKEN_BYTES <= len(other)
    }
    for skipped in range(_LONG):
        window = _window(prompt, here + skipped)
        if len(window) < _WINDOW * TOKEN_BYTES:
            return None
        place = windows.get(window)
        if place is None:
            continue
        back = _back(prompt, here + skipped, other, there + place, min(skipped, place))
        hole = _hole(prompt, other, here, skipped - back, there, place - back)
        if 2 * hole.run >= max(hole.length, hole.old, 2 * _SHORT):
            return hole
    return None


def _window(text: bytes, at: int) -> bytes:
    return text[at * TOKEN_BYTES : (at + _WINDOW) * TOKEN_BYTES]


def _back(prompt: bytes, here: int, other: bytes, there: int, most: int) -> int:
    """Tokens that are equal before two places."""
    found = 0
    while found < most and _one(prompt, here - found - 1) == _one(other, there - found - 1):
        found += 1
    return found


def _one(text: bytes, at: int) -> bytes:
    return text[at * TOKEN_BYTES : (at + 1) * TOKEN_BYTES]


def _hole(prompt: bytes, other: bytes, here: int, length: int, there: int, old: int) -> Hole:
    at, place = (here + length) * TOKEN_BYTES, (there + old) * TOKEN_BYTES
    run = common(prompt, at, other, place, TOKEN_BYTES, len(prompt)) // TOKEN_BYTES
    return Hole(here, length, there, old, run)
