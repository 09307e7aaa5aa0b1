"""Who leaves first. A policy is one method; live trees and simulators share it unchanged.

The tree keeps the evictable leaves sorted by the answer and asks again only when a node is used, so
a policy needs no bookkeeping of its own. Only leaves ever leave, and of one request's path at most
one node is a leaf, so for a policy that orders by last use it makes no difference whether a request
touches its path root first or leaf first; the tree offers both.

Policies with several queues say in which one a node is, and from which one leaves; queues.py has them.
"""

from __future__ import annotations

import math
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


class Ageing(Policy):
    """Base of Greedy Dual policies: what leaves raises a clock, from which what is used starts anew.

    So what is not used any more grows old, whatever its merits. Cao and Irani, "Cost-aware WWW proxy
    caching algorithms", USITS 1997.
    """

    def __init__(self) -> None:
        self.clock = 0.0

    def merit(self, node: Node) -> float:
        """How long a node stays, 1 for what was used once."""
        raise NotImplementedError

    def priority(self, node: Node, now: float) -> tuple[float, int]:
        return self.clock + self.merit(node), node.tick

    def evicted(self, node: Node, chunks: int) -> None:
        self.clock = max(self.clock, node.priority[0])


class GDLF(Ageing):
    """Greedy Dual with the logarithm of the frequency: twice as many uses last one round longer.

    With the frequency itself (GDSF, LFU with ageing) what once was popular stays too long; this one is
    ahead of LRU on most traces (docs/policies.md).
    """

    def merit(self, node: Node) -> float:
        """As the base class says."""
        return 1 + math.log2(1 + node.hits)


class PGDSF(Ageing):
    """By what a token's place costs, how often it was used, and when: prefix-aware Greedy Dual.

    Computing a token behind `start` others costs as much as `1 + start / slope` tokens at the beginning,
    since attention grows. After Jin et al., "RAGCache", arXiv:2404.12457, section 5.1; Cherkasova,
    HPL-98-69R1.

    Args:
        slope: tokens behind which attention costs as much as all else.
    """

    def __init__(self, slope: float = 32_768) -> None:
        super().__init__()
        self.slope = slope

    def merit(self, node: Node) -> float:
        """As the base class says."""
        return (1 + node.hits) * (1 + node.start / self.slope)
