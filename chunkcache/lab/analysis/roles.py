"""Whose message a part of a prompt is in, read off the marks that chat templates write.

There is no common way to mark messages, so the marks of the usual templates are known by their looks; in a
prompt without any of them, lines that begin with a role and a colon are marks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

_ROLES = "system|developer|user|human|assistant|model|chatbot|bot|tool|function|observation|ipython"
_MARK = re.compile(
    rf"<[|\uff5c](?P<alone>{_ROLES})(?:_token)?[|\uff5c]>"
    r"|<[|\uff5c]?(?:im_start|start_header_id|start_of_role|start_of_turn|start)[|\uff5c]?>\s*"
    rf"(?P<named>{_ROLES})\b(?:<[|\uff5c]?(?:end_header_id|end_of_role|message)[|\uff5c]?>)?"
    r"|\[(?P<square>/?INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS)\]|<<(?P<sys>SYS)>>",
    re.IGNORECASE,
)
_PLAIN = re.compile(
    rf"(?:^|\n)(?:#+ ?)?(?P<line>{_ROLES}|instruction|response)\s*:|(?<=\s)(?P<upper>USER|ASSISTANT):",
)
_PLAIN_ANY = re.compile(_PLAIN.pattern, re.IGNORECASE)
_USUAL = {
    "developer": "system", "sys": "system", "system_prompt": "system", "available_tools": "system",
    "human": "user", "inst": "user", "instruction": "user",
    "model": "assistant", "chatbot": "assistant", "bot": "assistant", "/inst": "assistant",
    "response": "assistant", "tool_calls": "assistant",
    "function": "tool", "observation": "tool", "ipython": "tool", "tool_results": "tool",
}  # fmt: skip
_LOOKED = (256, 1024, 4096)  # tokens back for a mark, before all of a prompt is read
GENERATED = ("assistant", "tool")  # whose messages no template fills in


class Message(NamedTuple):
    """The beginning of one: whose it is, and where its content begins."""

    role: str
    begin: int


class Roles:
    """Finds messages.

    Args:
        samples: prompts, by which it is told how messages are marked.
    """

    def __init__(self, samples: list[str]):
        self._pattern = _MARK if any(map(_MARK.search, samples)) else _PLAIN_ANY

    def messages(self, text: str) -> list[Message]:
        """Those that begin in a text."""
        return [
            Message(_role(found), _content(text, found)) for found in self._pattern.finditer(text)
        ]

    def at(self, ids: list[int], place: int, decode: Callable[[list[int]], str]) -> str:
        """Whose message a token is in; empty if nobody can tell. O(length of the message)."""
        for back in (*_LOOKED, place):
            found = self.messages(decode(ids[max(0, place - back) : place]))
            if found or back >= place:
                return found[-1].role if found else ""
        return ""


def _role(found: re.Match[str]) -> str:
    name = next(value for value in found.groupdict().values() if value is not None).lower()
    return _USUAL.get(name, name)


def _content(text: str, found: re.Match[str]) -> int:
    """Where content begins: templates write a line break behind a mark, or two."""
    begin = found.end()
    breaks = 2 if "header_id" in found[0] else 1
    while breaks and text[begin : begin + 1] == "\n":
        begin, breaks = begin + 1, breaks - 1
    return begin
