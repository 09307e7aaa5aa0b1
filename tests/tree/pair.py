"""A tree and its oracle driven side by side; every operation compares the two."""

from __future__ import annotations

from collections import Counter

from chunkcache.tree import Lease, PrefixTree

from .oracle import NEVER, Chunks, Oracle, common, run_of


class Refused(Exception):
    """Raised by make_run on purpose."""


class Pair:
    def __init__(self, size: int, touch: str = "leaf_first") -> None:
        self.size = size
        self.now = 0.0
        self.made: Counter[tuple[int, ...]] = Counter()
        self.freed: Counter[tuple[int, ...]] = Counter()
        self.tree = PrefixTree(size, clock=lambda: self.now, on_evict=self._free, touch=touch)
        self.oracle = Oracle(size)
        self.leases: list[Lease] = []

    def _free(self, run: Chunks) -> None:
        self.freed.update(run.parts)

    def match(self, tokens, limit=None) -> None:
        found = self.tree.match(tokens, limit)
        assert (found.tokens, found.reason) == self.oracle.match(tokens, limit, self.now)
        self._compare_pieces(found.pieces, tokens, found.tokens)

    def _compare_pieces(self, pieces, tokens, matched) -> None:
        seen = []
        for piece in pieces:
            assert piece.start == len(seen)
            parts = [token for part in piece.run.parts for token in part]
            seen.extend(parts[: piece.tokens])
        assert tuple(seen) == tuple(tokens[:matched])

    def lease(self, tokens, limit=None, count=True) -> None:
        self.oracle.expire(self.now)
        expected = self.oracle.match(tokens, limit, self.now)
        lease = self.tree.lease(tokens, limit, count=count)
        assert (lease.tokens, lease.match.reason) == expected
        end = tuple(lease.node.prefix.tolist())
        assert common(end, tokens) >= lease.tokens > len(end) - self.size
        self.oracle.touch(end, hit=count)
        self.oracle.leases.append(end)
        self.leases.append(lease)

    def release(self, index: int) -> None:
        lease = self.leases.pop(index)
        end = tuple(lease.node.prefix.tolist())
        lease.release()
        lease.release()
        self.oracle.leases.remove(end)
        self.oracle.expire(self.now)

    def insert(
        self, tokens, *, short=None, stop=None, fail=None, evict=0, name=None, pin=False, ttl=None
    ) -> None:
        """short: chunks a run; stop, fail: None or an error instead of that call's run."""
        oracle, size, calls = self.oracle, self.size, 0
        oracle.expire(self.now)
        deadline = NEVER if ttl is None else self.now + ttl
        end = oracle.longest(oracle.whole(tokens))
        before = len(end)
        oracle.extend(end, deadline)
        oracle.leases.append(end)

        def make_run(first: int, count: int) -> Chunks | None:
            nonlocal calls, end
            calls += 1
            assert first * size == len(end) and count == (len(tokens) - len(end)) // size
            if evict:
                assert self.tree.evict(evict) == oracle.evict(evict, self.now)
            if calls == stop:
                return None
            if calls == fail:
                raise Refused
            given = min(count, short or count)
            for _ in range(given):
                oracle.add(tokens[: len(end) + size], deadline)
                end = tokens[: len(end) + size]
            oracle.leases[-1] = end
            run = run_of(tokens, size, first, given)
            self.made.update(run.parts)
            return run

        try:
            result = self.tree.insert(tokens, make_run, name=name, pin=pin, ttl=ttl)
        except Refused:
            result = None
        oracle.leases.pop()
        oracle.touch(end, hit=False)
        if result is None:
            return
        assert (result.tokens, result.new_tokens) == (len(end), len(end) - before)
        assert result.complete == (end == oracle.whole(tokens))
        if end and pin:
            oracle.pin(end, name, deadline)
        elif end and name is not None:
            oracle.label(end, name)

    def pin(self, tokens, name=None, ttl=None) -> None:
        self.oracle.expire(self.now)
        matched, _ = self.oracle.match(tokens, None, self.now)
        end = tokens[: matched // self.size * self.size]
        assert self.tree.pin(tokens, name, ttl) == len(end)
        if end:
            self.oracle.pin(end, name, NEVER if ttl is None else self.now + ttl)

    def unpin(self, which) -> None:
        if isinstance(which, str):
            key = (self.oracle.names.get(which), which)
            expected = self.oracle.pins.pop(key, None) is not None
        else:
            end = self.oracle.whole(which)
            expected = bool(end) and self.oracle.unpin(end)
        assert self.tree.unpin(which) == expected

    def evict(self, chunks: int) -> None:
        assert self.tree.evict(chunks) == self.oracle.evict(chunks, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def expire(self) -> None:
        assert self.tree.expire() == self.oracle.expire(self.now)

    def remove(self, tokens) -> None:
        assert self.tree.remove(tokens) == self.oracle.remove(self.oracle.whole(tokens))

    def clear(self) -> None:
        assert self.tree.clear() == self.oracle.clear()

    def check(self) -> None:
        """The tree's own invariants, and everything it shows against the oracle."""
        tree, oracle = self.tree, self.oracle
        tree.check()
        stored = oracle.stored
        assert tree.chunks == len(stored)
        assert sum(self.made.values()) - sum(self.freed.values()) == len(stored)
        held = sum(oracle.held(prefix) for prefix in stored)
        assert tree.evictable_chunks == len(stored) - held
        assert tree.leased_chunks == sum(oracle.leased(prefix) for prefix in stored)
        assert tree.pinned_chunks == sum(oracle.pinned(prefix) for prefix in stored)
        assert {k: tuple(n.prefix.tolist()) for k, n in tree.names.items()} == oracle.names
        for node in tree:
            entry = stored[tuple(node.prefix.tolist())]
            assert (node.hits, node.deadline) == (entry.hits, entry.deadline)
        for lease in self.leases:
            self._compare_pieces(lease.pieces, lease.node.prefix.tolist(), lease.tokens)

    def finish(self) -> None:
        """Release everything, clear, and find nothing left or lost."""
        while self.leases:
            self.release(0)
        self.tree.clear()
        self.tree.check()
        assert self.tree.chunks == self.tree.nodes == 0
        assert self.made == self.freed
