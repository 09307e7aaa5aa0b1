"""Who leaves first. A policy is one method; live trees and simulators share it unchanged.

The tree keeps the evictable leaves sorted by the answer and asks again only when a node is used, so
a policy needs no bookkeeping of its own. Only leaves ever leave, and of one request's path at most
one node is a leaf, so for a policy that orders by last use it makes no difference whether a request
touches its path root first or leaf first; the tree offers both.

Policies with several queues say in which one a node is, and from which one leaves; queues.py has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from chunkcache.tree.node import Node

if TYPE_CHECKING:
    from chunkcache.tree.order import LeafOrder


class Policy:
    """Base of eviction policies: override `priority`.

    Attributes:
        queues: how many there are; with several, `priority` gives `(queue, rank in it)`.
        ttl: seconds after its last use that a prefix is kept; None: no limit.
    """

    queues = 1
    ttl: float | None = None

    def priority(self, node: Node, now: float) -> Any:
        """Return a value that sorts `node` among the others; the lowest leaves first.

        Called when `node` is stored or used; `node.tick` is a use counter that never repeats
        between requests, `node.hits` counts leases, `now` is the tree's clock.
        """
        raise NotImplementedError

    def victim(self, order: LeafOrder) -> int:
        """The index of the entry of `order` that leaves next; the lowest, unless overridden."""
        return 0

    def spared(self, node: Node, order: LeafOrder) -> Any:
        """Another priority for a node that was to leave, or None: it leaves.

        Must not spare for ever what nobody uses.
        """
        return None

    def evicted(self, node: Node, chunks: int) -> None:
        """Hear that the last `chunks` chunks of `node` leave under pressure; they are still there."""


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


class TTL(LRU):
    """Least recently used first, and nothing stays that was not used for a while.

    Args:
        ttl: seconds.
    """

    def __init__(self, ttl: float) -> None:
        self.ttl = ttl


class PGDSF(Policy):
    """By what a token's place costs, how often it was used, and when: prefix-aware Greedy Dual.

    Computing a token behind `start` others costs as much as `1 + start / slope` tokens at the beginning,
    since attention grows. What leaves raises the clock, so that what is not used any more grows old.
    After Jin et al., "RAGCache", arXiv:2404.12457, section 5.1; Cherkasova, HPL-98-69R1.

    Args:
        slope: tokens behind which attention costs as much as all else.
    """

    def __init__(self, slope: float = 32_768) -> None:
        self.slope = slope
        self.clock = 0.0

    def priority(self, node: Node, now: float) -> tuple[float, int]:
        return self.clock + (1 + node.hits) * (1 + node.start / self.slope), node.tick

    def evicted(self, node: Node, chunks: int) -> None:
        self.clock = max(self.clock, node.priority[0])
