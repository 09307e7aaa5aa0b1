"""The prefix tree: which prefixes of a prompt have stored KV, and who leaves when memory is short.

One tree a namespace, for all layers. This module is the public face: a lock, a clock, and inserts.
walk.py follows a prompt, view.py shows the tree, structure.py keeps links and counters, snapshots.py
states that lie beside the chunks, lifetimes.py pins and time to live, ghosts.py why things are
missing. Look-ups are by token bytes; hashes never decide.

Rejected: a flat map of chained chunk hashes (vLLM: no longest match inside a chunk, eviction may
strand children, equality rests on the hash), splitting and touching in `match` (a look-up that
changes the tree cannot be used by reports), recursion (a tree of one-chunk nodes is as deep as a
prompt is long).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal

from chunkcache.errors import RunLengthError
from chunkcache.tree.keys import TOKEN_BYTES, common_prefix, pack, unpack
from chunkcache.tree.lease import Growing, Lease
from chunkcache.tree.lifetimes import Lifetimes, seconds_of
from chunkcache.tree.node import Inserted, Match, Miss, Node, Piece, Run, climb, pieces_to
from chunkcache.tree.order import LeafOrder
from chunkcache.tree.policies import Policy
from chunkcache.tree.snapshots import Resume, Snapshot, SnapshotOrder, Snapshots
from chunkcache.tree.structure import Structure
from chunkcache.tree.view import View
from chunkcache.tree.walk import find, walk

MakeRun = Callable[[int, int], Run | None]


class PrefixTree(View):
    """A compressed tree of token chunks. Thread-safe; callbacks run under its (reentrant) lock.

    `on_evict(run)` is told of every run that leaves; it may read the tree, not change it.
    `touch` is the order in which a request's path gets its use ticks: "leaf_first" (the tail is
    older than the head) or "root_first". `ghosts` bounds the memory that explains misses. Trees that
    share memory must share a `lock`, since an insert into one may evict from another.

    `on_drop(snapshot)` is told of every snapshot that leaves, as `on_evict` of runs. Trees with one
    budget share a `leaf_order` (instead of a policy) and a `snapshot_order` as well; otherwise a
    tree has its own, for snapshots without a limit.

    >>> tree = PrefixTree(chunk_size=2)
    >>> class Chunks(list):
    ...     def split(self, chunks): return Chunks(self[:chunks]), Chunks(self[chunks:])
    >>> tree.insert([1, 2, 3, 4, 5], lambda first, n: Chunks(range(first, first + n))).tokens
    4
    >>> tree.match([1, 2, 3, 9]).tokens
    3
    >>> with tree.lease([1, 2, 3, 4, 5, 6]) as lease:
    ...     lease.tokens, [piece.run for piece in lease.pieces], tree.evictable_chunks
    (4, [[0, 1]], 0)
    >>> tree.evict(1), tree.match([1, 2, 3, 4]).tokens, str(tree.match([1, 2, 3, 4]).reason)
    (1, 2, 'evicted')
    """

    def __init__(
        self,
        chunk_size: int = 64,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_evict: Callable[[Run], object] | None = None,
        *,
        touch: Literal["leaf_first", "root_first"] = "leaf_first",
        ghosts: int = 65_536,
        lock: threading.RLock | None = None,
        on_drop: Callable[[Snapshot], object] | None = None,
        snapshot_order: SnapshotOrder | None = None,
        leaf_order: LeafOrder | None = None,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        if touch not in ("leaf_first", "root_first"):
            raise ValueError(f"touch must be 'leaf_first' or 'root_first', not {touch!r}")
        self.chunk_size = chunk_size
        self.touch = touch
        self._clock = clock
        self._lock = lock or threading.RLock()
        if policy is not None and leaf_order is not None:
            raise ValueError("the policy of a shared leaf_order decides: leave `policy` out")
        if lock is None and leaf_order is not None:
            raise ValueError("trees that share an order must share a lock")
        snapshots = Snapshots(snapshot_order or SnapshotOrder(), on_drop)
        order = leaf_order or LeafOrder(policy)
        self._structure = Structure(chunk_size, order, on_evict, ghosts, snapshots)
        self._ttl = order.policy.ttl
        self._lifetimes = Lifetimes(self._structure)
        self._open: set[Lease | Growing] = set()

    # -- looking up

    def match(self, tokens: Any, limit: int | None = None) -> Match:
        """Return the longest stored prefix, at most `limit` tokens. Changes nothing.

        Runtime complexity: O(n) bytes compared, one dict probe a node, O(log siblings) at the end.
        """
        data = pack(tokens)
        with self._lock:
            stop = walk(self._structure, data, self._end(data, limit), self._clock())
            return Match(stop.tokens, pieces_to(stop.node, stop.tokens), stop.reason, stop.node)

    def lease(self, tokens: Any, limit: int | None = None, *, count: bool = True) -> Lease:
        """Match, touch once, and hold what matched until the lease is released.

        A node of which only the head is needed is split, so that the lease holds no more.
        `count=False` is for a request that stored the tokens itself: a use, but not a hit.
        Runtime complexity: `match` plus O(depth).
        """
        data = pack(tokens)
        with self._lock:
            now = self._clock()
            self._lifetimes.expire(now)
            stop = walk(self._structure, data, self._end(data, limit), now)
            node = self._upper(stop.node, -(-(stop.tokens - stop.node.start) // self.chunk_size))
            match = Match(stop.tokens, pieces_to(node, stop.tokens), stop.reason, node)
            lease = Lease(self, match)
            self._open.add(lease)
            self._structure.hold(node, leases=+1)
            if self._ttl is not None:
                self._lifetimes.extend(node, now + self._ttl)
            try:
                hit = stop.tokens if count else None
                self._structure.touch(node, now, self.touch == "leaf_first", hit)
            except BaseException:  # a policy's error must not leave a hold behind
                self._release(lease)
                raise
            return lease

    def _end(self, data: bytes, limit: int | None) -> int:
        return len(data) if limit is None else min(len(data), max(0, limit) * TOKEN_BYTES)

    def _upper(self, node: Node, chunks: int) -> Node:
        """Return a node that ends after `chunks` of this one's chunks, by splitting if need be."""
        if chunks == node.chunks:
            return node
        if chunks == 0:
            assert node.parent is not None
            return node.parent
        return self._structure.cut(node, chunks)

    def _pieces(self, lease: Lease) -> tuple[Piece, ...]:
        with self._lock:
            return pieces_to(lease.node, lease.tokens)

    def _behind(self, lease: Lease, count: int) -> list[int]:
        with self._lock:
            node, begin = lease.node, lease.tokens - lease.node.start
            if begin == node.token_count:
                node, begin = next(reversed(node.children.values()), node), 0
            if node is lease.node and begin == 0:
                return []
            ids = unpack(node.data[begin * TOKEN_BYTES : (begin + count) * TOKEN_BYTES])
        return [int(token) for token in ids]

    def _resume(self, lease: Lease, limit: int | None) -> Resume | None:
        end = lease.tokens if limit is None else min(limit, lease.tokens)
        snapshots = self._structure.snapshots
        with self._lock:
            entry = snapshots.deepest(lease.node, end)
            if entry is None:
                return None
            snapshots.use(entry)
            return Resume(entry.position, entry.snapshot)

    def _release(self, lease: Lease) -> None:
        with self._lock:
            if lease._tree is None:
                return
            lease._tree = None
            self._let_go(lease)
            self._lifetimes.expire(self._clock())

    def _let_go(self, hold: Lease | Growing) -> None:
        self._open.discard(hold)
        self._structure.hold(hold.node, leases=-1)
        self._lifetimes.released(climb(hold.node))

    # -- storing

    def insert(
        self,
        tokens: Any,
        make_run: MakeRun,
        *,
        name: str | None = None,
        pin: bool = False,
        ttl: float | None = None,
        limit: int | None = None,
    ) -> Inserted:
        """Store the whole chunks of `tokens` (of its first `limit`), keeping what is there.

        `make_run(first_chunk, chunks)` is asked for the missing chunks only. It may return a
        shorter run and is then asked for the rest, or None for "no memory": what is stored stays,
        and the result is not `complete`. It may call `evict`: the path is protected. If it raises,
        what was stored before stays too. A run the tree cannot use goes to `on_evict`.

        `ttl` seconds from now (or the policy's, after the last use) the nodes expire, unless another
        insert or pin gives them longer.
        `pin` holds them against eviction as long; `name` labels them, and the name moves if it was
        elsewhere. Counts as a use of the path, not as a hit.

        Runtime complexity: O(n) bytes, O(depth log nodes).
        """
        data = pack(tokens)
        deadline_in = seconds_of(self._ttl if ttl is None else ttl)
        whole = self._end(data, limit) // self._structure.chunk_bytes * self._structure.chunk_bytes
        with self._lock:
            now = self._clock()
            self._lifetimes.expire(now)
            hold = Growing(self._structure.root)
            self._open.add(hold)
            try:
                new = self._grow(hold, data, whole, make_run, now, now + deadline_in)
            finally:
                self._finish(hold, now)
            node = hold.node
            stored = node.start + node.token_count
            if stored and pin:
                self._lifetimes.pin(node, name, now + seconds_of(ttl))
            elif stored and name is not None:
                self._lifetimes.label(node, name)
            return Inserted(stored, new * self.chunk_size, node, stored * TOKEN_BYTES == whole)

    def _finish(self, hold: Growing, now: float) -> None:
        try:
            self._structure.touch(hold.node, now, self.touch == "leaf_first")
        finally:
            self._let_go(hold)

    def _grow(
        self,
        hold: Growing,
        data: bytes,
        whole: int,
        make_run: MakeRun,
        now: float,
        deadline: float,
    ) -> int:
        """Walk and extend the held path up to byte `whole`; return the chunks added."""
        size, new = self._structure.chunk_bytes, 0
        while True:
            at = self._descend(hold, data, whole)
            self._lifetimes.extend(hold.node, deadline)
            if at == whole:
                return new
            left = (whole - at) // size
            run = make_run(at // size, left)
            if run is None:
                return new
            if data[at : at + size] in hold.node.children:  # make_run itself stored it
                self._structure.free(run)
                continue
            if not 1 <= len(run) <= left:
                self._structure.free(run)
                raise RunLengthError(f"make_run gave {len(run)} chunks for {left}")
            part = data[at : at + len(run) * size]
            hold.node = self._structure.attach(hold.node, part, run, deadline, now)
            new += len(run)

    def _descend(self, hold: Growing, data: bytes, whole: int) -> int:
        """Move the hold down over what is stored already; return the byte it reached."""
        size = self._structure.chunk_bytes
        at = (hold.node.start + hold.node.token_count) * TOKEN_BYTES
        while at < whole:
            child = hold.node.children.get(data[at : at + size])
            if child is None:
                break
            if at + len(child.data) > whole or not data.startswith(child.data, at):
                left = (whole - at) // TOKEN_BYTES
                same = common_prefix(data, at // TOKEN_BYTES, child.data, 0, left)
                child = self._upper(child, same // self.chunk_size)
            self._structure.mark(child, leases=+1)
            hold.node, at = child, at + len(child.data)
        return at

    # -- snapshots

    def keep(self, tokens: Any, position: int, snapshot: Snapshot) -> bool:
        """Attach a snapshot to the stored prefix of exactly `position` tokens; whether it was.

        False if so much of `tokens` is not stored, if a snapshot is there already (the old one
        stays and counts as used), or if a budget leaves no room. `position` is a multiple of
        chunk_size; 0 is the state before the first token, which needs nothing stored. It leaves
        with the chunk that ends there, at the latest. Runtime complexity: `match` plus O(log).

        >>> class State(bytearray):
        ...     bytes = property(len)
        >>> tree = PrefixTree(chunk_size=2)
        >>> tree.insert([1, 2, 3, 4], lambda first, n: range(n)).tokens
        4
        >>> tree.keep([1, 2, 3, 4], 2, State(b"two")), tree.keep([1, 2, 3, 4], 6, State(b"six"))
        (True, False)
        >>> tree.snapshot_at([1, 2, 3, 9])
        Resume(position=2, snapshot=State(b'two'))

        Raises ValueError: `position` is negative or no multiple of chunk_size.
        """
        if position < 0 or position % self.chunk_size:
            raise ValueError(f"position must be a multiple of {self.chunk_size}, not {position}")
        data = pack(tokens)
        with self._lock:
            now = self._clock()
            self._lifetimes.expire(now)
            stop = walk(self._structure, data, self._end(data, position), now)
            if stop.tokens != position:
                return False
            return self._structure.snapshots.add(stop.node, position, snapshot)

    def snapshot_at(self, tokens: Any, limit: int | None = None) -> Resume | None:
        """Return the deepest snapshot within the match of at most `limit` tokens. Changes nothing.

        Runtime complexity: `match` plus O(log).
        """
        data = pack(tokens)
        with self._lock:
            stop = walk(self._structure, data, self._end(data, limit), self._clock())
            entry = self._structure.snapshots.deepest(stop.node, stop.tokens)
            return None if entry is None else Resume(entry.position, entry.snapshot)

    def evict_snapshots(self, size: int) -> int:
        """Free at least `size` bytes of snapshots if that many may leave; return how many were.

        Chunks stay. Least recently used first, of all trees that share the order; the head of
        snapshots.py says more. Expired nodes go before all. O(log snapshots) a snapshot.
        """
        with self._lock:
            before = self.snapshot_bytes
            self._lifetimes.expire(self._clock())
            freed = before - self.snapshot_bytes
            return freed + self._structure.snapshots.order.evict(size - freed)

    # -- leaving

    def evict(self, chunks: int) -> int:
        """Free at least `chunks` chunks if that many may leave; return how many were freed.

        The least valuable leaf nobody holds goes first, of all trees that share the order, from
        its tail: a long leaf loses only what is needed. What expired in this tree goes before all.
        Runtime complexity: O(log leaves) a leaf.
        """
        with self._lock:
            freed = self._lifetimes.expire(self._clock())
            return freed + self._structure.order.evict(chunks - freed)

    @property
    def next_deadline(self) -> float:
        """When something ends here next, by the tree's clock; infinity if nothing does. O(1)."""
        with self._lock:
            return self._lifetimes.next_deadline

    def expire(self) -> int:
        """Drop what is past its TTL; return the chunks freed. O(1) if nothing is due."""
        with self._lock:
            return self._lifetimes.expire(self._clock())

    def remove(self, tokens: Any) -> int:
        """Drop the last whole chunk of `tokens` and all below, pinned or not; return the chunks.

        Drops nothing if it is not stored or any of it is leased. O(n + nodes dropped).
        """
        data = pack(tokens)
        with self._lock:
            found = find(self._structure, data)
            if found is None or found[0].leases:
                return 0
            node, chunks = found
            if chunks > 1:
                self._structure.cut(node, chunks - 1)  # `node` is the lower half now
            return self._lifetimes.drop(node, Miss.EVICTED)

    def clear(self) -> int:
        """End all pins and drop everything that is not leased; return the chunks. O(nodes).

        Snapshots leave under leases too: these do not hold them.
        """
        with self._lock:
            nodes = list(self._iterate())
            for node in nodes:
                self._lifetimes.unpin_all(node)
            for node in [self._structure.root, *nodes]:
                self._structure.snapshots.clear(node)
            tops = [n for n in nodes if not n.leases and (_is_root(n.parent) or _leased(n.parent))]
            return sum(self._lifetimes.drop(top, Miss.EVICTED) for top in tops)

    # -- pins

    def pin(self, tokens: Any, name: str | None = None, ttl: float | None = None) -> int:
        """Hold the stored whole chunks of `tokens` against eviction; return how many tokens.

        The whole path is held until `unpin`, or for `ttl` seconds, after which it is as evictable
        as before. A pinned prompt does not expire either. Pins with different names add up; the
        same pin again moves its end. Runtime complexity: `match` plus O(depth).
        """
        data = pack(tokens)
        seconds = seconds_of(ttl)
        with self._lock:
            now = self._clock()
            self._lifetimes.expire(now)
            stop = walk(self._structure, data, len(data), now)
            node = self._upper(stop.node, (stop.tokens - stop.node.start) // self.chunk_size)
            if _is_root(node):
                return 0
            self._lifetimes.pin(node, name, now + seconds)
            return node.start + node.token_count

    def unpin(self, which: Any) -> bool:
        """End the pin of a name, or every pin that ends where the tokens do; whether any did.

        Runtime complexity: O(depth), and O(n) for tokens.
        """
        with self._lock:
            if isinstance(which, str):
                named = self._structure.named.get(which)
                return named is not None and self._lifetimes.unpin(named, which)
            found = find(self._structure, pack(which))
            if found is None or found[1] != found[0].chunks:
                return False
            return self._lifetimes.unpin_all(found[0])


def _is_root(node: Node | None) -> bool:
    return node is not None and node.parent is None


def _leased(node: Node | None) -> bool:
    return node is not None and node.leases > 0
