"""From colder tiers into the pool: what a prompt needs behind its match.

Tiers are asked in order, each from where the one before ended. Values are checked, and the first that
is missing or damaged ends a tier's part. While one batch is laid into the pool, the next two are read
and checked in threads of the store's guard.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, Protocol

import torch

from chunkcache.errors import CorruptValueError, StoreError
from chunkcache.kv.codec import Identity, decode_chunk, decode_state, identities
from chunkcache.kv.copies import lay_chunks
from chunkcache.kv.layout import KV, ChunkLayout
from chunkcache.kv.pool import PoolRun
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tier import Tier, batch_of
from chunkcache.stores.base import Buffer, Key
from chunkcache.tree import Lease, Snapshot, pack

_log = logging.getLogger(__name__)
Count = Callable[[str, int], None]
Drop = Callable[[Tier, Sequence[Key]], None]


class States(Protocol):
    """How a model's snapshots become tensors and JSON, and snapshots again."""

    def take_apart(self, snapshot: Any) -> tuple[Sequence[torch.Tensor], Any]:
        """Tensors, and the rest as JSON; raises TypeError if there is more."""

    def put_together(self, tensors: tuple[torch.Tensor, ...], plain: Any) -> Snapshot:
        """The inverse."""


_AHEAD = 2  # batches that are on their way at once


class Found(NamedTuple):
    """A chunk that was read and checked, as `decode_chunk` gives it: views of its value."""

    chunk: list[KV]
    value: Buffer


@dataclass
class Loaded:
    """What came from colder tiers for one prompt.

    Attributes:
        tokens: by the name of the tier; reason: why not more, if stores are to blame.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    reason: str | None = None


class Loader:
    """See the module. Thread-safe.

    Args:
        patience: seconds that one load may take.
        count: adds to sums by name.
        drop: has a tier forget values, some time.
    """

    def __init__(
        self,
        store: PrefixStore,
        tiers: Sequence[Tier],
        states: States | None,
        patience: float,
        count: Count,
        drop: Drop,
    ):
        self.store = store
        self.tiers = tiers
        self.states = states
        self.patience = patience
        self._count = count
        self._drop = drop

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

    def corrupt(
        self, tier: Tier, gone: Sequence[Identity], error: CorruptValueError, result: Loaded
    ) -> None:
        """Counts a damaged value and forgets it and others, so that they are written again."""
        self._count("corrupt", 1)
        result.reason = "corrupt"
        _log.warning("a value of the %s store is not used: %s", tier.name, error)
        self._drop(tier, [identity.key for identity in gone])

    def failed(self, error: StoreError, result: Loaded) -> None:
        """Counts a tier that could not be asked."""
        self._count("failed", 1)
        result.reason = result.reason or "store down"
        _log.info("a colder tier is left out: %s", error)


Reading = Callable[[], Sequence[Found | CorruptValueError]]


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
            missing = len(self.path) - self.at
            if missing <= 0 or self.left <= 0:
                return
            if tier.pays(missing):
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
        """Lays down what a tier has without a gap; what follows is read and checked meanwhile."""
        size = batch_of(self.loader.store.layout)
        rest = [self.path[at : at + size] for at in range(self.at, len(self.path), size)]
        begun: deque[tuple[int, Reading]] = deque()
        while rest or begun:
            while rest and len(begun) < _AHEAD and self.left > 0:
                reading = self._ask(tier, rest[0])
                if reading is None:
                    rest.clear()
                else:
                    begun.append((len(rest.pop(0)), reading))
            if not begun:
                return
            wanted, reading = begun.popleft()
            found = self._usable(tier, reading())
            laid = self._lay(tier, [one.chunk for one in found])
            tier.guard.store.recycle([one.value for one in found])
            if laid < wanted:
                return

    @property
    def left(self) -> float:
        """Seconds that stores may still take."""
        return self.end - monotonic()

    def _ask(self, tier: Tier, batch: Sequence[Identity]) -> Reading | None:
        """Starts to read and check; nothing is found where the store fails. None if it is not asked."""
        keys = [identity.key for identity in batch]
        decode = partial(_decoded, batch, self.loader.store.layout)
        try:
            reading = tier.guard.begin(keys, decode, self.left)
        except StoreError as error:
            self.loader.failed(error, self.result)
            return None

        def wait() -> Sequence[Found | CorruptValueError]:
            try:
                return reading()
            except StoreError as error:
                self.loader.failed(error, self.result)
                return []

        return wait

    def _usable(self, tier: Tier, found: Sequence[Found | CorruptValueError]) -> list[Found]:
        """Chunks up to the first that is missing or damaged."""
        chunks: list[Found] = []
        for number, one in enumerate(found):
            if isinstance(one, CorruptValueError):  # and nobody gets at what lies behind it
                gone = self.path[self.at + number :]
                self.loader.corrupt(tier, gone, one, self.result)
            else:
                chunks.append(one)
                tier.moved("loaded", self.path[self.at + number], len(one.value))
        return chunks

    def _lay(self, tier: Tier, chunks: Sequence[list[KV]]) -> int:
        """Puts chunks behind those that are held; returns how many there was room for."""
        if not chunks:
            return 0
        first, end = self.at, (self.at + len(chunks)) * self.size

        def fill(at: int, run: PoolRun) -> None:
            assert at >= first, "what is held cannot be missing"
            lay_chunks(run, chunks[at - first : at - first + len(run)])

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
        numbers = range(len(self.path) - 1, self.at - 1, -1)
        wanted = [self.path[number].snapshot() for number in numbers]
        there = [self._exist(tier, wanted) for tier in self.loader.tiers]
        for place, (number, identity) in enumerate(zip(numbers, wanted, strict=True)):
            for tier, known in zip(self.loader.tiers, there, strict=True):
                if known[place] and self.left > 0:
                    state = self._read_state(tier, identity, states)
                    if state is not None:
                        return number, state
        return None

    def _exist(self, tier: Tier, batch: Sequence[Identity]) -> Sequence[bool]:
        try:
            return tier.guard.exists([identity.key for identity in batch], self.left)
        except StoreError as error:
            self.loader.failed(error, self.result)
            return [False] * len(batch)

    def _read_state(self, tier: Tier, identity: Identity, states: States) -> Snapshot | None:
        try:
            (value,) = tier.guard.begin([identity.key], list, self.left)()
            return None if value is None else states.put_together(*decode_state(value, identity))
        except CorruptValueError as error:
            self.loader.corrupt(tier, [identity], error, self.result)
        except StoreError as error:
            self.loader.failed(error, self.result)
        return None


def _decoded(
    batch: Sequence[Identity], layout: ChunkLayout, values: Sequence[Buffer | None]
) -> list[Found | CorruptValueError]:
    """Chunks up to the first that is missing, or damaged; that is the last then."""
    found: list[Found | CorruptValueError] = []
    for identity, value in zip(batch, values, strict=True):
        try:
            if value is None:
                break
            found.append(Found(decode_chunk(value, identity, layout), value))
        except CorruptValueError as error:
            found.append(error)
            break
    return found
