"""Values in Redis: one server, a set watched by Sentinel, or a cluster.

A value of up to PART bytes is one key. Larger ones are cut: the parts have keys of their own, and the
value's key holds only how many there are and the digest that is in their names, so parts of two
writes never mix, and a value that lost a part is a miss. All keys of a group carry the same hash tag and
so lie on one node of a cluster.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from chunkcache.errors import StoreDownError, StoreFullError
from chunkcache.stores.base import Buffer, Key, Store, Stored, StoreStats
from chunkcache.stores.redis_url import ERRORS, connect
from chunkcache.stores.scratch import Scratch

PART = 512 * 1024  # bytes; redis-py reads longer answers slowly
_PREFIX = "chunkcache"
_MAGIC = b"ckr1"
_HEAD = struct.Struct(">4sIQ")  # magic, parts, bytes of the whole value
_LARGEST = 2**32  # bytes of a value; a chunk of the largest models is a tenth of that
_DIGEST = 8  # bytes of the digest in the names of parts
_BATCH = 16 * 2**20  # bytes that are on their way at once
_PAIR = 2  # parts that are on their way at once
_PAGE = 512  # keys that are looked at together
_YOUNG = 60  # seconds after it was touched that a part may be of a value that is being written


class RedisStore(Store):
    """See the module.

    Args:
        client: of redis-py, for one server or a cluster; its time-outs bound every call.
        ttl: seconds after its last use that a value is kept; None leaves that to the server.
    """

    kind = "redis"

    def __init__(self, client: Any, ttl: float | None = None):
        self.client = client
        self.ttl = None if ttl is None else max(1, math.ceil(ttl * 1000))  # milliseconds
        self._stats = StoreStats(self.kind)
        self._scratch = Scratch()

    @staticmethod
    def open(url: str, ttl: float | None = None, timeout: float = 1.0) -> RedisStore:
        """Connects when it is first used.

        Args:
            url: redis://, rediss:// or unix:// as redis-py takes them; redis+sentinel://HOST:PORT,../NAME
                and redis+cluster://HOST:PORT,.. (rediss+ for TLS).
            timeout: seconds to connect, and to wait for an answer.

        Raises:
            ConfigError: for another URL.
        """
        return RedisStore(connect(url, timeout), ttl)

    # -- reading

    def get(self, keys: Sequence[Key]) -> list[Buffer | None]:
        """As the base class says."""
        heads = self._heads(keys)
        self._prolong([_name(key) for key, head in zip(keys, heads, strict=True) if head])
        found = self._values(keys, heads, self.ttl)
        self._drop_torn(keys, heads, found)
        hits = len(found) - found.count(None)
        self._stats.hits += hits
        self._stats.misses += len(found) - hits
        return found

    def _drop_torn(
        self,
        keys: Sequence[Key],
        heads: Sequence[bytes | None],
        found: Sequence[Buffer | None],
    ) -> None:
        """Drops what is under the keys of values that lost parts, else nobody would write them again."""
        each = zip(keys, heads, found, strict=True)
        torn = [_name(key) for key, head, value in each if head is not None and value is None]
        with suppress(StoreFullError):  # a server that is only read
            self._drop(torn)

    def peek(self, keys: Sequence[Key]) -> list[Buffer | None]:
        """As the base class says; what the server itself notes of uses is another matter."""
        return self._values(keys, self._heads(keys), None)

    def _values(
        self, keys: Sequence[Key], heads: Sequence[bytes | None], ttl: int | None
    ) -> list[Buffer | None]:
        """Whole values; the time to live of their parts begins again, if one is given."""
        found: list[Buffer | None] = []
        batch: list[tuple[Key, bytes]] = []
        waiting = 0
        for key, head in zip(keys, heads, strict=True):
            batch.append((key, head or b""))
            waiting += _length(head)
            if waiting >= _BATCH:
                found += self._whole(batch, ttl)
                batch, waiting = [], 0
        return found + self._whole(batch, ttl)

    def _heads(self, keys: Sequence[Key]) -> list[bytes | None]:
        """What is kept under the keys themselves."""

        def ask(pipe: Any) -> None:
            for key in keys:
                pipe.get(_name(key))

        return self._pipeline(ask) if keys else []

    def _whole(self, batch: Sequence[tuple[Key, bytes]], ttl: int | None) -> list[Buffer | None]:
        """Values from what was under their keys, with the parts that lie elsewhere."""
        names = [_parts(key, head) for key, head in batch]
        flat = [name for each in names for name in each]
        parts = iter(self._parts(flat, ttl))
        return [
            self._join(head, [next(parts) for _ in each])
            for (_, head), each in zip(batch, names, strict=True)
        ]

    def _parts(self, names: Sequence[str], ttl: int | None) -> list[bytes | None]:
        """Two at a time: redis-py keeps all answers of a pipeline in one buffer, which is slow to grow."""

        def ask(pipe: Any, pair: Sequence[str]) -> None:
            for name in pair:
                pipe.get(name) if ttl is None else pipe.getex(name, px=ttl)

        pairs = (names[at : at + _PAIR] for at in range(0, len(names), _PAIR))
        return [part for pair in pairs for part in self._pipeline(partial(ask, pair=pair))]

    def _join(self, head: bytes, parts: Sequence[bytes | None]) -> Buffer | None:
        """The whole value; None if anything is missing or of another length."""
        found = _head(head)
        if found is None:
            return None
        count, size = found
        pieces = parts if count else [head[_HEAD.size :]]
        there = [piece for piece in pieces if piece is not None]
        if len(there) != len(pieces) or sum(map(len, there)) != size:
            return None
        whole, at = self._scratch.take(size), 0
        for piece in there:
            whole[at : at + len(piece)] = piece
            at += len(piece)
        return whole

    def recycle(self, values: Sequence[Buffer]) -> None:
        """As the base class says."""
        self._scratch.give(values)

    def _prolong(self, names: Sequence[str]) -> None:
        if self.ttl is None or not names:
            return

        def ask(pipe: Any) -> None:
            for name in names:
                pipe.pexpire(name, self.ttl)

        self._pipeline(ask)

    def exists(self, keys: Sequence[Key]) -> list[bool]:
        """As the base class says; of a value in parts only the key itself is asked for."""

        def ask(pipe: Any) -> None:
            for key in keys:
                pipe.exists(_name(key))

        found = [bool(one) for one in self._pipeline(ask)] if keys else []
        self._prolong([_name(key) for key, there in zip(keys, found, strict=True) if there])
        return found

    # -- writing

    def put(self, values: Sequence[tuple[Key, Buffer]]) -> int:
        """As the base class says."""
        kept = 0
        batch: list[tuple[str, Buffer]] = []
        for key, value in values:
            batch += _cut(key, value)
            if sum(len(part) for _, part in batch) >= _BATCH:
                self._set(batch)
                batch = []
            kept += 1
        self._set(batch)
        self._stats.written += kept
        return kept

    def _set(self, batch: Sequence[tuple[str, Buffer]]) -> None:
        if not batch:
            return

        def ask(pipe: Any) -> None:
            for name, part in batch:
                pipe.set(name, part, px=self.ttl)

        self._pipeline(ask)

    def delete(self, keys: Sequence[Key]) -> int:
        """As the base class says."""
        heads = self._heads(keys)
        names = [_name(key) for key, head in zip(keys, heads, strict=True) if head]
        parts = [
            name for key, head in zip(keys, heads, strict=True) for name in _parts(key, head or b"")
        ]

        dropped = self._drop(names)
        self._drop(parts)
        return dropped

    def _pipeline(self, ask: Callable[[Any], None]) -> list[Any]:
        """Sends many commands at once.

        Raises:
            StoreDownError, StoreFullError
        """
        try:
            with self.client.pipeline(transaction=False) as pipe:
                ask(pipe)
                answers: list[Any] = pipe.execute()
                return answers
        except (OutOfMemoryError, ReadOnlyError) as error:
            self._stats.refused += 1
            raise StoreFullError(f"Redis takes no more values: {error}") from error
        except ResponseError as error:
            if str(error).startswith(("OOM", "MISCONF", "NOPERM")):
                self._stats.refused += 1
                raise StoreFullError(f"Redis takes no more values: {error}") from error
            raise StoreDownError(f"Redis refuses: {error}") from error
        except ERRORS as error:
            raise StoreDownError(f"Redis cannot be used: {error}") from error

    # -- looking after it

    def scan(self) -> Iterator[Stored]:
        """As the base class says; bytes are of whole values."""
        for names in self._pages():
            keys = [key for key in map(_key, names) if key is not None]
            for key, head in zip(keys, self._beginnings(keys), strict=True):
                if head:
                    yield Stored(key, _length(head), None)

    def _pages(self) -> Iterator[list[str]]:
        """Names of all keys that may be ours, many at a time; a name may come twice."""
        try:
            names = self.client.scan_iter(match=f"{_PREFIX}:*", count=_PAGE)
            while page := [name.decode("utf-8", "replace") for name in islice(names, _PAGE)]:
                yield page
        except ERRORS as error:
            raise StoreDownError(f"Redis cannot be used: {error}") from error

    def _beginnings(self, keys: Sequence[Key]) -> list[bytes]:
        """As much of what is kept under keys as tells of length and parts."""

        def ask(pipe: Any) -> None:
            for key in keys:
                pipe.getrange(_name(key), 0, _HEAD.size + _DIGEST - 1)

        return self._pipeline(ask) if keys else []

    def collect(self, dry: bool = False) -> int:
        """Drops parts that no value refers to: of values that were evicted, or never finished.

        Parts are set before the value's own key, so young ones stay. Where the server counts uses and
        no times (LFU), nobody knows which are young, and all stay: it drops them itself some day.
        """
        if "lfu" in (self.stats().policy or ""):
            return 0
        dropped = 0
        for names in self._pages():
            loose = self._loose(names)
            idle = zip(loose, self._idle(loose), strict=True)
            old = [name for name, seconds in idle if seconds >= _YOUNG]
            dropped += len(old) if dry else self._drop(old)
        return dropped

    def _loose(self, names: Sequence[str]) -> list[str]:
        """Those that are parts which no value refers to."""
        owners = {name: key for name in names if (key := _owner(name)) is not None}
        keys = list(set(owners.values()))
        heads = zip(keys, self._beginnings(keys), strict=True)
        parts = {key: set(_parts(key, head)) for key, head in heads}
        return [name for name, key in owners.items() if name not in parts[key]]

    def _idle(self, names: Sequence[str]) -> list[int]:
        """Seconds since each was touched; 0 for what is gone."""

        def ask(pipe: Any) -> None:
            for name in names:
                pipe.object("idletime", name)

        return [seconds or 0 for seconds in self._pipeline(ask)] if names else []

    def _drop(self, names: Sequence[str]) -> int:
        def ask(pipe: Any) -> None:
            for name in names:
                pipe.delete(name)

        return sum(self._pipeline(ask)) if names else 0

    def stats(self) -> StoreStats:
        """As the base class says; bytes and budget are the server's."""
        found = StoreStats(**vars(self._stats))
        try:
            memory = self.client.info("memory")
        except ERRORS as error:
            raise StoreDownError(f"Redis cannot be used: {error}") from error
        servers = [memory] if "used_memory" in memory else list(memory.values())
        found.bytes = sum(int(one["used_memory"]) for one in servers)
        found.budget = sum(int(one.get("maxmemory", 0)) for one in servers) or None
        found.policy = ", ".join(sorted({one.get("maxmemory_policy", "") for one in servers}))
        return found

    def close(self) -> None:
        """As the base class says."""
        self.client.close()


def _name(key: Key) -> str:
    return f"{_PREFIX}:{{{key.group}}}:{key.name}"


def _key(name: str) -> Key | None:
    """The key of a value; None for a part, or for what is not ours."""
    prefix, _, rest = name.partition(":")
    group, _, own = rest.partition(":")
    try:
        found = Key.parse(f"{group.strip('{}')}.{own}")
    except ValueError:
        return None
    return found if prefix == _PREFIX and _name(found) == name else None


def _owner(name: str) -> Key | None:
    """The key of the value that a part is of; None for what is no part."""
    value, _, _ = name.rpartition(":")
    value, _, digest = value.rpartition(":")
    key = _key(value)
    return key if key is not None and len(digest) == 2 * _DIGEST else None


def _cut(key: Key, value: Buffer) -> list[tuple[str, Buffer]]:
    """What to set for a value, its own key last: once that is there, all parts were."""
    view = memoryview(value)
    count = 0 if len(view) <= PART else -(-len(view) // PART)
    head = _HEAD.pack(_MAGIC, count, len(view))
    if not count:
        return [(_name(key), head + view)]
    head += hashlib.blake2b(view, digest_size=_DIGEST).digest()
    names = _parts(key, head)
    parts = [(name, view[i * PART : (i + 1) * PART]) for i, name in enumerate(names)]
    return [*((name, bytes(part)) for name, part in parts), (_name(key), head)]


def _head(head: bytes | None) -> tuple[int, int] | None:
    """Parts and bytes of a value; None if this is not the beginning of one."""
    if head is None or len(head) < _HEAD.size:
        return None
    magic, count, size = _HEAD.unpack_from(head)
    if size > _LARGEST:
        return None
    wanted = 0 if size <= PART else -(-size // PART)
    return (count, size) if magic == _MAGIC and count == wanted else None


def _length(head: bytes | None) -> int:
    found = _head(head)
    return 0 if found is None else found[1]


def _parts(key: Key, head: bytes) -> list[str]:
    """Names of the parts of a value; none if it is whole in its own key."""
    found = _head(head)
    if found is None or len(head) != _HEAD.size + _DIGEST:
        return []
    digest = head[_HEAD.size :].hex()
    return [f"{_name(key)}:{digest}:{number}" for number in range(found[0])]
