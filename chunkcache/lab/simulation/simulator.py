"""What a cache would hit: the live cache's tree and policies, without tensors.

A request leases what is stored of it, stores the rest and lets go, as in the live cache, where the same
calls come with computing in between. Room is made the same way too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from threading import RLock
from typing import Literal

from chunkcache.lab.traces.trace import Form, Request
from chunkcache.tree import LeafOrder, Node, Packed, Policy, PrefixTree, Run

DEVICE = "device"  # the tier that every cache has
_TREES = 1024  # of tenants, before those that are empty are dropped


class Blank:
    """A run of chunks that holds nothing."""

    __slots__ = ("_chunks",)

    def __init__(self, chunks: int):
        self._chunks = chunks

    def __len__(self) -> int:
        return self._chunks

    def split(self, chunks: int) -> tuple[Run, Run]:
        """As the tree needs it."""
        return Blank(chunks), Blank(self._chunks - chunks)


@dataclass
class Outcome:
    """Sums over requests.

    Attributes:
        prompt_tokens, hit_tokens: over all prompts.
        colder: of the hit tokens those that came from tiers behind the device, by name.
    """

    requests: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    colder: dict[str, int] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        """Hit tokens / prompt tokens; 0 without any."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def computed(self) -> int:
        """Prompt tokens that were no hits."""
        return self.prompt_tokens - self.hit_tokens

    @property
    def tiers(self) -> dict[str, int]:
        """Hit tokens by tier, the device's first."""
        return {DEVICE: self.hit_tokens - sum(self.colder.values())} | self.colder

    def add(self, request: Request, hit: int) -> None:
        """Counts one request."""
        self.requests += 1
        self.prompt_tokens += request.tokens
        self.hit_tokens += hit


class Simulator:
    """One cache of a number of chunks, a tree per tenant.

    Args:
        form: how requests name what they are made of.
        chunk: tokens of a chunk; a multiple of the trace's blocks.
        capacity: chunks; None is without limit.
        unit: of tokens, that hits are rounded down to. In a trace of tokens the live cache reuses single
            ones of a chunk that matches in part, if the model is attended to in place; None is whole chunks.
    """

    def __init__(
        self,
        form: Form,
        chunk: int,
        capacity: int | None,
        policy: Policy,
        unit: int | None = None,
        touch: Literal["leaf_first", "root_first"] = "leaf_first",
    ):
        if chunk % form.block:
            raise ValueError(f"chunks of {chunk} tokens are no multiple of blocks of {form.block}")
        self.form = form
        self.chunk = chunk
        self.capacity = float("inf") if capacity is None else capacity
        self.unit = unit or chunk
        self.outcome = Outcome()
        self.now = 0.0
        self.chunks = self.evicted = 0
        self._touch = touch
        self._order = LeafOrder(policy, self.capacity)
        self._lock = RLock()
        self._trees: dict[str, PrefixTree] = {}
        self._most = _TREES

    def request(self, request: Request) -> int:
        """Tokens that a request reuses; it is stored then. O(keys), and O(log nodes) for each node."""
        self.advance(request.time)
        tree = self._tree(request.tenant)
        with tree.lease(request.keys, self.form.limit(request)) as lease:
            hit = self._tokens(lease.tokens, request)
            tree.insert(request.keys, self._make_run)
            if request.answer:
                tree.insert(_whole(request), self._make_run)
        self.outcome.add(request, hit)
        return hit

    def run(self, requests: Iterable[Request]) -> Outcome:
        """All of them in their order."""
        for request in requests:
            self.request(request)
        return self.outcome

    def advance(self, time: float) -> None:
        """Moves the clock to a time in seconds, never back."""
        self.now = max(self.now, time)

    def match(self, request: Request) -> int:
        """Tokens that a request would reuse; changes nothing. O(keys)."""
        tree = self._trees.get(request.tenant)
        if tree is None:
            return 0
        found = tree.match(request.keys, self.form.limit(request))
        return self._tokens(found.tokens, request)

    def store(self, request: Request, words: int) -> None:
        """Stores the whole chunks of so many of a request's words, its answer's among them.

        A use of what is stored of it already, but no hit. O(keys), and O(log nodes) for each node.
        """
        tree = self._tree(request.tenant)
        with tree.lease(_whole(request), count=False):  # what lies behind those words is used too
            tree.insert(_whole(request), self._make_run, limit=words)

    def reused(self, request: Request, times: int) -> int:
        """Words of a request and its answer that are stored and were hits so often. O(keys)."""
        tree = self._trees.get(request.tenant)
        if tree is None:
            return 0
        found = tree.match(_whole(request))
        node: Node | None = found.node
        while node is not None and node.hits < times:
            node = node.parent
        return 0 if node is None else min(found.tokens, node.start + node.token_count)

    def _tokens(self, words: int, request: Request) -> int:
        tokens = words // self.form.words * self.form.block
        return min(tokens - tokens % self.unit, request.tokens)

    def _tree(self, tenant: str) -> PrefixTree:
        tree = self._trees.get(tenant)
        if tree is None:
            if len(self._trees) >= self._most:  # of many that came once, few still hold something
                self._trees = {name: one for name, one in self._trees.items() if one.chunks}
                self._most = max(_TREES, 2 * len(self._trees))
            tree = self._trees[tenant] = PrefixTree(
                self.chunk // self.form.block * self.form.words,
                clock=lambda: self.now,
                on_evict=self._freed,
                touch=self._touch,
                ghosts=0,
                lock=self._lock,
                leaf_order=self._order,
            )
        return tree

    def _make_run(self, first: int, count: int) -> Blank | None:
        free = self.capacity - self.chunks
        if free < count:
            self._expire()
            self._order.evict(count - int(self.capacity - self.chunks))
            free = self.capacity - self.chunks
        run = Blank(int(min(count, free)))
        self.chunks += len(run)
        return run if len(run) else None

    def _expire(self) -> None:
        if self.now >= self._order.soonest:
            for tree in self._trees.values():
                tree.expire()
            deadlines = (tree.next_deadline for tree in self._trees.values())
            self._order.soonest = min(deadlines, default=float("inf"))

    def _freed(self, run: Run) -> None:
        self.chunks -= len(run)
        self.evicted += len(run)


def _whole(request: Request) -> Packed:
    """The keys of a prompt and its answer."""
    return Packed(request.keys + request.answer) if request.answer else request.keys
