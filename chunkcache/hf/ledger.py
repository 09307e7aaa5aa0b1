"""What requests leave behind: records, sums, and a view of what is stored."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from chunkcache.attention.groups import Decisions
from chunkcache.config import Config
from chunkcache.hf.carrier import Carried
from chunkcache.hf.prefill import Around, Row
from chunkcache.hf.probe import Proof, exactness
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tiers import Tiers
from chunkcache.lab.analysis.pace import Pace
from chunkcache.lab.records import Reuse, Stats, TreeRow
from chunkcache.tree import Node, PrefixTree
from chunkcache.tree.keys import TOKEN_BYTES, common_prefix, unpack

_SHOWN = 32  # tokens of a node that are decoded for people
_BEFORE = 6  # tokens of what is alike that are shown, so that what differs can be understood


class Ledger:
    """Sums over all requests of one wrapper. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._local = threading.local()
        self._last: list[Reuse] = []
        self._seen: list[tuple[Reuse, Around]] = []
        self._running: dict[int, Carried] = {}
        self._sums: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._tiers: Counter[str] = Counter()
        self._named: dict[str, Counter[str]] = {}
        self._pace = Pace()

    def begin(self) -> None:
        """This thread's last request is no longer its last."""
        self._local.last, self._local.seen = [], []

    @contextmanager
    def running(self, carried: Carried) -> Iterator[None]:
        """The tails of a request are part of the statistics while it runs."""
        with self._lock:
            self._running[id(carried)] = carried
        try:
            yield
        finally:
            with self._lock:
                del self._running[id(carried)]

    def note(self, rows: list[Row], seconds: float) -> None:
        """Counts the prompts of a request, whose first token took so long."""
        self.record([row.reuse for row in rows], [row.names for row in rows])
        seen = [(row.reuse, row.around) for row in rows]
        self._local.seen = seen
        with self._lock:
            self._seen = seen
            self._pace.add(sum(row.reuse.computed_tokens for row in rows), seconds)

    def record(self, records: list[Reuse], names: Sequence[tuple[str, ...]] = ()) -> None:
        """Counts prompts by their records; `names`: of what was preloaded for each."""
        self._local.last = records
        with self._lock:
            self._last = records
            for reuse in records:
                self._sums["requests"] += 1
                self._sums["prompt"] += reuse.prompt_tokens
                self._sums["cached"] += reuse.cached_tokens
                self._misses[reuse.reason] += reuse.computed_tokens
                self._tiers.update(reuse.tiers)
            for reuse, known in zip(records, names, strict=False):
                for name in known:
                    counts = self._named.setdefault(name, Counter())
                    counts["requests"] += 1
                    counts["cached_tokens"] += reuse.cached_tokens

    def generated(self, tokens: int) -> None:
        """Counts tokens of answers."""
        with self._lock:
            self._sums["generated"] += tokens

    @property
    def last(self) -> list[Reuse]:
        """Of this thread's last request, else of anybody's."""
        return list(getattr(self._local, "last", self._last))

    @property
    def seen(self) -> list[tuple[Reuse, Around]]:
        """Where the prompts of that request left what is stored."""
        return list(getattr(self._local, "seen", self._seen))

    def stats(
        self,
        model: str,
        settings: Config,
        proof: Proof,
        store: PrefixStore,
        decisions: Decisions,
        tiers: Tiers | None = None,
    ) -> Stats:
        """The sums, and what is stored now."""
        trees = store.trees()
        with self._lock:
            tails = [carried.tail_bytes for carried in self._running.values()]
            return Stats(
                model=model,
                mode=settings.mode,
                exactness=exactness(proof, settings.mode),
                kernel=proof.kernel,
                tier=proof.tier,
                chunk_size=store.layout.chunk_size,
                token_bytes=store.layout.token_bytes,
                requests=self._sums["requests"],
                prompt_tokens=self._sums["prompt"],
                cached_tokens=self._sums["cached"],
                generated_tokens=self._sums["generated"],
                tenant=settings.tenant,
                tiers={tier: tokens for tier, tokens in self._tiers.items() if tokens},
                token_seconds=self._pace.token_seconds,
                miss_tokens=dict(self._misses),
                named={name: dict(counts) for name, counts in self._named.items()},
                nodes=sum(tree.nodes for tree in trees),
                chunks=store.pool.used,
                bytes=store.pool.used_bytes,
                capacity_bytes=store.pool.capacity_bytes,
                leased_chunks=sum(tree.leased_chunks for tree in trees),
                pinned_chunks=sum(tree.pinned_chunks for tree in trees),
                evictable_chunks=sum(tree.evictable_chunks for tree in trees),
                tail_bytes=sum(tails),
                stored_chunks=store.flow.stored,
                evicted_chunks=store.flow.evicted,
                refused_chunks=store.flow.refused,
                phase_one=decisions.grouped,
                phase_one_refused=decisions.refused,
                snapshots=sum(tree.snapshots for tree in trees),
                snapshot_bytes=store.snapshot_bytes,
                snapshot_capacity_bytes=store.snapshot_budget,
                stored_snapshots=store.flow.snapshots_stored,
                evicted_snapshots=store.flow.snapshots_evicted,
                refused_snapshots=store.flow.snapshots_refused,
                stores={} if tiers is None else tiers.report(),
            )


def tree_rows(
    tree: PrefixTree, token_bytes: int, decode: Callable[[list[int]], str]
) -> Iterator[TreeRow]:
    """The nodes of a tree, depth first.

    Args:
        token_bytes: KV of one token; decode: from ids to text.
    """
    now = time.monotonic()
    nodes = list(tree.walk())
    alike = _alike(nodes)
    depths: dict[int, int] = {}
    for node in nodes:
        skipped = max(0, alike[id(node)] - _BEFORE)
        depth = depths[id(node)] = depths.get(id(node.parent), -1) + 1
        yield TreeRow(
            depth,
            node.start,
            node.token_count,
            node.token_count * token_bytes,
            node.hits,
            now - node.last_used,
            node.pins > 0,
            node.leases,
            node.names,
            "device",
            decode(_first_tokens(node, skipped)),
            node.snapshots,
            node.snapshot_bytes,
            skipped,
            node.hit_tokens,
        )


def _alike(nodes: Sequence[Node]) -> Counter[int]:
    """Tokens that a node and its most similar sibling both begin with, by the node's id.

    `nodes` come depth first, siblings in token order, so that the most similar one is a neighbour.
    """
    alike: Counter[int] = Counter()
    latest: dict[int, Node] = {}
    for node in nodes:
        before = latest.get(id(node.parent))
        if before is not None:
            most = min(before.token_count, node.token_count)
            shared = common_prefix(before.data, 0, node.data, 0, most)
            for one in (before, node):
                alike[id(one)] = max(alike[id(one)], shared)
        latest[id(node.parent)] = node
    return alike


def _first_tokens(node: Node, skipped: int) -> list[int]:
    shown = node.data[skipped * TOKEN_BYTES : (skipped + _SHOWN) * TOKEN_BYTES]
    return [int(token) for token in unpack(shown)]
