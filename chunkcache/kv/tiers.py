"""Chunks on their way between the pool and colder tiers.

Reading: what a prompt needs behind its match is asked of the tiers in order, each from where the one
before ended; values are checked, and the first that is missing or damaged ends the run. Writing: paths
that were stored wait in a bounded queue for one thread, which holds them by a lease until the stores
have them. A request never waits for a write, and for a read no longer than the guards allow.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, Protocol

import torch

from chunkcache.errors import CorruptValueError, StoreError
from chunkcache.kv.codec import (
    Identity,
    decode_chunk,
    decode_state,
    encode_chunk,
    encode_state,
    identities,
)
from chunkcache.kv.layout import KV
from chunkcache.kv.pool import PoolRun
from chunkcache.kv.store import PrefixStore
from chunkcache.stores.base import Buffer, Key
from chunkcache.stores.guard import Guard
from chunkcache.tree import Lease, Snapshot, pack, unpack

_log = logging.getLogger(__name__)
_BATCH = 16  # values that are read or written together
_QUEUE = 64  # paths that wait for the writer
_DRAIN = 5.0  # seconds that close() gives the writer
Values = dict[Key, Callable[[], bytes]]


class States(Protocol):
    """How a model's snapshots become tensors and JSON, and snapshots again."""

    def take_apart(self, snapshot: Any) -> tuple[Sequence[torch.Tensor], Any]:
        """Tensors, and the rest as JSON; raises TypeError if there is more."""

    def put_together(self, tensors: tuple[torch.Tensor, ...], plain: Any) -> Snapshot:
        """The inverse."""


class _Path(NamedTuple):
    namespace: bytes
    data: bytes  # token ids, packed


class Tiers:
    """The colder tiers of one store. Thread-safe.

    Args:
        guards: the stores, fastest first.
        states: of a model that is resumed from snapshots; None for others.
        patience: seconds after which a request reads no more.

    Attributes:
        counts: values `loaded`, `saved`, `corrupt`; paths `dropped` (the queue was full); calls `failed`.
    """

    def __init__(
        self,
        store: PrefixStore,
        guards: Sequence[Guard],
        states: States | None = None,
        patience: float = 2.0,
    ):
        self.store = store
        self.guards = tuple(guards)
        self.states = states
        self.patience = patience
        self.counts: Counter[str] = Counter()
        self._queue: deque[_Path] = deque()
        self._changed = threading.Condition()
        self._counting = threading.Lock()
        self._closed = False
        self._busy = False
        self._thread: threading.Thread | None = None

    def _count(self, what: str, number: int = 1) -> None:
        with self._counting:
            self.counts[what] += number

    # -- reading

    def load(self, namespace: bytes, tokens: list[int], have: int, limit: int) -> dict[str, int]:
        """Brings chunks of the first `limit` tokens, of which `have` are stored, into the store.

        Returns the tokens that came from each kind of tier. Nothing is raised for what stores do.
        """
        with self.store.hold(namespace, tokens, have) as held:  # it is what the rest is laid behind
            return self._load(namespace, tokens, held.tokens, limit)

    def _load(self, namespace: bytes, tokens: list[int], have: int, limit: int) -> dict[str, int]:
        size = self.store.layout.chunk_size
        data = pack(tokens[:limit])
        wanted = identities(namespace, data, size, have // size)
        state: tuple[Identity, Snapshot] | None = None
        if self.states is not None:
            state = self._state(wanted)
            wanted = [] if state is None else wanted[: _until(wanted, state[0])]
        chunks, kinds = self._chunks(wanted)
        complete = len(chunks) == len(wanted)
        if not chunks or (state is not None and not complete):
            return {}
        first = have // size
        end = (first + len(chunks)) * size

        def blocks(at: int, count: int) -> list[KV]:
            assert at >= first, "what is held cannot be missing"
            return _stacked(chunks[at - first : at - first + count])

        stored = self.store.publish(namespace, tokens[:end], blocks).tokens
        if state is not None and not self.store.keep(namespace, tokens, end, state[1]):
            return {}
        kept = max(0, stored // size - first)
        self._count("loaded", kept)
        return {kind: count * size for kind, count in Counter(kinds[:kept]).items()}

    def _chunks(self, wanted: Sequence[Identity]) -> tuple[list[list[KV]], list[str]]:
        """As many chunks as there are without a gap, and the kind of tier of each."""
        chunks: list[list[KV]] = []
        kinds: list[str] = []
        end = monotonic() + self.patience
        for guard in self.guards:
            while len(chunks) < len(wanted) and monotonic() < end:
                found = self._decoded(guard, wanted[len(chunks) :])
                chunks += found
                kinds += [guard.kind] * len(found)
                if len(found) < _BATCH:
                    break
        return chunks, kinds

    def _decoded(self, guard: Guard, wanted: Sequence[Identity]) -> list[list[KV]]:
        """The next batch, up to the first chunk that is missing or damaged."""
        chunks: list[list[KV]] = []
        batch = wanted[:_BATCH]
        for identity, value in zip(batch, self._get(guard, batch), strict=True):
            if value is None:
                break
            try:
                chunks.append(decode_chunk(value, identity, self.store.layout))
            except CorruptValueError as error:  # and nobody gets at what lies behind it
                self._corrupt(guard, wanted[len(chunks) :], error)
                break
        return chunks

    def _state(self, wanted: Sequence[Identity]) -> tuple[Identity, Snapshot] | None:
        """The deepest state that any tier has behind one of the chunks that are wanted."""
        assert self.states is not None
        deepest = [identity.snapshot() for identity in reversed(wanted)]
        there = [self._exist(guard, deepest) for guard in self.guards]
        for number, identity in enumerate(deepest):
            for guard in (
                guard for guard, known in zip(self.guards, there, strict=True) if known[number]
            ):
                (value,) = self._get(guard, [identity])
                if value is None:
                    continue
                try:
                    return identity, self.states.put_together(*decode_state(value, identity))
                except CorruptValueError as error:
                    self._corrupt(guard, [identity], error)
        return None

    def _exist(self, guard: Guard, batch: Sequence[Identity]) -> Sequence[bool]:
        try:
            return guard.exists([identity.key for identity in batch])
        except StoreError as error:
            self._failed(error)
            return [False] * len(batch)

    def _get(self, guard: Guard, batch: Sequence[Identity]) -> Sequence[Buffer | None]:
        try:
            return guard.get([identity.key for identity in batch])
        except StoreError as error:
            self._failed(error)
            return [None] * len(batch)

    def _corrupt(self, guard: Guard, gone: Sequence[Identity], error: CorruptValueError) -> None:
        """Counts a damaged value and forgets it and others, so that they are written again."""
        self._count("corrupt")
        _log.warning("a value of the %s store is not used: %s", guard.kind, error)
        try:
            guard.delete([identity.key for identity in gone])
        except StoreError as down:
            self._failed(down)

    def _failed(self, error: StoreError) -> None:
        self._count("failed")
        _log.info("a colder tier is left out: %s", error)

    # -- writing

    def offer(self, namespace: bytes, tokens: Sequence[int]) -> None:
        """Lets the writer save the chunks of a stored path, some time; never waits."""
        path = _Path(namespace, pack(tokens))
        with self._changed:
            if self._closed:
                return
            if any(_covers(waiting, path) for waiting in self._queue):
                return
            if len(self._queue) >= _QUEUE:
                self._count("dropped")
                return
            self._queue.append(path)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._write, name="write-behind", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def _write(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._queue) or self._closed)
                if not self._queue:
                    return
                path = self._queue.popleft()
                self._busy = True
            try:
                self.save(path.namespace, unpack(path.data).tolist())
            except StoreError as error:
                self._failed(error)
            except Exception:
                self._count("failed")
                _log.exception("a stored prefix was not written to colder tiers")

    def save(self, namespace: bytes, tokens: list[int]) -> int:
        """Writes the stored chunks of a path to every store that lacks them; returns the values written.

        Raises:
            StoreError: of the first store that fails; those before it have the path.
        """
        size = self.store.layout.chunk_size
        with self.store.hold(namespace, tokens, len(tokens)) as lease:
            path = identities(namespace, pack(tokens[: lease.tokens]), size)
            values: Values = {one.key: _Encoding(self._encode, one, lease) for one in path}
            values.update(self._states_of(path, lease))
            written = sum(self._put(guard, values) for guard in self.guards)
        self._count("saved", written)
        return written

    def _put(self, guard: Guard, values: Values) -> int:
        """Parents first, so that a store that fails lacks only the end of a path."""
        keys, written = list(values), 0
        for at in range(0, len(keys), _BATCH):
            batch = keys[at : at + _BATCH]
            there = guard.exists(batch)
            new = [key for key, known in zip(batch, there, strict=True) if not known]
            if new:
                written += guard.put([(key, values[key]()) for key in new])
        return written

    def _encode(self, identity: Identity, lease: Lease) -> bytes:
        number = identity.start // self.store.layout.chunk_size
        for piece in lease.pieces:
            run = piece.run
            assert isinstance(run, PoolRun)
            if number < len(run):
                layers = range(len(self.store.layout.layers))
                chunk = [
                    tuple(part[number : number + 1] for part in run.layer(layer))
                    for layer in layers
                ]
                return encode_chunk(identity, chunk, self.store.layout)
            number -= len(run)
        raise AssertionError("the lease ends before the chunk")

    def _states_of(self, path: Sequence[Identity], lease: Lease) -> Values:
        """Encodings of the snapshots on a path."""
        found: Values = {}
        size, end = self.store.layout.chunk_size, lease.tokens
        while self.states is not None and (resume := lease.snapshot(end)) and resume.position:
            identity = path[resume.position // size - 1].snapshot()
            try:
                tensors, plain = self.states.take_apart(resume.snapshot)
                found[identity.key] = partial(bytes, encode_state(identity, tensors, plain))
            except TypeError as error:
                _log.info("a snapshot cannot be stored: %s", error)
            end = resume.position - 1
        return found

    def report(self) -> dict[str, Any]:
        """What moved, and what each kind of store did; asks no store anything."""
        moved = ("loaded", "saved", "corrupt", "failed", "dropped")
        found: dict[str, Any] = {name: self.counts[name] for name in moved}
        for guard in self.guards:
            calls = {
                name: guard.counts[name] for name in ("calls", "failures", "timeouts", "skipped")
            }
            found[guard.kind] = calls | {"open": guard.open}
        return found

    def flush(self, timeout: float) -> bool:
        """Waits until what was offered is written; whether it was."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout)

    def close(self) -> None:
        """Gives the writer a while to finish; the stores stay open."""
        done = self.flush(_DRAIN)
        with self._changed:
            self._closed = True
            if not done:
                self._count("dropped", len(self._queue))
                self._queue.clear()
            self._changed.notify_all()


class _Encoding:
    """The value of one chunk, made when a store lacks it; several stores make it once."""

    def __init__(
        self, encode: Callable[[Identity, Lease], bytes], identity: Identity, lease: Lease
    ):
        self._encode, self._identity, self._lease = encode, identity, lease
        self._value: bytes | None = None

    def __call__(self) -> bytes:
        if self._value is None:
            self._value = self._encode(self._identity, self._lease)
        return self._value


def _stacked(chunks: Sequence[Sequence[KV]]) -> list[KV]:
    """Chunks one after another as one block."""
    return [
        tuple(torch.cat(parts) for parts in zip(*layers, strict=True))
        for layers in zip(*chunks, strict=True)
    ]


def _covers(waiting: _Path, path: _Path) -> bool:
    return waiting.namespace == path.namespace and waiting.data.startswith(path.data)


def _until(wanted: Sequence[Identity], state: Identity) -> int:
    """How many chunks there are up to the one that a state lies behind."""
    return next(n for n, one in enumerate(wanted, 1) if one.snapshot().key == state.key)
