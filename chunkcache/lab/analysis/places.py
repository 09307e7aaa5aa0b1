"""What differs between prompts, in words: what kind of thing it is, and in which line of which message."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from chunkcache.lab.analysis.roles import Roles

_CONTEXT = 24  # tokens on both sides
_SHOWN = 60  # characters
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
_DAY = r"(?:mon|tues|wednes|thurs|fri|satur|sun)day"
_KINDS = {
    "time": r"(?<!\d)\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:\s?[ap]\.?m\b)?(?:z\b|[+-]\d{2}:?\d{2})?"
    r"|\b\d{1,2}\s?[ap]\.?m\b",
    "date": r"\b\d{4}[-/.]\d{1,2}[-/.]\d{1,2}|\b\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}\b|\d{4}年\d{1,2}月\d{1,2}日"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)?\.?\s{_MONTH}(?:\s\d{{4}})?|\b{_MONTH}\s\d{{1,2}}\b(?:,?\s\d{{4}})?|\b{_DAY}\b",
    "identifier": r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b|\b(?=[a-z_-]*\d)[0-9a-z_-]{12,}\b",
    "address": r"\S+@\S+\.\w+|https?://\S+|\b\d{1,3}(?:\.\d{1,3}){3}\b",
    "number": r"\b\d[\d.,]*\b",
}
_PATTERNS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in _KINDS.items()}


class Differing(NamedTuple):
    """A part of a prompt that others have otherwise.

    Attributes:
        text: what stands there, whole words; kinds: of thing; where: message and line.
        before, after: the text around it.
    """

    text: str
    kinds: tuple[str, ...]
    where: str
    before: str
    after: str


def differing(
    ids: list[int], at: int, length: int, decode: Callable[[list[int]], str], roles: Roles
) -> Differing:
    """Describes `length` tokens from `at` on. O(tokens before)."""
    lead = decode(ids[max(0, at - _CONTEXT) : at])
    text = decode(ids[at : at + length])
    rest = decode(ids[at + length : at + length + _CONTEXT])
    line = lead.rpartition("\n")[2], text, rest.partition("\n")[0]
    before, whole, after = _whole_words(lead, text, rest)
    return Differing(_cut(whole), _kinds(*line), _where(decode(ids[:at]), roles), before, after)


def _whole_words(lead: str, text: str, rest: str) -> tuple[str, str, str]:
    """The same three, with words that were cut put together."""
    begin = len(lead) if text[:1].isspace() else len(lead) - len(_tail(lead))
    end = 0 if text[-1:].isspace() else len(_head(rest))
    return lead[:begin], lead[begin:] + text + rest[:end], rest[end:]


def _tail(text: str) -> str:
    found = re.search(r"[\w:./+@-]*$", text)
    return found[0] if found else ""


def _head(text: str) -> str:
    found = re.match(r"[\w:./+@-]*", text)
    return found[0] if found else ""


def _kinds(before: str, text: str, after: str) -> tuple[str, ...]:
    """The things of which the text is a part, read with the rest of its line; longer text is text."""
    line, begin, end = before + text + after, len(before), len(before) + max(1, len(text))
    found = [
        kind
        for kind, pattern in _PATTERNS.items()
        if any(
            match.start() < end and match.end() > begin and len(text) <= 2 * len(match[0])
            for match in pattern.finditer(line)
        )
    ]
    return tuple(found[:2]) if found[:2] == ["time", "date"] else tuple(found[:1]) or ("text",)


def _where(before: str, roles: Roles) -> str:
    """The message, if roles can be told, and the line in it."""
    role, begin = ([("", 0)] + [(one.role, one.begin) for one in roles.messages(before)])[-1]
    line = before[begin:].count("\n") + 1
    whose = {"": "the prompt", "system": "the system prompt"}.get(role, f"the {role} message")
    return f"line {line:,} of {whose}"


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN else flat[: _SHOWN - 3] + "..."
