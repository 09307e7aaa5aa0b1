"""Stored prefixes of one model: a tree per namespace over one pool, and what happens under pressure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock

from chunkcache.kv.layout import KV, ChunkLayout
from chunkcache.kv.pool import Pool, PoolRun
from chunkcache.tree import LFU, LRU, Inserted, Lease, Policy, PrefixTree, Run

Blocks = Callable[[int, int], list[KV]]
_POLICIES: dict[str, type[Policy]] = {"lru": LRU, "lfu": LFU}


@dataclass
class Flow:
    """Chunks that came and went."""

    stored: int = 0
    evicted: int = 0
    refused: int = 0


class PrefixStore:
    """Finds, keeps and drops chunks; the only place where tree and pool meet.

    Thread-safe: one lock for all trees, because an insert into one may evict from another.

    Raises:
        ConfigError: `budget` is smaller than one chunk.
    """

    def __init__(self, layout: ChunkLayout, budget: int, policy: str = "lru"):
        self.layout = layout
        self.pool = Pool(layout, budget)
        self.flow = Flow()
        self._policy = policy
        self._trees: dict[bytes, PrefixTree] = {}
        self._lock = RLock()

    def tree(self, namespace: bytes) -> PrefixTree:
        """The tree of a namespace, made when first asked for."""
        with self._lock:
            if namespace not in self._trees:
                self._trees[namespace] = PrefixTree(
                    self.layout.chunk_size,
                    _POLICIES[self._policy](),
                    on_evict=self._freed,
                    lock=self._lock,
                )
            return self._trees[namespace]

    def _freed(self, run: Run) -> None:
        assert isinstance(run, PoolRun)
        self.pool.free(run)
        self.flow.evicted += len(run)

    def lease(self, namespace: bytes, tokens: list[int], limit: int) -> Lease:
        """Holds the longest stored prefix of at most `limit` tokens."""
        return self.tree(namespace).lease(tokens, limit)

    def hold(self, namespace: bytes, tokens: list[int], limit: int) -> Lease:
        """As `lease`, for the request that stored the tokens itself: not a hit."""
        return self.tree(namespace).lease(tokens, limit, count=False)

    def publish(
        self,
        namespace: bytes,
        tokens: list[int],
        blocks: Blocks,
        *,
        name: str | None = None,
        pin: bool = False,
        ttl: float | None = None,
    ) -> Inserted:
        """Stores the whole chunks of `tokens`.

        Args:
            blocks: gives chunks `first` .. `first + count` of the sequence, a pair per layer; asked
                only for what is not stored yet.

        Under pressure the least valuable unleased chunks leave; if none may, what fits is stored.
        """

        def make_run(first: int, count: int) -> PoolRun | None:
            run = self._room(namespace, count)
            if run is None:
                self.flow.refused += count
                return None
            try:
                for layer, (keys, values) in enumerate(blocks(first, len(run))):
                    to_keys, to_values = run.layer(layer)
                    to_keys.copy_(keys)
                    to_values.copy_(values)
            except BaseException:  # a device out of memory, say: no tree knows the run yet
                self.pool.free(run)
                raise
            self.flow.stored += len(run)
            return run

        return self.tree(namespace).insert(tokens, make_run, name=name, pin=pin, ttl=ttl)

    def _room(self, namespace: bytes, count: int) -> PoolRun | None:
        lacking = count - self.pool.available
        if lacking > 0:
            for other, tree in list(self._trees.items()):
                if other != namespace and lacking > 0:
                    lacking -= tree.evict(lacking)
            if lacking > 0:
                self.tree(namespace).evict(lacking)
        return self.pool.allocate(count) if self.pool.available else None

    def drop(self, namespace: bytes) -> int:
        """Forgets a namespace as far as nobody holds it; returns the chunks freed."""
        with self._lock:
            tree = self._trees.get(namespace)
            if tree is None:
                return 0
            freed = tree.clear()
            if not tree.chunks:
                del self._trees[namespace]
            return freed

    def close(self) -> None:
        """Drops all trees and gives the pool's memory back as far as nobody holds it."""
        with self._lock:
            for namespace in list(self._trees):
                self.drop(namespace)
            self.pool.release()

    def trees(self) -> list[PrefixTree]:
        """All trees."""
        with self._lock:
            return list(self._trees.values())

    def check(self) -> None:
        """Walks trees and pool; every chunk in use belongs to exactly one tree."""
        for tree in self.trees():
            tree.check()
        self.pool.check()
        assert sum(tree.chunks for tree in self.trees()) == self.pool.used
