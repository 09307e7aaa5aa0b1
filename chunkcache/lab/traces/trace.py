"""Requests as they came: files of one JSON object a line, read and written line by line.

Files are of two kinds. *Blocks*: `hash_ids` name the blocks of a prompt, each id of the whole prefix up
to there, as in the traces of Mooncake (FAST 2025, arXiv:2407.00079); nobody reads text out of them.
*Tokens*: `tokens` and `answer` are the ids themselves. Both have `timestamp` (milliseconds),
`input_length` and `output_length` (tokens), and may tell more of a request: `prompt` (a name), `tenant`,
`reuse`, what the cache did that recorded it, and `seconds`, how long the prompt took. A first line with
`chunkcache_trace` says how long blocks are; Mooncake's have no such line and 512 tokens. Lines with
`cache` tell of the cache that recorded what follows.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from chunkcache.errors import InvalidTokensError, TraceError
from chunkcache.tree import TOKEN_BYTES, Packed, pack

VERSION = 1
MOONCAKE = 512  # tokens of a block
HEAD = "chunkcache_trace"
CACHE = "cache"
_DIALOGUES = ("messages", "conversations")  # a chat log, whatever else it counts
READING = (OSError, EOFError, zlib.error)  # a file, maybe a compressed one, that is damaged
_GZIP = b"\x1f\x8b"
_LONGEST = 1e9  # seconds
_LARGEST = 2**64
_NOTHING = Packed()


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt.

    Attributes:
        time: seconds, since whenever the trace counts from.
        keys: what a prefix tree compares: packed token ids, or 8 bytes a block.
        tokens: of the prompt; output: tokens generated.
        answer: keys that are stored behind those of the prompt once it was answered.
        prompt: the named prompt that it begins with; tenant: whose it is.
        reuse: what the cache did that recorded it, if one did.
        seconds: that computing took then; of prompts that were computed together, this one's share.
        first_token: seconds until its first token was known.
    """

    time: float
    keys: Packed
    tokens: int
    output: int = 0
    answer: Packed = _NOTHING
    prompt: str = ""
    tenant: str = ""
    reuse: dict[str, Any] | None = None
    seconds: float | None = None
    first_token: float | None = None


@dataclass(frozen=True)
class Form:
    """How a file names what prompts are made of.

    Attributes:
        block: tokens that one key stands for; width: bytes of a key.
        partial: whether a last block may be shorter than the others, and is stored all the same.
    """

    block: int
    width: int
    partial: bool = False

    @property
    def words(self) -> int:
        """Of the tree's, in a key."""
        return self.width // TOKEN_BYTES

    def limit(self, request: Request) -> int:
        """In the tree's words, how much of a prompt may be a hit.

        Its last token is always computed; but not where the trace's own rule lets a whole prompt be one.
        """
        if self.partial:
            return len(request.keys) // TOKEN_BYTES
        return max(0, request.tokens - 1) // self.block * self.words


TOKENS = Form(1, TOKEN_BYTES)


@dataclass(frozen=True)
class BadLine:
    """A line that is no request, by its number from 1 on, and why."""

    number: int
    why: str


@dataclass
class Trace:
    """A file of requests; each iteration reads it anew, with one line in memory.

    Args:
        block: tokens of a block, where the file does not say it.
        on_bad: hears of lines that are no requests, which are left out; without it they raise.

    Attributes:
        cache: of the last cache that was told of, as far as the file was read.

    Raises:
        TraceError: the file cannot be read or has no request; a line is no request.
    """

    path: Path
    block: int | None = None
    on_bad: Callable[[BadLine], object] | None = None
    form: Form = field(init=False)
    head: dict[str, Any] = field(init=False)
    cache: dict[str, Any] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.head, first = self._first()
        if "tokens" in first:
            self.form = TOKENS
        else:
            own = self.head.get("block_size", self.block or MOONCAKE)
            self.form = Form(own, 8, partial=HEAD not in self.head)
            if not isinstance(self.form.block, int) or self.form.block < 1:
                raise TraceError(f"{self.path}: blocks of {self.form.block!r} tokens")

    def __iter__(self) -> Iterator[Request]:
        read = _tokens if self.form is TOKENS else _blocks
        for number, line in self._lines():
            try:
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise ValueError("not an object of JSON")
                if HEAD in fields and fields == self.head:  # again, if two began the file at once
                    continue
                if _tells_of_a_cache(fields):
                    self.cache = fields[CACHE]
                    continue
                yield read(fields, self.form)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                self._bad(BadLine(number, _why(error)))

    def _first(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The line about the file, if there is one, and the first request's fields."""
        head: dict[str, Any] = {}
        for number, line in self._lines():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(fields, dict):
                continue
            if number == 1 and HEAD in fields:
                head = fields
                if head[HEAD] != VERSION:
                    raise TraceError(f"{self.path} is a trace of version {head[HEAD]!r}")
            elif _tells_of_a_cache(fields):
                self.cache = fields[CACHE]
            elif any(name in fields for name in _DIALOGUES):
                continue
            elif any(isinstance(fields.get(name), list) for name in ("tokens", "hash_ids")):
                return head, fields
        raise TraceError(f"{self.path} has no request: lines of JSON with tokens or hash_ids")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with open_log(self.path) as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, line
        except READING as error:
            raise unreadable(self.path, error) from error

    def _bad(self, line: BadLine) -> None:
        if self.on_bad is None:
            raise TraceError(f"{self.path}, line {line.number}: {line.why}")
        self.on_bad(line)


def open_log(path: Path) -> IO[bytes]:
    """A file to be read, whether it was compressed with gzip or not."""
    with open(path, "rb") as file:
        compressed = file.read(len(_GZIP)) == _GZIP
    return cast(IO[bytes], gzip.open(path)) if compressed else open(path, "rb")


def unreadable(path: Path, error: Exception) -> TraceError:
    """A file that could not be opened or read to its end."""
    why = getattr(error, "strerror", None) or str(error)
    return TraceError(f"{path} cannot be read: {why}")


def no_json(error: json.JSONDecodeError) -> str:
    """What is wrong with a line, and where in it."""
    return f"no JSON: {error.msg.removesuffix(' at')}, column {error.colno}"


def _tells_of_a_cache(fields: dict[str, Any]) -> bool:
    return isinstance(fields.get(CACHE), dict) and "input_length" not in fields


def _blocks(fields: dict[str, Any], form: Form) -> Request:
    keys = _ids(fields["hash_ids"])
    tokens = _count(fields, "input_length")
    blocks = len(keys) // form.width
    whole = tokens // form.block if not form.partial else -(-tokens // form.block)
    if blocks != whole:
        raise ValueError(f"{blocks} blocks of {form.block} for {tokens} tokens")
    return _request(fields, keys, tokens, _ids(fields.get("answer_ids", [])))


def _tokens(fields: dict[str, Any], form: Form) -> Request:
    keys = Packed(pack(fields["tokens"]))
    tokens = len(keys) // TOKEN_BYTES
    if fields.get("input_length", tokens) != tokens:
        raise ValueError(f"{tokens} ids, but input_length is {fields['input_length']!r}")
    return _request(fields, keys, tokens, pack(fields.get("answer", [])))


def _request(fields: dict[str, Any], keys: Packed, tokens: int, answer: bytes) -> Request:
    time = float(fields.get("timestamp", 0)) / 1000
    if not math.isfinite(time):
        raise ValueError("timestamp must be a number")
    return Request(
        time,
        keys,
        tokens,
        _count(fields, "output_length", 0),
        Packed(answer),
        str(fields.get("prompt") or ""),
        str(fields.get("tenant") or ""),
        _reuse(fields.get("reuse"), tokens),
        _seconds(fields, "seconds"),
        _seconds(fields, "first_token"),
    )


def _reuse(value: Any, tokens: int) -> dict[str, Any] | None:
    """A record of reuse, if it can be one of a prompt of so many tokens."""
    if value is None:
        return None
    if not isinstance(value, dict) or type(value.get("cached_tokens")) is not int:
        raise ValueError("reuse must tell cached_tokens")
    if not 0 <= value["cached_tokens"] <= tokens:
        raise ValueError(f"{value['cached_tokens']} of {tokens} tokens cannot have been cached")
    tiers = value.get("tiers") or {}
    if not isinstance(tiers, dict) or not all(
        type(count) is int and 0 <= count <= tokens for count in tiers.values()
    ):
        raise ValueError("tiers must be numbers of tokens")
    return value


def _seconds(fields: dict[str, Any], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value < _LONGEST:
        raise ValueError(f"{name} must be a time, not {value!r}")
    return float(value)


def _ids(values: Any) -> Packed:
    """Two of the tree's words each, so that any hash of 64 bits is told from any other.

    The lower one first: small ids then differ in it, and no neighbour seems to match in part.
    """
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError("hash_ids must be a list of integers")
    if values and not 0 <= min(values) <= max(values) < _LARGEST:
        raise ValueError("hash_ids must be from 0 to 2**64 - 1")
    return Packed(np.array(values, dtype="<u8").view("<u4").astype(">u4").tobytes())


def _count(fields: dict[str, Any], name: str, default: int | None = None) -> int:
    value = fields[name] if default is None else fields.get(name, default)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} must be a number of tokens, not {value!r}")
    return value


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return no_json(error)
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    if isinstance(error, InvalidTokensError):
        return str(error)
    return str(error) or type(error).__name__
