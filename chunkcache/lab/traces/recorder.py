"""Writing traces: a line for each request, of token ids or of salted hashes from which nobody reads text."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

from chunkcache.errors import TraceError
from chunkcache.lab.traces.trace import CACHE, HEAD, VERSION
from chunkcache.tree import TOKEN_BYTES, pack

_BYTES = 8  # of the hash of a block


class Log(ABC):
    """Makes lines of a trace. Thread-safe.

    Args:
        block: tokens that one hash stands for, of each prefix of a prompt; None writes the ids themselves.
        salt: without it nobody can tell whether a text he knows is in the trace, unless he can also have
            prompts of his own recorded there; random if None.

    Raises:
        TraceError: the salt is empty.
    """

    leaves = True  # the process, so that records of reuse tell no finer place than a hash

    def __init__(self, block: int | None, salt: bytes | None):
        if salt is not None and not salt:
            raise TraceError("an empty salt hides nothing")
        self.block = block
        self._salt = blake2b(salt or os.urandom(32)).digest()

    @property
    def head(self) -> bytes:
        """The first line of a trace."""
        blocks = {} if self.block is None else {"block_size": self.block}
        return _line({HEAD: VERSION} | blocks)

    def about(self, **facts: Any) -> None:
        """Adds a line about the cache that answers from now on: its size, its policy, its model.

        Raises:
            TraceError: the trace cannot be written.
        """
        self._append(_line({CACHE: facts}))

    def write(
        self,
        tokens: Sequence[int],
        answer: Sequence[int] = (),
        *,
        time: float = 0.0,
        output: int | None = None,
        prompt: str = "",
        tenant: str = "",
        reuse: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        first_token: float | None = None,
    ) -> None:
        """Adds a request. O(tokens).

        Args:
            answer: ids that are stored behind the prompt; output: tokens generated, if they are others.
            prompt: the name of what was preloaded, which is not hashed.
            time: in seconds, since whenever; the others as in `trace.Request`.

        Raises:
            TraceError: the trace cannot be written.
            InvalidTokensError
        """
        keys, rest = pack(tokens), pack(answer)
        fields: dict[str, Any] = {
            "timestamp": round(1000 * time),
            "input_length": len(keys) // TOKEN_BYTES,
            "output_length": len(rest) // TOKEN_BYTES if output is None else output,
        }
        if self.block is None:
            fields |= {"tokens": list(map(int, tokens)), "answer": list(map(int, answer))}
        else:
            hashes = self._hashes(keys + rest, self.block * TOKEN_BYTES)
            whole = len(keys) // (self.block * TOKEN_BYTES)
            fields |= {"hash_ids": hashes[:whole], "answer_ids": hashes[whole:]}
            reuse = _rounded(reuse, self.block) if self.leaves else reuse
            tenant = tenant and self._hash(tenant.encode())
        more = {"prompt": prompt, "tenant": tenant, "reuse": reuse and dict(reuse)}
        fields |= {name: value for name, value in more.items() if value}
        times = {"seconds": seconds, "first_token": first_token}
        fields |= {name: round(value, 6) for name, value in times.items() if value is not None}
        self._append(_line(fields))

    def _hash(self, data: bytes) -> str:
        return blake2b(data, digest_size=_BYTES, key=self._salt).hexdigest()

    def _hashes(self, keys: bytes, size: int) -> list[int]:
        """Of each prefix that ends with a whole block."""
        digest, found = blake2b(digest_size=_BYTES, key=self._salt), []
        for at in range(0, len(keys) - size + 1, size):
            digest.update(keys[at : at + size])
            found.append(int.from_bytes(digest.digest(), "little"))
        return found

    @abstractmethod
    def _append(self, line: bytes) -> None:
        """Adds a line."""

    def close(self) -> None:  # noqa: B027 - memory needs no end
        """Ends the trace; again does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()


class Recorder(Log):
    """A file that grows; what was written is in it when a call returns.

    Args:
        path: a new or empty file, or one that was begun with the same `block` and ids of tokens.
        block, salt: as of `Log`; equal salts make traces of several processes one. It is not in the file.

    Raises:
        TraceError: the file cannot be written, or is something else.
    """

    def __init__(self, path: Path, block: int | None = None, salt: bytes | None = None):
        super().__init__(block, salt)
        self.path = path
        self._lock = Lock()
        known = salt is not None or block is None
        try:
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            self._file.seek(0)
            first = self._file.readline()
            size = self._file.seek(0, os.SEEK_END)
            self._file.seek(max(0, size - 1))
            torn = size > 0 and self._file.read(1) != b"\n"
        except OSError as error:
            raise TraceError(f"{path} cannot be written: {error.strerror}") from error
        if first and (first != self.head or not known):
            self._file.close()
            raise TraceError(
                f"{path} is there and cannot be gone on with; name another file, or the salt of its hashes"
            )
        if not first or torn:  # whoever wrote it died in the middle of a line
            self._append(b"\n" if torn else self.head)

    def _append(self, line: bytes) -> None:
        """One call of the system, so that lines of several processes do not mix, unless a disk is full."""
        try:
            with self._lock:
                while line:
                    line = line[self._file.write(line) or 0 :]
        except (OSError, ValueError) as error:
            raise TraceError(f"{self.path} cannot be written: {error}") from error

    def close(self) -> None:
        """Ends the trace; again does nothing."""
        with self._lock:
            self._file.close()


class History(Log):
    """The last requests, in memory: salted hashes, which are worth nothing after the process has ended.

    Args:
        block: tokens of a hash; size: bytes that lines may take; the oldest leave first.
    """

    leaves = False

    def __init__(self, block: int, size: int):
        super().__init__(block, None)
        self._lock = Lock()
        self._lines: deque[bytes] = deque()
        self._about = b""
        self._left = size

    def about(self, **facts: Any) -> None:
        """The cache that answers is one of these facts."""
        self._about = _line({CACHE: facts})

    def _append(self, line: bytes) -> None:
        with self._lock:
            self._lines.append(line)
            self._left -= len(line)
            while self._left < 0 and self._lines:
                self._left += len(self._lines.popleft())

    def to_bytes(self) -> bytes:
        """A trace of what there is. O(bytes)."""
        with self._lock:
            return b"".join([self.head, self._about, *self._lines])


def _line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode() + b"\n"


def _rounded(reuse: Mapping[str, Any] | None, block: int) -> Mapping[str, Any] | None:
    """With no finer places than whole blocks."""
    if reuse is None:
        return None
    found = dict(reuse)
    for name in ("divergence", "cached_tokens"):
        if found.get(name) is not None:
            found[name] -= found[name] % block
    left, tiers = found.get("cached_tokens", 0), {}
    for tier, tokens in (found.get("tiers") or {}).items():
        tiers[tier] = min(left, tokens)
        left -= tiers[tier]
    return found | {"tiers": tiers}
