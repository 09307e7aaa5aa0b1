"""A tree and its oracle driven side by side; every operation compares the two."""

from __future__ import annotations

from collections import Counter

from chunkcache.tree import Lease, PrefixTree, SnapshotOrder

from .oracle import NEVER, Chunks, Oracle, State, Tokens, common, run_of


class Refused(Exception):
    """Raised by make_run on purpose."""


class Pair:
    def __init__(self, size: int, touch: str = "leaf_first", budget: float = NEVER) -> None:
        self.size = size
        self.now = 0.0
        self.made: Counter[tuple[int, ...]] = Counter()
        self.freed: Counter[tuple[int, ...]] = Counter()
        self.budget = budget
        self.given: list[State] = []
        self.dropped: list[State] = []
        self.tree = PrefixTree(
            size,
            clock=lambda: self.now,
            on_evict=self._free,
            touch=touch,
            on_drop=self.dropped.append,
            snapshot_order=SnapshotOrder(budget),
        )
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

    def keep(self, tokens, position: int, size: int) -> None:
        oracle, state, before = self.oracle, State(size), len(self.dropped)
        prefix = tuple(tokens[:position])
        oracle.expire(self.now)
        matched, _ = oracle.match(prefix, None, self.now)
        lost = self._lost()
        kept = self.tree.keep(tokens, position, state)
        victims = self._after(before, lost)
        if matched < position or prefix in oracle.kept:
            assert not kept and not victims
            if matched == position:
                oracle.used[oracle.kept[prefix]] = oracle.tick
            return
        oracle.kept[prefix], oracle.used[state] = state, oracle.tick
        excess = oracle.snapshot_bytes() - self.budget
        if kept:
            self.given.append(state)
            self._leave(victims, excess, {prefix})
        else:
            free = self._evictable({prefix})
            assert not victims and sum(oracle.kept[p].bytes for p in free) < excess
            del oracle.kept[prefix]

    def evict_snapshots(self, size: int) -> None:
        before, bytes_before = len(self.dropped), self.oracle.snapshot_bytes()
        self.oracle.expire(self.now)
        lost = self._lost()
        freed = self.tree.evict_snapshots(size)
        left = size - (bytes_before - self.oracle.snapshot_bytes())
        self._leave(self._after(before, lost), left, set())
        assert freed == bytes_before - self.oracle.snapshot_bytes()

    def _lost(self) -> set[State]:
        """Snapshots that the oracle has dropped and the tree not yet."""
        return set(self.given) - set(self.dropped) - set(self.oracle.kept.values())

    def _after(self, before: int, lost: set[State]) -> list[State]:
        """What the tree dropped since `before`, less what left with chunks: that goes first."""
        news = self.dropped[before:]
        assert set(news[: len(lost)]) == lost
        return news[len(lost) :]

    def _evictable(self, exempt: set[Tokens]) -> list[Tokens]:
        """All but the deepest of every pinned node, and the root's while anything is pinned."""
        kept, held = self.oracle.kept, set(exempt)
        for node in self.tree:
            if node.pins:
                end = tuple(node.prefix.tolist())
                held.add(self.oracle.resume(end, len(end)) or ())
                held.add(())
        return [prefix for prefix in kept if prefix not in held]

    def _leave(self, victims: list[State], size: float, exempt: set[Tokens]) -> None:
        """Let the tree's victims leave the oracle; each must be one that was due."""
        oracle = self.oracle
        ends = [end for end, _ in oracle.pins]
        before = [oracle.resume(end, len(end)) for end in ends]
        for victim in victims:
            free = self._evictable(exempt)
            assert size > 0 and free
            assert oracle.used[victim] == min(oracle.used[oracle.kept[p]] for p in free)
            (prefix,) = [p for p in free if oracle.kept[p] is victim]
            del oracle.kept[prefix]
            size -= victim.bytes
        assert size <= 0 or not self._evictable(exempt)
        after = [oracle.resume(end, len(end)) for end in ends]
        assert before == after, "pins stay resumable"

    def resume(self, index: int, limit=None) -> None:
        lease = self.leases[index]
        end = tuple(lease.node.prefix.tolist())
        self._compare_resume(lease.snapshot(limit), end, lease.tokens, limit, use=True)

    def snapshot_at(self, tokens, limit=None) -> None:
        matched, _ = self.oracle.match(tokens, limit, self.now)
        self._compare_resume(self.tree.snapshot_at(tokens, limit), tokens, matched, limit)

    def _compare_resume(self, found, tokens, matched, limit, use=False) -> None:
        oracle = self.oracle
        expected = oracle.resume(tokens, matched if limit is None else min(matched, limit))
        if expected is None:
            assert found is None
            return
        assert found.position == len(expected) and found.snapshot is oracle.kept[expected]
        if use:
            oracle.used[found.snapshot] = oracle.tick

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
        self._check_snapshots()
        for lease in self.leases:
            self._compare_pieces(lease.pieces, lease.node.prefix.tolist(), lease.tokens)

    def _check_snapshots(self) -> None:
        tree, kept = self.tree, self.oracle.kept
        assert (tree.snapshots, tree.snapshot_bytes) == (len(kept), self.oracle.snapshot_bytes())
        assert sum(node.snapshots for node in tree) + (() in kept) == len(kept)
        assert len(set(self.dropped)) == len(self.dropped), "none is dropped twice"
        assert set(self.given) - set(self.dropped) == set(kept.values())
        for prefix in kept:
            self.snapshot_at(prefix)

    def finish(self) -> None:
        """Release everything, clear, and find nothing left or lost."""
        while self.leases:
            self.release(0)
        self.tree.clear()
        self.tree.check()
        assert self.tree.chunks == self.tree.nodes == self.tree.snapshots == 0
        assert self.tree.snapshot_bytes == 0 and len(self.dropped) == len(self.given)
        assert self.made == self.freed
