"""A request's hold on the nodes it reads.

A lease always ends at a node's end: taking one splits the last node if only its head is needed. So
a hold never covers chunks nobody reads, and the halves of a later split inherit it exactly.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from chunkcache.errors import ReleasedLeaseError
from chunkcache.tree.node import Match, Node, Piece
from chunkcache.tree.snapshots import Resume

if TYPE_CHECKING:
    from chunkcache.tree.prefix_tree import PrefixTree


class Growing:
    """The lease of an insert in progress; it moves down as nodes are added."""

    __slots__ = ("node",)

    def __init__(self, node: Node) -> None:
        self.node = node


class Lease:
    """Nodes kept where they are until `release`; also a context manager.

    `match` is what was found when the lease was taken. `pieces` follows later splits, so that two
    leases on the same nodes show the same runs; `tree.version` tells when to look again.
    """

    __slots__ = ("__weakref__", "_tree", "match", "node")

    def __init__(self, tree: PrefixTree, match: Match) -> None:
        self._tree: PrefixTree | None = tree
        self.match = match
        self.node: Node = match.node

    @property
    def tokens(self) -> int:
        """Tokens matched. O(1)."""
        return self.match.tokens

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._tree is None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The runs to read, as the tree holds them now. O(depth).

        Raises ReleasedLeaseError after `release`.
        """
        return self._held()._pieces(self)

    def behind(self, count: int) -> list[int]:
        """At most `count` tokens that are stored behind the match; of several ways on, the newest.

        Where a prompt left what is stored, they are what would have matched. O(count). Raises
        ReleasedLeaseError after `release`.
        """
        return self._held()._behind(self, count)

    def snapshot(self, limit: int | None = None) -> Resume | None:
        """The deepest snapshot at or before `limit`, within the matched tokens; None: no such one.

        Counts as a use of that snapshot: asking under a lease means to resume from it. Who only
        wants to know asks `PrefixTree.snapshot_at`. The lease does not hold it, the reference
        does. O(depth + log). Raises ReleasedLeaseError after `release`.
        """
        return self._held()._resume(self, limit)

    def _held(self) -> PrefixTree:
        tree = self._tree
        if tree is None:
            raise ReleasedLeaseError("this lease was released; its KV may be gone")
        return tree

    def release(self) -> None:
        """Let go; again does nothing. O(depth)."""
        tree = self._tree
        if tree is not None:
            tree._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self.released else "held"
        return f"<Lease {state} tokens={self.tokens} node={self.node!r}>"
