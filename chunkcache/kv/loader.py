"""From colder tiers into the pool: what a prompt needs behind its match.

Tiers are asked in order, each from where the one before ended. Values are checked, and the first that
is missing or damaged ends a tier's part. While one batch is checked and laid into the pool, the next one
is read. Both are done by several threads: half of the time goes into memory that is touched for the
first time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol, TypeVar

import torch

from chunkcache.errors import CorruptValueError, StoreError
from chunkcache.kv.codec import Identity, decode_chunk, decode_state, identities
from chunkcache.kv.layout import KV, ChunkLayout
from chunkcache.kv.pool import PoolRun
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tier import Tier, batch_of
from chunkcache.stores.base import Buffer
from chunkcache.tree import Lease, Snapshot, pack

_log = logging.getLogger(__name__)
_THREADS = 4
Result = TypeVar("Result")
Count = Callable[[str, int], None]
Values = Sequence[Buffer | None]
Reading = Callable[[], Values]


class States(Protocol):
    """How a model's snapshots become tensors and JSON, and snapshots again."""

    def take_apart(self, snapshot: Any) -> tuple[Sequence[torch.Tensor], Any]:
        """Tensors, and the rest as JSON; raises TypeError if there is more."""

    def put_together(self, tensors: tuple[torch.Tensor, ...], plain: Any) -> Snapshot:
        """The inverse."""


@dataclass
class Loaded:
    """What came from colder tiers for one prompt.

    Attributes:
        tokens: by the name of the tier; reason: why not more, if stores are to blame.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    reason: str | None = None

    def add(self, other: Loaded) -> None:
        """Counts what came before for the same prompt."""
        for name, count in other.tokens.items():
            self.tokens[name] = self.tokens.get(name, 0) + count


class Loader:
    """See the module. Thread-safe.

    Args:
        patience: seconds after which one load asks for nothing more.
        count: adds to sums by name.
    """

    def __init__(
        self,
        store: PrefixStore,
        tiers: Sequence[Tier],
        states: States | None,
        patience: float,
        count: Count,
    ):
        self.store = store
        self.tiers = tiers
        self.states = states
        self.patience = patience
        self._count = count
        self._parts = min(_THREADS, torch.get_num_threads())
        others = self._parts - 1
        # Its threads end when nobody has it any more: a request may still load when tiers are closed.
        self._threads = ThreadPoolExecutor(others, "load") if others else None

    def each(self, work: Callable[[range], list[Result]], items: int) -> list[Result]:
        """`work` of all items in order, a part of them in each thread."""
        if self._threads is None or items < 2:
            return work(range(items))
        middle = -(-items // self._parts)
        parts = [range(at, min(items, at + middle)) for at in range(0, items, middle)]
        others = [self._threads.submit(work, part) for part in parts[1:]]
        found = [work(parts[0])]
        found += [other.result() for other in others]
        return [one for part in found for one in part]

    def load(self, namespace: bytes, tokens: list[int], have: int, limit: int) -> Loaded:
        """Brings chunks of the first `limit` tokens, of which `have` are stored, into the store.

        Nothing is raised for what stores do.
        """
        with _Load(self, namespace, tokens, limit) as load:
            load.hold(have)
            if self.states is None:
                load.run()
            else:
                load.run_to_state(self.states)
            self._count("loaded", load.chunks)
            return load.result

    # -- one tier

    def ask(self, tier: Tier, batch: Sequence[Identity], result: Loaded) -> Reading:
        """Starts to read; the values are None where nothing came."""
        nothing = [None] * len(batch)
        try:
            reading = tier.guard.begin([identity.key for identity in batch])
        except StoreError as error:
            self.failed(error, result)
            return lambda: nothing

        def wait() -> Values:
            try:
                return reading()
            except StoreError as error:
                self.failed(error, result)
                return nothing

        return wait

    def exist(self, tier: Tier, batch: Sequence[Identity], result: Loaded) -> Sequence[bool]:
        """Whether values are there."""
        try:
            return tier.guard.exists([identity.key for identity in batch])
        except StoreError as error:
            self.failed(error, result)
            return [False] * len(batch)

    def corrupt(
        self, tier: Tier, gone: Sequence[Identity], error: CorruptValueError, result: Loaded
    ) -> None:
        """Counts a damaged value and forgets it and others, so that they are written again."""
        self._count("corrupt", 1)
        result.reason = "corrupt"
        _log.warning("a value of the %s store is not used: %s", tier.name, error)
        try:
            tier.guard.delete([identity.key for identity in gone])
        except StoreError as down:
            self.failed(down, result)

    def failed(self, error: StoreError, result: Loaded) -> None:
        """Counts a tier that could not be asked."""
        self._count("failed", 1)
        result.reason = result.reason or "store down"
        _log.info("a colder tier is left out: %s", error)


class _Load:
    """One prompt's load; what it has is held until it ends."""

    def __init__(self, loader: Loader, namespace: bytes, tokens: list[int], limit: int):
        self.loader = loader
        self.namespace = namespace
        self.tokens = tokens
        self.size = loader.store.layout.chunk_size
        self.path = identities(namespace, pack(tokens[:limit]), self.size)
        self.at = 0  # chunks that are held
        self.chunks = 0  # of them, those that were laid down
        self.end = monotonic() + loader.patience
        self.result = Loaded()
        self._holds = ExitStack()

    def __enter__(self) -> _Load:
        return self

    def __exit__(self, *_: object) -> None:
        self._holds.close()

    def hold(self, tokens: int) -> None:
        """Holds what is stored of so many tokens, since more is laid behind it."""
        self._keep(self.loader.store.hold(self.namespace, self.tokens, tokens))

    def _keep(self, lease: Lease) -> None:
        self._holds.enter_context(lease)
        self.at = lease.tokens // self.size

    def run(self) -> None:
        """Reads what is missing up to the end of the path, as far as it goes."""
        for tier in self.loader.tiers:
            left = len(self.path) - self.at
            if left <= 0 or monotonic() >= self.end:
                return
            if tier.pays(left):
                begin, before = monotonic(), self.chunks
                self._read(tier)
                tier.pace.observe(self.chunks - before, monotonic() - begin)

    def run_to_state(self, states: States) -> None:
        """Reads up to the deepest state there is; without all chunks before it, it is of no use."""
        found = self._state(states)
        if found is None:
            return
        number, state = found
        del self.path[number + 1 :]
        position = len(self.path) * self.size
        self.hold(position)
        self.run()
        kept = self.at == len(self.path)
        kept = kept and self.loader.store.keep(self.namespace, self.tokens, position, state)
        if not kept:
            self.result.tokens = {}

    def _read(self, tier: Tier) -> None:
        """Lays down what a tier has without a gap, reading the next batch meanwhile."""
        size = batch_of(self.loader.store.layout)
        batch = self.path[self.at : self.at + size]
        reading = self.loader.ask(tier, batch, self.result)
        while batch:
            values, ahead = reading(), self.at + len(batch)
            following = self.path[ahead : ahead + size] if self._goes_on(values) else []
            if following:
                reading = self.loader.ask(tier, following, self.result)
            chunks = self._checked(tier, batch, values)
            if self._lay(tier, chunks) < len(batch):
                if following:
                    reading()  # what was begun is waited for
                return
            batch = following

    def _goes_on(self, values: Values) -> bool:
        return None not in values and monotonic() < self.end

    def _checked(self, tier: Tier, batch: Sequence[Identity], values: Values) -> list[list[KV]]:
        """Chunks up to the first that is missing or damaged."""
        chunks: list[list[KV]] = []
        layout = self.loader.store.layout

        def check(part: range) -> list[list[KV] | CorruptValueError | None]:
            return [_decoded(values[number], batch[number], layout) for number in part]

        for number, found in enumerate(self.loader.each(check, len(batch))):
            if isinstance(found, CorruptValueError):  # and nobody gets at what lies behind it
                gone = self.path[self.at + number :]
                self.loader.corrupt(tier, gone, found, self.result)
            if not isinstance(found, list):
                break
            chunks.append(found)
            tier.moved("loaded", batch[number], len(values[number] or b""))
        return chunks

    def _lay(self, tier: Tier, chunks: Sequence[list[KV]]) -> int:
        """Puts chunks behind those that are held; returns how many there was room for."""
        if not chunks:
            return 0
        first, end = self.at, (self.at + len(chunks)) * self.size

        def fill(at: int, run: PoolRun) -> None:
            assert at >= first, "what is held cannot be missing"
            layers = range(len(self.loader.store.layout.layers))
            places = [[torch.split(part, 1) for part in run.layer(layer)] for layer in layers]

            def copy(part: range) -> list[None]:
                pairs = [
                    (places[layer][number][place], kv)
                    for place in part
                    for layer, parts in enumerate(chunks[at - first + place])
                    for number, kv in enumerate(parts)
                ]
                if pairs:
                    _copy_all(*map(list, zip(*pairs, strict=True)))
                return []

            self.loader.each(copy, len(run))

        self._keep(self.loader.store.extend(self.namespace, self.tokens[:end], fill))
        laid = self.at - first
        self.chunks += laid
        tier.count(loaded=laid)
        sums = self.result.tokens
        if laid:
            sums[tier.name] = sums.get(tier.name, 0) + laid * self.size
        return laid

    def _state(self, states: States) -> tuple[int, Snapshot] | None:
        """The deepest state that any tier has behind one of the chunks that are missing."""
        loader = self.loader
        numbers = range(len(self.path) - 1, self.at - 1, -1)
        wanted = [self.path[number].snapshot() for number in numbers]
        there = [loader.exist(tier, wanted, self.result) for tier in loader.tiers]
        for place, (number, identity) in enumerate(zip(numbers, wanted, strict=True)):
            for tier, known in zip(loader.tiers, there, strict=True):
                if not known[place] or monotonic() >= self.end:
                    continue
                (value,) = loader.ask(tier, [identity], self.result)()
                if value is None:
                    continue
                try:
                    return number, states.put_together(*decode_state(value, identity))
                except CorruptValueError as error:
                    loader.corrupt(tier, [identity], error, self.result)
        return None


_copy_all: Any = torch._foreach_copy_  # one call, which threads need not take turns for


def _decoded(
    value: Buffer | None, identity: Identity, layout: ChunkLayout
) -> list[KV] | CorruptValueError | None:
    """A chunk, or what is wrong with it."""
    try:
        return None if value is None else decode_chunk(value, identity, layout)
    except CorruptValueError as error:
        return error
