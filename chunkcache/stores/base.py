"""What a store is: values by key, many at a time.

A store knows nothing of tensors or tokens. It may lose any value at any time (budgets, restarts,
other processes), and a value it gives back may be damaged: who reads checks. A new kind of store is
one class.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview


class Key(NamedTuple):
    """Names a value.

    Attributes:
        group: values of one group are best kept together (one namespace and first chunk); lower
            case hexadecimal digits.
        name: unique in the group; lower case hexadecimal digits, and letters behind a dot for a kind.
    """

    group: str
    name: str

    def __str__(self) -> str:
        return f"{self.group}.{self.name}"

    @staticmethod
    def parse(text: str) -> Key:
        """The inverse of `str`; raises ValueError for what is not a key."""
        if not _FORM.fullmatch(text):
            raise ValueError(f"{text!r} is not the name of a value")
        group, _, name = text.partition(".")
        return Key(group, name)


_FORM = re.compile(r"[0-9a-f]+\.[0-9a-f]{2,}(\.[a-z]+)?")


class Stored(NamedTuple):
    """What a scan says of one value; `used` in seconds since the epoch, None if it is not known."""

    key: Key
    bytes: int
    used: float | None


@dataclass
class StoreStats:
    """Sums since the store was opened, and what it holds.

    Attributes:
        values, bytes: held now; None if counting them costs too much.
        budget: bytes it may hold; None if it has no limit of its own.
        hits, misses: values that were asked for and were there, or not.
        written, evicted, expired, refused: values; refused ones found no room.
        policy: how a server makes room, in its own words.
    """

    kind: str
    values: int | None = None
    bytes: int | None = None
    budget: int | None = None
    hits: int = 0
    misses: int = 0
    written: int = 0
    evicted: int = 0
    expired: int = 0
    refused: int = 0
    policy: str | None = None

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


class Store(ABC):
    """Keeps values. Thread-safe; a call handles all keys it is given at once.

    Raises:
        StoreDownError: by any method: it cannot be reached, or does not answer in time.
        StoreFullError: by `put`: there is no room, or nothing may be written.
    """

    kind: str
    budget: int | None = None  # bytes it may hold; None if it has no limit of its own

    @abstractmethod
    def get(self, keys: Sequence[Key]) -> list[Buffer | None]:
        """The value of each key; None for one that is not whole any more. Counts as a use."""

    def recycle(self, values: Sequence[Buffer]) -> None:  # noqa: B027
        """Takes back values that `get` gave and nobody looks at any more: their memory is used again."""

    def peek(self, keys: Sequence[Key]) -> list[Buffer | None]:
        """As `get`, but no use: who looks at all values would make them all look young."""
        return self.get(keys)

    @abstractmethod
    def put(self, values: Sequence[tuple[Key, Buffer]]) -> int:
        """Keeps values, whole or not at all, and in this order; returns how many are kept now."""

    @abstractmethod
    def exists(self, keys: Sequence[Key]) -> list[bool]:
        """Whether each key has a value, which may still turn out to be damaged. Counts as a use."""

    @abstractmethod
    def delete(self, keys: Sequence[Key]) -> int:
        """Forgets values; returns how many there were."""

    @abstractmethod
    def scan(self) -> Iterator[Stored]:
        """All values, in no order; those that come or go meanwhile may be missed."""

    def collect(self, dry: bool = False) -> int:
        """Drops what expired or is no value's any more; returns how many. May run beside writers.

        Args:
            dry: only count.
        """
        return 0

    @abstractmethod
    def stats(self) -> StoreStats:
        """What it holds and did."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of connections and files; what is kept stays."""
