"""The slow, obviously right twin of the prefix tree: a dict from every stored prefix to its entry.

Every question is answered by looking at everything. `run_of` and `Chunks` are runs whose contents
can be checked; `State` is a snapshot; `LeafLRU` is the per-block simulator of the data README.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from chunkcache.tree import Miss

NEVER = float("inf")
Tokens = tuple[int, ...]


class Chunks:
    """A run: the token tuples of its chunks, so that a swapped or lost one is seen."""

    def __init__(self, parts: list[Tokens]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def split(self, chunks: int) -> tuple[Chunks, Chunks]:
        assert 0 < chunks < len(self.parts)
        return Chunks(self.parts[:chunks]), Chunks(self.parts[chunks:])

    def __repr__(self) -> str:
        return f"Chunks({self.parts})"


class State:
    """A snapshot; one is like no other."""

    def __init__(self, size: int = 1) -> None:
        self.bytes = size


def run_of(tokens, size: int, first: int, count: int) -> Chunks:
    edges = range(first * size, (first + count) * size, size)
    return Chunks([tuple(tokens[at : at + size]) for at in edges])


def common(a: Tokens, b: Tokens) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


@dataclass
class Entry:
    deadline: float
    tick: int = 0
    hits: int = 0


@dataclass
class Oracle:
    size: int
    stored: dict[Tokens, Entry] = field(default_factory=dict)
    gone: dict[Tokens, Miss] = field(default_factory=dict)
    leases: list[Tokens] = field(default_factory=list)
    pins: dict[tuple[Tokens, str | None], float] = field(default_factory=dict)
    names: dict[str, Tokens] = field(default_factory=dict)
    kept: dict[Tokens, State] = field(default_factory=dict)
    used: dict[State, int] = field(default_factory=dict)
    tick: int = 0

    def whole(self, tokens: Tokens) -> Tokens:
        return tokens[: len(tokens) // self.size * self.size]

    def path(self, end: Tokens) -> list[Tokens]:
        return [end[:at] for at in range(self.size, len(end) + 1, self.size)]

    def leased(self, prefix: Tokens) -> bool:
        return any(end[: len(prefix)] == prefix for end in self.leases)

    def pinned(self, prefix: Tokens) -> bool:
        return any(end[: len(prefix)] == prefix for end, _ in self.pins)

    def held(self, prefix: Tokens) -> bool:
        return self.leased(prefix) or self.pinned(prefix)

    def leaves(self) -> list[Tokens]:
        parents = {prefix[: -self.size] for prefix in self.stored}
        return [prefix for prefix in self.stored if prefix not in parents]

    def longest(self, tokens: Tokens) -> Tokens:
        """The longest stored prefix of whole chunks, expired or not."""
        best: Tokens = ()
        for prefix in self.path(tokens):
            if prefix not in self.stored:
                break
            best = prefix
        return best

    def match(self, tokens: Tokens, limit: int | None, now: float) -> tuple[int, Miss]:
        end = len(tokens) if limit is None else min(len(tokens), limit)
        live = [p for p, entry in self.stored.items() if entry.deadline > now]
        matched = max([common(p, tokens[:end]) for p in live], default=0)
        return matched, self.reason(tokens, end, matched)

    def reason(self, tokens: Tokens, end: int, matched: int) -> Miss:
        if matched == end:
            return Miss.NONE
        edge = matched // self.size * self.size + self.size
        if len(tokens) < edge:
            return Miss.TOO_SHORT
        if tokens[:edge] in self.stored:
            return Miss.EXPIRED
        return self.gone.get(tokens[:edge], Miss.NEVER_SEEN)

    def touch(self, end: Tokens, hit: bool) -> None:
        self.tick += 1
        for prefix in self.path(end):
            self.stored[prefix].tick = self.tick
            self.stored[prefix].hits += hit

    def extend(self, end: Tokens, deadline: float) -> None:
        for prefix in self.path(end):
            entry = self.stored[prefix]
            entry.deadline = max(entry.deadline, deadline)

    def add(self, prefix: Tokens, deadline: float) -> None:
        self.stored[prefix] = Entry(deadline)
        self.gone.pop(prefix, None)

    def drop(self, prefix: Tokens, why: Miss) -> None:
        del self.stored[prefix]
        for lost in [p for p in self.gone if p[: -self.size] == prefix]:
            del self.gone[lost]
        self.gone[prefix] = why
        self.kept.pop(prefix, None)
        self.names = {name: end for name, end in self.names.items() if end != prefix}

    def evict(self, chunks: int, now: float) -> int:
        freed = self.expire(now)
        while freed < chunks:
            free = [prefix for prefix in self.leaves() if not self.held(prefix)]
            if not free:
                break
            self.drop(min(free, key=lambda prefix: self.stored[prefix].tick), Miss.EVICTED)
            freed += 1
        return freed

    def expire(self, now: float) -> int:
        self.pins = {key: end for key, end in self.pins.items() if end > now}
        freed = 0
        while due := [
            p for p in self.leaves() if self.stored[p].deadline <= now and not self.leased(p)
        ]:
            for prefix in due:
                self.drop(prefix, Miss.EXPIRED)
            freed += len(due)
        return freed

    def label(self, end: Tokens, name: str) -> None:
        old = self.names.get(name)
        if old != end:
            if old is not None:
                self.pins.pop((old, name), None)
            self.names[name] = end

    def pin(self, end: Tokens, name: str | None, deadline: float) -> None:
        if name is not None:
            self.label(end, name)
        self.pins[end, name] = deadline
        self.extend(end, deadline)

    def unpin(self, end: Tokens) -> bool:
        mine = [key for key in self.pins if key[0] == end]
        for key in mine:
            del self.pins[key]
        return bool(mine)

    def remove(self, end: Tokens) -> int:
        if end not in self.stored or self.leased(end):
            return 0
        return self._drop_below(end)

    def _drop_below(self, top: Tokens) -> int:
        below = sorted((p for p in self.stored if p[: len(top)] == top), key=len, reverse=True)
        for prefix in below:
            self.unpin(prefix)
            self.drop(prefix, Miss.EVICTED)
        return len(below)

    def clear(self) -> int:
        self.pins.clear()
        self.kept.clear()
        free = [prefix for prefix in self.stored if not self.leased(prefix)]
        tops = [p for p in free if len(p) == self.size or self.leased(p[: -self.size])]
        return sum(self._drop_below(top) for top in tops)

    def resume(self, tokens: Tokens, limit: int) -> Tokens | None:
        """The longest prefix with a snapshot, of at most `limit` tokens."""
        found = [p for p in self.kept if len(p) <= limit and p == tokens[: len(p)]]
        return max(found, key=len, default=None)

    def snapshot_bytes(self) -> int:
        return sum(state.bytes for state in self.kept.values())


class LeafLRU:
    """The leaf-LRU of the data README, per block, by scanning all leaves."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used: dict[Tokens | int, int] = {}
        self.parent: dict[int, int | None] = {}
        self.children: dict[int, int] = {}
        self.tick = 0

    def request(self, blocks: list[int]) -> int:
        hits = 0
        while hits < len(blocks) and blocks[hits] in self.used:
            self.tick += 1
            self.used[blocks[hits]] = self.tick
            hits += 1
        mine = set(blocks)
        for index in range(hits, len(blocks)):
            if len(self.used) >= self.capacity and not self._evict(mine):
                break
            self.tick += 1
            self.used[blocks[index]] = self.tick
            above = blocks[index - 1] if index else None
            self.parent[blocks[index]] = above
            self.children[blocks[index]] = 0
            if above is not None:
                self.children[above] += 1
        return hits

    def _evict(self, mine: set[int]) -> bool:
        free = [b for b in self.used if not self.children[b] and b not in mine]
        if not free:
            return False
        victim = min(free, key=self.used.__getitem__)
        above = self.parent.pop(victim)
        del self.used[victim], self.children[victim]
        if above is not None:
            self.children[above] -= 1
        return True
