"""What the tree is made of and what it answers with.

A node holds the tokens of a run of whole chunks in one `bytes` and an opaque `Run` that is their
KV. Its children are found by the bytes of their first chunk in a dict; the same keys are kept
sorted once there are two, because a prompt that leaves inside a chunk shares most with a
lexicographic neighbour of its next chunk. Rejected: one node per chunk (a 100k-token prompt would
be 1,600 dict probes and as many Python objects), memoryviews into the first prompt (a split-off
head would keep the whole prompt alive).
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedList

from chunkcache.tree.keys import TOKEN_BYTES, common_prefix, unpack

if TYPE_CHECKING:
    from chunkcache.tree.snapshots import Entry

NEVER = float("inf")  # the deadline of what does not expire


class Run(Protocol):
    """The KV of consecutive chunks; opaque to the tree."""

    def __len__(self) -> int:
        """Number of chunks, at least 1."""

    def split(self, chunks: int) -> tuple[Run, Run]:
        """Return (head of `chunks` chunks, rest) without copying.

        The tree drops `self` afterwards, but a lease taken before may still read it.
        """


class Miss(enum.StrEnum):
    """Why a match ended where it did."""

    NONE = "full match"
    NEVER_SEEN = "never seen"
    TOO_SHORT = "shorter than a chunk"
    EVICTED = "evicted"
    EXPIRED = "expired"


class Piece(NamedTuple):
    """`tokens` tokens of `run`, from its first one, which is token `start` of the prompt."""

    run: Run
    start: int
    tokens: int


class Node:
    """A run of whole chunks. Everything is read-only to callers.

    Attributes: data (packed tokens), start (absolute position of the first token), run, parent
    (None: the root, or no longer stored), children (first chunk -> Node), chunks, hits (leases that
    used it), hit_tokens, tick (use counter), last_used and created (clock), leases and pins (how
    many pass through, here or below), priority (the policy's latest answer).
    """

    __slots__ = (
        "_entry", "_ghosts", "_names", "_order", "_overdue", "_pins", "_snapshots", "children",
        "chunks", "created", "data", "deadline", "hit_tokens", "hits", "last_used", "leases",
        "memo", "parent", "pins", "priority", "run", "serial", "start", "tick",
    )  # fmt: skip

    def __init__(
        self, serial: int, data: bytes, start: int, run: Run, chunks: int, parent: Node | None
    ) -> None:
        self.serial = serial
        self.data = data
        self.start = start
        self.run = run
        self.chunks = chunks
        self.parent = parent
        self.children: dict[bytes, Node] = {}
        self.hits = self.hit_tokens = self.tick = self.leases = self.pins = 0
        self.created = self.last_used = 0.0
        self.deadline = NEVER
        self.priority: Any = 0
        self.memo: Any = None  # what the policy notes; a value, since both parts of a split get it
        self._order: Any = None  # SortedList of the children's keys, from two children on
        self._entry: tuple[Any, int, Node, Any] | None = None  # its place in the eviction order
        self._ghosts: dict[bytes, Miss] | None = None  # first chunks that left from under it
        self._names: tuple[str, ...] = ()
        self._pins: dict[str | None, Any] | None = None  # pins that end here
        self._snapshots: list[Entry] | None = None  # by position
        self._overdue = False  # expired while leased: leaves with its last lease

    @property
    def token_count(self) -> int:
        """Tokens in this node's own run. Runtime complexity: O(1)."""
        return len(self.data) // TOKEN_BYTES

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """This node's own token ids. Runtime complexity: O(tokens)."""
        return unpack(self.data)

    @property
    def prefix(self) -> npt.NDArray[np.int64]:
        """All token ids from the root to this node's end. Runtime complexity: O(prefix)."""
        return unpack(b"".join(node.data for node in reversed(climb(self))))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the prompts that end here."""
        return self._names

    @property
    def snapshots(self) -> int:
        """Snapshots at positions inside this node or at its end. O(1)."""
        return len(self._snapshots or ())

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of these snapshots. O(snapshots)."""
        return sum(entry.bytes for entry in self._snapshots or ())

    @property
    def expires(self) -> float | None:
        """Clock time from which on no lookup returns it; None: never."""
        return None if self.deadline == NEVER else self.deadline

    def __repr__(self) -> str:
        end = self.start + self.token_count
        return (
            f"<Node #{self.serial} [{self.start}:{end}) chunks={self.chunks} "
            f"children={len(self.children)} leases={self.leases} pins={self.pins} "
            f"hits={self.hits} expires={self.expires} names={self._names}>"
        )


class Match(NamedTuple):
    """The longest stored prefix: `tokens` of it in `pieces`, why not more, the deepest node."""

    tokens: int
    pieces: tuple[Piece, ...]
    reason: Miss
    node: Node


class Inserted(NamedTuple):
    """`tokens` of the prompt are stored now, `new_tokens` of them since this call.

    `node` is where they end. `complete` is False when make_run ran out of memory.
    """

    tokens: int
    new_tokens: int
    node: Node
    complete: bool = True


def climb(node: Node) -> list[Node]:
    """Return the nodes from `node` up to, not including, the root. O(depth)."""
    path = []
    above: Node | None = node
    while above is not None and above.parent is not None:
        path.append(above)
        above = above.parent
    return path


def pieces_to(node: Node, tokens: int) -> tuple[Piece, ...]:
    """Return the pieces of the first `tokens` tokens on the path to `node`. O(depth)."""
    return tuple(
        Piece(step.run, step.start, min(step.token_count, tokens - step.start))
        for step in reversed(climb(node))
    )


def link(parent: Node, key: bytes, child: Node) -> None:
    """Add `child`, or put it in the place of the child of that key. O(log children)."""
    fresh = key not in parent.children
    parent.children[key] = child
    if parent._order is not None:
        if fresh:
            parent._order.add(key)
    elif len(parent.children) > 1:
        parent._order = SortedList(parent.children)


def unlink(parent: Node, key: bytes) -> None:
    """Remove the child of that key. O(log children)."""
    del parent.children[key]
    if len(parent.children) < 2:
        parent._order = None
    elif parent._order is not None:
        parent._order.remove(key)


def nearest(parent: Node, part: bytes, now: float) -> tuple[Node | None, int]:
    """Return the live child that shares most leading tokens with `part`, and how many.

    The best is a neighbour of `part` in sorted order, or beyond it if that one has expired.
    Runtime complexity: O(log children), plus the expired ones passed.
    """
    if parent._order is None:
        keys = list(parent.children)
        ranges = [range(len(keys))]
    else:
        keys = parent._order
        middle = keys.bisect_left(part)
        ranges = [range(middle - 1, -1, -1), range(middle, len(keys))]
    best: Node | None = None
    shared = 0
    for side in ranges:
        for index in side:
            child = parent.children[keys[index]]
            if child.deadline <= now:
                continue
            common = common_prefix(part, 0, child.data, 0, len(part) // TOKEN_BYTES)
            if common > shared:
                best, shared = child, common
            break
    return best, shared
