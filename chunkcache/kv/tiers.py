"""The colder tiers of one store of chunks: what is read from them (loader.py) and written (writer.py).

A request never waits for a write, and for a read no longer than its patience.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from chunkcache.errors import StoreError
from chunkcache.kv.loader import Loaded, Loader, States
from chunkcache.kv.saving import Path
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tier import Tier
from chunkcache.kv.writer import Writer
from chunkcache.tree import pack

_log = logging.getLogger(__name__)
_SUMS = ("loaded", "saved", "corrupt", "failed", "dropped")


class Tiers:
    """See the module. Thread-safe.

    Args:
        tiers: fastest first.
        states: of a model that is resumed from snapshots; None for others.
        patience: seconds after which a request reads no more.
        about: the model, for people who look at a store.

    Attributes:
        counts: chunks `loaded`, values `saved` and `corrupt`; paths `dropped` (the queue was full);
            calls `failed`.
    """

    def __init__(
        self,
        store: PrefixStore,
        tiers: Sequence[Tier],
        states: States | None = None,
        patience: float = 2.0,
        about: dict[str, Any] | None = None,
    ):
        self.store = store
        self.tiers = tuple(tiers)
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._writer = Writer(store, self.tiers, states, self._count, about or {})
        self._loader = Loader(store, self.tiers, states, patience, self._count, self._writer.drop)

    def _count(self, what: str, number: int) -> None:
        with self._counting:
            self.counts[what] += number

    def measure(self, compute: float) -> None:
        """Finds out what reading costs.

        Args:
            compute: seconds to compute a chunk.
        """
        for tier in self.tiers:
            try:
                tier.measure(self.store.layout, compute)
            except StoreError as error:
                self._count("failed", 1)
                _log.warning("the %s store cannot be used now: %s", tier.name, error)

    def load(self, namespace: bytes, tokens: list[int], have: int, limit: int) -> Loaded:
        """Brings chunks of the first `limit` tokens, of which `have` are stored, into the store.

        Nothing is raised for what stores do.
        """
        return self._loader.load(namespace, tokens, have, limit)

    def offer(self, namespace: bytes, tokens: Sequence[int], name: str | None = None) -> None:
        """Lets the writer save a path that has new chunks, some time; never waits."""
        self._writer.offer(Path(namespace, pack(tokens), name=name))

    def used(self, namespace: bytes, tokens: Sequence[int], hits: int) -> None:
        """Says that a path was reused, so that tiers keep it, or get it now that it is hot."""
        self._writer.used(Path(namespace, pack(tokens), hits))

    def begin(self) -> None:
        """A request runs: the writer holds back until `end`."""
        self._writer.begin()

    def end(self) -> None:
        """The request does not run any more."""
        self._writer.end()

    def save(self, namespace: bytes, tokens: Sequence[int], name: str | None = None) -> int:
        """Writes a path to the tiers that lack it, at once; returns the values written."""
        return self._writer.save(Path(namespace, pack(tokens), name=name))

    def report(self) -> dict[str, Any]:
        """What moved, and what each tier did; asks no store anything."""
        sums: dict[str, Any] = {name: self.counts[name] for name in _SUMS}
        return sums | {tier.name: tier.report() for tier in self.tiers}

    def flush(self, timeout: float) -> bool:
        """Waits until what was offered is written; whether it was."""
        return self._writer.flush(timeout)

    def close(self) -> None:
        """Lets the writer take no more; what waits is dropped, and the stores stay open."""
        self._writer.close()
