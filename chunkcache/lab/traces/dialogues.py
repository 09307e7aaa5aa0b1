"""Chat logs as requests: what a server would have been asked, turn by turn.

Logs are JSON (a list of dialogues) or a dialogue a line. A dialogue is a list of messages, or an object
that has them under one of the usual names; messages have a role and content, or `from` and `value`.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from chunkcache.errors import TraceError
from chunkcache.lab.traces.trace import READING, BadLine, no_json, open_log, unreadable

Message = dict[str, Any]
_BEHIND = 8  # tokens of the prompt that an answer is cut behind
_LISTS = ("messages", "conversations", "conversation", "traj", "dialogue", "dialog")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# For tokenizers without a template: roles in lines of their own.
_TEMPLATE = (
    "{% if tools %}<|tools|>\n{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class Dialogue(list[Message]):
    """Messages, and the tools that went with them."""

    def __init__(self, messages: Iterable[Message] = (), tools: list[Any] | None = None):
        super().__init__(messages)
        self.tools = tools


class Turn(NamedTuple):
    """Token ids of a prompt, and of the answer that the log has; empty if it has none."""

    prompt: list[int]
    answer: list[int]


def read_dialogues(
    path: Path, on_bad: Callable[[BadLine], object] | None = None
) -> Iterator[Dialogue]:
    """The dialogues of a log, in its order; see `numbered_dialogues`."""
    return (messages for _, messages in numbered_dialogues(path, on_bad))


def numbered_dialogues(
    path: Path, on_bad: Callable[[BadLine], object] | None = None
) -> Iterator[tuple[int, Dialogue]]:
    """The dialogues of a log, in its order, and where they are in it.

    Args:
        on_bad: hears of lines (in a list: of entries, from 1 on) that are no dialogues; without it they
            raise.

    Raises:
        TraceError: the file cannot be read, or something in it is no dialogue.
    """
    for number, entry in _entries(path):
        try:
            yield number, messages_of(json.loads(entry) if isinstance(entry, bytes) else entry)
        except (ValueError, RecursionError) as error:
            why = no_json(error) if isinstance(error, json.JSONDecodeError) else str(error)
            if on_bad is None:
                raise TraceError(f"{path}, line {number}: {why}") from error
            on_bad(BadLine(number, why))


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Lines, or what a file that is one list of JSON has in it."""
    try:
        with open_log(path) as file:
            whole = _whole(path, file.read()) if ".json" in path.suffixes else None
            if whole is None:
                file.seek(0)
                lines = ((n, line) for n, line in enumerate(file, 1) if line.strip())
                yield from lines
            else:
                yield from enumerate(whole, 1)
    except READING as error:
        raise unreadable(path, error) from error


def _whole(path: Path, text: bytes) -> list[Any] | None:
    """The entries of a list; None if the text is not one JSON value."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(found, dict):
        return [found]
    if not isinstance(found, list):
        raise TraceError(f"{path} has neither a list nor an object of JSON")
    return [found] if found and all(_is_message(one) for one in found) else found


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def messages_of(entry: Any) -> Dialogue:
    """The messages of one dialogue, and its tools.

    >>> messages_of({"conversations": [{"from": "human", "value": "Hi"}]})
    [{'role': 'user', 'content': 'Hi'}]

    Raises:
        ValueError: it is no dialogue.
    """
    tools = None
    if isinstance(entry, dict):
        tools = entry["tools"] if isinstance(entry.get("tools"), list) else None
        name = next((name for name in _LISTS if isinstance(entry.get(name), list)), None)
        if name is None and isinstance(entry.get("turns"), list):  # of the user only
            return Dialogue({"role": "user", "content": str(text)} for text in entry["turns"])
        if name is None and isinstance(entry.get("prompt"), str):
            return Dialogue([{"role": "user", "content": entry["prompt"]}])
        entry = entry.get(name or "messages")
    if not isinstance(entry, list) or not entry:
        raise ValueError("no dialogue: a list of messages, or an object with one")
    return Dialogue(map(_message, entry), tools)


def _message(value: Any) -> Message:
    if not _is_message(value):
        raise ValueError("a message needs a role and content")
    role = str(value.get("role") or value.get("from"))
    content = value.get("content", value.get("value"))
    if isinstance(content, list):  # parts, of which text is kept
        texts = (part.get("text") for part in content if isinstance(part, dict))
        content = "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str | None):
        raise ValueError("the content of a message must be text")
    kept = {name: part for name, part in value.items() if name not in ("from", "value")}
    return kept | {"role": _ROLES.get(role, role), "content": content or ""}


class Asker:
    """Makes requests of dialogues.

    Args:
        tokenizer: of transformers; without a chat template, roles stand in lines of their own.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._template = None if tokenizer.chat_template else _TEMPLATE

    @property
    def plain(self) -> bool:
        """Whether the tokenizer has no chat template, so that a plain one takes its place."""
        return self._template is not None

    def turns(self, messages: Sequence[Message]) -> Iterator[Turn]:
        """What the model was asked for each answer, and once more for what is not answered."""
        ends = [n for n, one in enumerate(messages) if one["role"] == "assistant" and n]
        if not ends or ends[-1] < len(messages) - 1:
            ends.append(len(messages))
        for end in ends:
            answer = messages[end]["content"] if end < len(messages) else ""
            prompt = self._prompt(messages[:end], getattr(messages, "tools", None))
            yield Turn(prompt, answer_ids(self._tokenizer, prompt, answer))

    def _prompt(self, messages: Sequence[Message], tools: list[Any] | None) -> list[int]:
        """Raises ValueError: the template takes no such dialogue."""
        from jinja2.exceptions import TemplateError

        try:
            ids: list[int] = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools or None,
                chat_template=self._template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
            )
        except (TemplateError, TypeError, KeyError, AttributeError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"the chat template takes no such dialogue ({why})") from error
        return ids

    def all_turns(
        self, dialogues: Iterable[tuple[int, Dialogue]], on_bad: Callable[[BadLine], object]
    ) -> Iterator[Iterator[Turn]]:
        """The turns of each dialogue; `on_bad` hears of those that the template does not take."""
        for number, messages in dialogues:
            yield self._taken(number, messages, on_bad)

    def _taken(
        self, number: int, messages: Dialogue, on_bad: Callable[[BadLine], object]
    ) -> Iterator[Turn]:
        try:
            yield from self.turns(messages)
        except ValueError as error:
            on_bad(BadLine(number, str(error)))


def answer_ids(tokenizer: Any, prompt: list[int], text: str) -> list[int]:
    """Tokens of an answer behind its prompt; some tokenizers cut the beginning of a text otherwise."""
    if not text:
        return []
    last = prompt[-_BEHIND:]
    lead = tokenizer.decode(last)
    alone: list[int] = tokenizer(lead, add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer(lead + text, add_special_tokens=False)["input_ids"]
    if whole[: len(alone)] == alone:
        return whole[len(alone) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def interleave(dialogues: Iterable[Iterator[Turn]], together: int) -> Iterator[Turn]:
    """Turns of so many dialogues at once, in turns, as a server that many use would see them."""
    source = iter(dialogues)
    open_ = deque(islice(source, together))
    while open_:
        turns = open_.popleft()
        if (turn := next(turns, None)) is not None:
            yield turn
            open_.append(turns)
        elif (one := next(source, None)) is not None:
            open_.appendleft(one)
