"""Stored prefixes of one model: a tree per namespace over one pool, and what happens under pressure.

Chunks and snapshots have a budget each, because the pool never gives slabs back: memory that one
kind frees is of no use to the other.

A tree lives as long as it holds a chunk or a snapshot, or somebody holds the tree (a lease does).
So thousands of namespaces may come and go, and a look-up leaves nothing behind. The last few trees
that became empty stay a while, since they remember why a prefix is missing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import RLock
from time import monotonic
from weakref import WeakValueDictionary

from chunkcache.kv.layout import KV, ChunkLayout
from chunkcache.kv.pool import Pool, PoolRun
from chunkcache.tree import (
    NEVER,
    Inserted,
    LeafOrder,
    Lease,
    PrefixTree,
    Run,
    Snapshot,
    SnapshotOrder,
    named_policy,
)

Blocks = Callable[[int, int], list[KV]]
Fill = Callable[[int, PoolRun], None]
_EMPTIED = 16  # empty trees that are kept to explain misses


@dataclass
class Flow:
    """Chunks and snapshots that came and went; `refused`: found no room."""

    stored: int = 0
    evicted: int = 0
    refused: int = 0
    snapshots_stored: int = 0
    snapshots_evicted: int = 0
    snapshots_refused: int = 0


class PrefixStore:
    """Finds, keeps and drops chunks and snapshots; the only place where tree and pool meet.

    Thread-safe: one lock for all trees, because an insert into one may evict from another:
    what is worth least leaves, wherever it is.

    Args:
        budget: bytes of chunks; snapshot_budget: bytes of snapshots, over all namespaces.
        policy: by name, as settings have it.

    Raises:
        ConfigError: `budget` is smaller than one chunk, or there is no such policy.
    """

    def __init__(
        self, layout: ChunkLayout, budget: int, policy: str = "lru", snapshot_budget: int = 0
    ):
        self.layout = layout
        self.pool = Pool(layout, budget)
        self.flow = Flow()
        self.snapshot_budget = snapshot_budget
        self._leaves = LeafOrder(named_policy(policy), self.pool.capacity)
        self._order = SnapshotOrder(snapshot_budget)
        self._alive: WeakValueDictionary[bytes, PrefixTree] = WeakValueDictionary()
        self._filled: dict[bytes, PrefixTree] = {}  # exactly the trees that hold something
        self._emptied: deque[PrefixTree] = deque(maxlen=_EMPTIED)
        self._lock = RLock()

    def tree(self, namespace: bytes) -> PrefixTree:
        """The tree of a namespace; a new one lives only while somebody holds or fills it."""
        with self._lock:
            tree = self._alive.get(namespace)
            if tree is None:
                tree = self._alive[namespace] = PrefixTree(
                    self.layout.chunk_size,
                    on_evict=partial(self._freed, namespace),
                    lock=self._lock,
                    on_drop=partial(self._dropped, namespace),
                    snapshot_order=self._order,
                    leaf_order=self._leaves,
                )
            return tree

    def _freed(self, namespace: bytes, run: Run) -> None:
        assert isinstance(run, PoolRun)
        self.pool.free(run)
        self.flow.evicted += len(run)
        self._settle(namespace)

    def _dropped(self, namespace: bytes, snapshot: Snapshot) -> None:
        self.flow.snapshots_evicted += 1
        self._settle(namespace)

    def _settle(self, namespace: bytes) -> None:
        """Keep a tree that holds something; let go of one that has become empty."""
        tree = self._alive[namespace]
        if tree.chunks or tree.snapshots:
            self._filled[namespace] = tree
        elif self._filled.pop(namespace, None) is not None:
            self._forget(tree)
            self._emptied.append(tree)

    def _forget(self, tree: PrefixTree) -> None:
        if tree in self._emptied:
            self._emptied.remove(tree)

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
            blocks: gives chunks `first` .. `first + count` of the sequence, per layer as many
                tensors as the layout has there, chunks first; asked only for what is not stored
                yet.

        Under pressure the least valuable unleased chunks leave; if none may, what fits is stored.
        """

        def fill(first: int, run: PoolRun) -> None:
            layers = range(len(self.layout.layers))
            for layer, block in zip(layers, blocks(first, len(run)), strict=True):
                for stored, computed in zip(run.layer(layer), block, strict=True):
                    stored.copy_(computed)

        return self.lay(namespace, tokens, fill, name=name, pin=pin, ttl=ttl)

    def lay(
        self,
        namespace: bytes,
        tokens: list[int],
        fill: Fill,
        *,
        name: str | None = None,
        pin: bool = False,
        ttl: float | None = None,
    ) -> Inserted:
        """As `publish`; `fill(first, run)` writes chunks `first` and on of the sequence into a run."""

        def make_run(first: int, count: int) -> PoolRun | None:
            run = self._room(count)
            if run is None:
                self.flow.refused += count
                return None
            try:
                fill(first, run)
            except BaseException:  # a device out of memory, say: no tree knows the run yet
                self.pool.free(run)
                raise
            self.flow.stored += len(run)
            return run

        with self._lock:
            tree = self.tree(namespace)
            try:
                return tree.insert(tokens, make_run, name=name, pin=pin, ttl=ttl)
            finally:
                self._settle(namespace)

    def extend(self, namespace: bytes, tokens: list[int], fill: Fill) -> Lease:
        """As `lay`, and holds what is stored of `tokens`, so that it cannot leave in between."""
        with self._lock:
            self.lay(namespace, tokens, fill)
            return self.hold(namespace, tokens, len(tokens))

    def _room(self, count: int) -> PoolRun | None:
        self._leaves.capacity = self.pool.capacity  # a device may have had less than it should
        lacking = count - self.pool.available
        if lacking > 0:
            lacking -= self._expire()
            self._leaves.evict(lacking)
        return self.pool.allocate(count) if self.pool.available else None

    def _expire(self) -> int:
        """Drops what is past its TTL in any tree; returns the chunks freed. O(1) if nothing is due."""
        if monotonic() < self._leaves.soonest:
            return 0
        trees = list(self._filled.values())
        freed = sum(tree.expire() for tree in trees)
        self._leaves.soonest = min((tree.next_deadline for tree in trees), default=NEVER)
        return freed

    def keep(self, namespace: bytes, tokens: list[int], position: int, snapshot: Snapshot) -> bool:
        """Stores a snapshot of the state after `position` tokens; whether it is stored now.

        The chunks before it must be stored; at position 0 none are needed. False as well if there
        is one already, or no room: the least recently used of all namespaces leave, but if too much
        is pinned (or the snapshot exceeds the whole budget), nothing leaves and it is refused.
        """
        with self._lock:
            tree = self.tree(namespace)
            try:
                kept = tree.keep(tokens, position, snapshot)
            finally:
                self._settle(namespace)
            self.flow.snapshots_stored += kept
            self.flow.snapshots_refused = self._order.refused
            return kept

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of the snapshots stored."""
        return self._order.bytes

    def drop(self, namespace: bytes) -> int:
        """Forgets a namespace as far as nobody holds it; returns the chunks freed."""
        with self._lock:
            tree = self._alive.get(namespace)
            if tree is None:
                return 0
            freed = tree.clear()
            self._forget(tree)
            return freed

    def close(self) -> None:
        """Drops all trees and gives the pool's memory back as far as nobody holds it."""
        with self._lock:
            for namespace in list(self._filled):
                self.drop(namespace)
            self._emptied.clear()
            self.pool.release()

    def trees(self) -> list[PrefixTree]:
        """All trees that hold something."""
        with self._lock:
            return list(self._filled.values())

    def check(self) -> None:
        """Walks trees and pool; every chunk and snapshot belongs to exactly one tree."""
        with self._lock:
            for tree in self._alive.values():
                tree.check()
            filled = {name for name, tree in self._alive.items() if tree.chunks or tree.snapshots}
            assert filled == set(self._filled), "a tree that holds something is not kept"
            self.pool.check()
            assert sum(tree.chunks for tree in self.trees()) == self.pool.used
            assert sum(tree.snapshot_bytes for tree in self.trees()) == self._order.bytes
