"""Who leaves first. A policy is one method; live trees and simulators share it unchanged.

The tree keeps the evictable leaves sorted by the answer and asks again only when a node is used, so
a policy needs no bookkeeping of its own. Only leaves ever leave, and of one request's path at most
one node is a leaf, so for a policy that orders by last use it makes no difference whether a request
touches its path root first or leaf first; the tree offers both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chunkcache.tree.node import Node


class Policy:
    """Base of eviction policies: override `priority`."""

    def priority(self, node: Node, now: float) -> Any:
        """Return a value that sorts `node` among the others; the lowest leaves first.

        Called when `node` is stored or used; `node.tick` is a use counter that never repeats
        between requests, `node.hits` counts leases, `now` is the tree's clock.
        """
        raise NotImplementedError

    def evicted(self, node: Node) -> None:
        """Hear that `node` left under pressure; optional, for policies that age (PGDSF)."""


class LRU(Policy):
    """Least recently used first.

    >>> from chunkcache.tree.node import Node
    >>> node = Node(1, b"", 0, None, 1, None); node.tick = 5
    >>> LRU().priority(node, 0.0)
    5
    """

    def priority(self, node: Node, now: float) -> int:
        return node.tick


class LFU(Policy):
    """Least often leased first, the older of equals."""

    def priority(self, node: Node, now: float) -> tuple[int, int]:
        return node.hits, node.tick


class Priority(Policy):
    """The caller's own rank first (higher stays longer), then last use."""

    def __init__(self, rank: Callable[[Node], float]) -> None:
        self.rank = rank

    def priority(self, node: Node, now: float) -> tuple[float, int]:
        return self.rank(node), node.tick
