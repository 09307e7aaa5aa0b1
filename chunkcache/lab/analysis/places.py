"""What differs between prompts, in words: what kind of thing it is, and in which line of which message."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

_CONTEXT = 24  # tokens on both sides
_SHOWN = 60  # characters
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_DAY = r"(?:mon|tues|wednes|thurs|fri|satur|sun)day"
_KINDS = {
    "time": r"\b\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:\s?[ap]m)?(?:z|[+-]\d{2}:?\d{2})?\b",
    "date": rf"\b\d{{4}}[-/.]\d{{1,2}}[-/.]\d{{1,2}}|\b\d{{1,2}}[-/.]\d{{1,2}}[-/.]\d{{2,4}}\b"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)?\s{_MONTH}(?:\s\d{{4}})?|\b{_MONTH}\s\d{{1,2}}(?:,?\s\d{{4}})?|\b{_DAY}\b",
    "identifier": r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b|\b(?=[a-z_-]*\d)[0-9a-z_-]{12,}\b",
    "address": r"\S+@\S+\.\w+|https?://\S+|\b\d{1,3}(?:\.\d{1,3}){3}\b",
    "number": r"\b\d[\d.,]*\b",
}
_PATTERNS = {kind: re.compile(pattern, re.I) for kind, pattern in _KINDS.items()}
_ROLE = re.compile(
    r"(?:<[|\uff5c]?|\[|^|\n|>)\s*(system|developer|user|human|assistant|tool)\b(?=\s*[|:<\]>\n\uff5c])",
    re.I,
)
_HEADER = re.compile(r"^(?:[|\]>:\s\uff5c]|<[^>\n]*>)*")  # the rest of what names a message


class Differing(NamedTuple):
    """A part of a prompt that others have otherwise.

    Attributes:
        text: what stands there, whole words; kind: of thing; where: message and line.
        before, after: the text around it.
    """

    text: str
    kind: str
    where: str
    before: str
    after: str


def crosses_messages(text: str) -> bool:
    """Whether a part of a prompt has the beginning of a message in it."""
    return _ROLE.search(text) is not None


def differing(
    ids: list[int], at: int, length: int, decode: Callable[[list[int]], str]
) -> Differing:
    """Describes `length` tokens from `at` on. O(tokens before)."""
    lead = decode(ids[max(0, at - _CONTEXT) : at])
    text = decode(ids[at : at + length])
    rest = decode(ids[at + length : at + length + _CONTEXT])
    line = lead.rpartition("\n")[2], text, rest.partition("\n")[0]
    before, whole, after = _whole_words(lead, text, rest)
    return Differing(_cut(whole), _kind(*line), _where(decode(ids[:at])), before, after)


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


def _kind(before: str, text: str, after: str) -> str:
    """The thing of which the text is a part, read with the rest of its line."""
    line, begin, end = before + text + after, len(before), len(before) + max(1, len(text))
    found = [
        kind
        for kind, pattern in _PATTERNS.items()
        if any(match.start() < end and match.end() > begin for match in pattern.finditer(line))
    ]
    if found[:2] == ["time", "date"]:
        return "date and time"
    return found[0] if found else "text"


def _where(before: str) -> str:
    """The message, if roles can be told, and the line in it."""
    found = next(iter(reversed([*_ROLE.finditer(before)])), None)
    begin = found.end() if found else 0
    inside = _HEADER.sub("", before[begin:]) if found else before
    line = inside.count("\n") + 1
    whose = f"the {found[1].lower()} message" if found else "the prompt"
    if found and found[1].lower() in ("system", "developer"):
        whose = "the system prompt"
    return f"line {line:,} of {whose}"


def _cut(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN else flat[: _SHOWN - 3] + "..."
