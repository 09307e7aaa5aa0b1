"""Values in this process's memory, least recently used first out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from time import time

from chunkcache.stores.base import Buffer, Key, Store, Stored, StoreStats


class MemoryStore(Store):
    """See the module.

    Args:
        budget: bytes of values.
        allocate: memory to keep a value in (pinned, for a GPU); plain bytes without it.
    """

    kind = "memory"
    budget: int

    def __init__(self, budget: int, allocate: Callable[[int], memoryview] | None = None):
        self.budget = budget
        self._allocate = allocate
        self._values: OrderedDict[Key, tuple[Buffer, float]] = OrderedDict()
        self._lock = Lock()
        self._stats = StoreStats(self.kind, 0, 0, budget)

    def get(self, keys: Sequence[Key]) -> list[Buffer | None]:
        """As the base class says."""
        with self._lock:
            self._use(keys)
            found = [self._values.get(key) for key in keys]
            hits = sum(one is not None for one in found)
            self._stats.hits += hits
            self._stats.misses += len(keys) - hits
            return [None if one is None else one[0] for one in found]

    def peek(self, keys: Sequence[Key]) -> list[Buffer | None]:
        """As the base class says."""
        with self._lock:
            found = [self._values.get(key) for key in keys]
            return [None if one is None else one[0] for one in found]

    def _use(self, keys: Sequence[Key]) -> None:
        """The first key was used last, so that a prompt's end leaves before its beginning."""
        for key in reversed(keys):
            if key in self._values:
                self._values[key] = (self._values[key][0], time())
                self._values.move_to_end(key)

    def put(self, values: Sequence[tuple[Key, Buffer]]) -> int:
        """As the base class says."""
        kept = 0
        for key, value in values:
            if len(value) > self.budget:
                self._stats.refused += 1
                continue
            copy = self._copy(value)
            with self._lock:
                self._drop(key)
                self._values[key] = (copy, time())
                self._count(+1, len(copy))
                self._stats.written += 1
                kept += 1
        with self._lock:
            self._use([key for key, _ in values])
            while self._held > self.budget:
                self._drop(next(iter(self._values)))
                self._stats.evicted += 1
        return kept

    def _copy(self, value: Buffer) -> Buffer:
        if self._allocate is None:
            return bytes(value)
        memory = self._allocate(len(value))
        memory[:] = value
        return memory

    @property
    def _held(self) -> int:
        assert self._stats.bytes is not None
        return self._stats.bytes

    def _count(self, values: int, size: int) -> None:
        assert self._stats.values is not None and self._stats.bytes is not None
        self._stats.values += values
        self._stats.bytes += values * size

    def _drop(self, key: Key) -> bool:
        found = self._values.pop(key, None)
        if found is not None:
            self._count(-1, len(found[0]))
        return found is not None

    def exists(self, keys: Sequence[Key]) -> list[bool]:
        """As the base class says."""
        with self._lock:
            self._use(keys)
            return [key in self._values for key in keys]

    def delete(self, keys: Sequence[Key]) -> int:
        """As the base class says."""
        with self._lock:
            return sum(self._drop(key) for key in keys)

    def scan(self) -> Iterator[Stored]:
        """As the base class says."""
        with self._lock:
            found = [Stored(key, len(value), used) for key, (value, used) in self._values.items()]
        yield from found

    def stats(self) -> StoreStats:
        """As the base class says."""
        with self._lock:
            return StoreStats(**vars(self._stats))

    def close(self) -> None:
        """As the base class says, but nothing stays."""
        with self._lock:
            self._values.clear()
            self._stats.values = self._stats.bytes = 0
