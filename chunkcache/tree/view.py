"""What a tree shows of itself: counters, names, nodes, and the check of its invariants."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from chunkcache.tree.checker import check
from chunkcache.tree.lease import Growing, Lease
from chunkcache.tree.lifetimes import Lifetimes
from chunkcache.tree.node import Node
from chunkcache.tree.structure import Structure


class View:
    """The read-only half of PrefixTree. Counters are O(1)."""

    touch: str
    _lock: threading.RLock
    _structure: Structure
    _lifetimes: Lifetimes
    _open: set[Lease | Growing]

    @property
    def names(self) -> Mapping[str, Node]:
        """Named prompts and where they end (a copy). O(names)."""
        with self._lock:
            return MappingProxyType(dict(self._structure.named))

    # -- counting and showing; every counter is O(1)

    @property
    def version(self) -> int:
        """Grows whenever a node is added, split, trimmed or dropped."""
        return self._structure.version

    @property
    def chunks(self) -> int:
        """Chunks stored."""
        return self._structure.chunks

    @property
    def leased_chunks(self) -> int:
        """Chunks on leased paths."""
        return self._structure.leased

    @property
    def pinned_chunks(self) -> int:
        """Chunks on pinned paths (some may be leased too)."""
        return self._structure.pinned

    @property
    def evictable_chunks(self) -> int:
        """Chunks that repeated eviction could free: those on no leased or pinned path."""
        with self._lock:
            return self._structure.chunks - self._structure.held

    @property
    def snapshots(self) -> int:
        """Snapshots stored."""
        return self._structure.snapshots.count

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of the snapshots stored."""
        return self._structure.snapshots.bytes

    @property
    def nodes(self) -> int:
        """Nodes stored."""
        return self._structure.nodes

    @property
    def leaves(self) -> int:
        """Nodes without children."""
        return self._structure.leaves

    def __len__(self) -> int:
        """Nodes stored, as many as iteration gives."""
        return self._structure.nodes

    def __iter__(self) -> Iterator[Node]:
        return self.walk()

    def walk(self) -> Iterator[Node]:
        """Iterate over a snapshot of all nodes, depth first, siblings in token order. O(nodes)."""
        with self._lock:
            return iter(list(self._iterate()))

    def _iterate(self) -> Iterator[Node]:
        stack = [self._structure.root]
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            keys = node.children if node._order is None else reversed(node._order)
            stack.extend(node.children[key] for key in keys)

    def check(self) -> None:
        """Walk every invariant; raise AssertionError with a dump. O(everything stored)."""
        with self._lock:
            check(self)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} nodes={self.nodes} chunks={self.chunks} "
            f"leased={self.leased_chunks} pinned={self.pinned_chunks}>"
        )
