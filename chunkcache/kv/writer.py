"""From the pool to colder tiers, behind the requests.

Paths wait in a bounded queue for one thread; the hottest goes first, and the coldest is dropped when the
queue is full. While requests run, the thread works a small part of the time. Chunks are held by a lease
as long as they are read. Every tier that a path belongs in gets it: so a tier never has a chunk whose
parent only a slower one has, and what leaves a faster tier need not be moved.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from time import monotonic
from typing import Any

import torch

from chunkcache.errors import StoreError
from chunkcache.kv.codec import Identity, encode_chunk, encode_state, identities
from chunkcache.kv.loader import Count, States
from chunkcache.kv.notes import encode_note, model_key, prompt_key
from chunkcache.kv.pool import PoolRun
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tier import Tier, batch_of
from chunkcache.stores.base import Key
from chunkcache.tree import Lease, unpack

_log = logging.getLogger(__name__)
_QUEUE = 64  # paths that wait
_PART = 50  # while requests run, one part in so many of the time is spent here
_GRACE = 0.25  # seconds that a request runs before anything is written beside it
_LULL = 0.01  # seconds without a request before it is thought that none comes at once
_AGAIN = 60.0  # seconds after which a path that is used again and again is looked at again
_REMEMBERED = 4096  # paths
Encode = Callable[[bool], bytes]  # compressed or not


@dataclass(frozen=True)
class Path:
    """What is to be written.

    Attributes:
        data: token ids, packed; hits: how often its end was reused; name: of the prompt.
    """

    namespace: bytes
    data: bytes = field(repr=False)
    hits: int = 0
    name: str | None = None

    @property
    def rank(self) -> tuple[bool, int]:
        """Greater ones are written first."""
        return self.name is not None, self.hits

    @property
    def key(self) -> int:
        """Of namespace and tokens; two may have the same, which costs no more than a minute."""
        return hash((self.namespace, self.data))

    def covers(self, other: Path) -> bool:
        """Whether writing this one writes the other too."""
        same = self.namespace == other.namespace and other.name in (None, self.name)
        return same and self.data.startswith(other.data)


class Writer:
    """See the module. Thread-safe.

    Args:
        count: adds to sums by name.
        about: what the note on a namespace says.
    """

    def __init__(
        self,
        store: PrefixStore,
        tiers: Sequence[Tier],
        states: States | None,
        count: Count,
        about: dict[str, Any],
    ):
        self.store = store
        self.tiers = tiers
        self.states = states
        self.about = about
        self._count = count
        self._queue: list[Path] = []
        self._gone: list[tuple[Tier, Sequence[Key]]] = []
        self._changed = threading.Condition()
        self._seen: OrderedDict[int, tuple[int, float]] = OrderedDict()  # by key: hits, and when
        self._closed = self._busy = False
        self._running = 0  # requests
        self._ended = 0.0  # when the last one did
        self._due = 0.0  # when something may be written beside requests
        self._waiting = 0  # who waits until all is written
        self._thread: threading.Thread | None = None

    # -- by requests

    def begin(self) -> None:
        """A request runs."""
        with self._changed:
            if not self._running:
                self._due = max(self._due, monotonic() + _GRACE)
            self._running += 1

    def end(self) -> None:
        """It does not any more."""
        with self._changed:
            self._running -= 1
            if not self._running:
                self._ended = monotonic()
                self._changed.notify_all()

    def offer(self, path: Path) -> None:
        """Takes a path with new chunks, if there is room; never waits."""
        with self._changed:
            if self._closed or any(waiting.covers(path) for waiting in self._queue):
                return
            self._queue = [one for one in self._queue if not path.covers(one)]
            self._queue.append(path)
            if len(self._queue) > _QUEUE:
                coldest = min(self._queue, key=lambda one: one.rank)
                self._queue.remove(coldest)
                self._seen.pop(coldest.key, None)
                self._count("dropped", 1)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="write-behind", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def used(self, path: Path) -> None:
        """Takes a path that was reused, now and then: tiers keep what is used, or lack it."""
        most = max((tier.admission.hits for tier in self.tiers), default=0)
        hits, now = min(path.hits, most), monotonic()  # more make no difference
        with self._changed:
            before, last = self._seen.get(path.key, (-1, now))
            if before >= hits and now - last < _AGAIN:
                return
            self._seen[path.key] = (hits, now)
            self._seen.move_to_end(path.key)
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
        self.offer(path)

    def drop(self, tier: Tier, keys: Sequence[Key]) -> None:
        """Has a tier forget values before it is given anything else; never waits."""
        with self._changed:
            if not self._closed:
                self._gone.append((tier, keys))
                self._awake()

    def _awake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="write-behind", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    # -- the thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                if isinstance(job, Path):
                    self.save(job)
                else:
                    job[0].guard.delete(job[1])
            except StoreError as error:
                self.failed(error)
            except Exception:
                self._count("failed", 1)
                _log.exception("a stored prefix was not written to colder tiers")

    def _next(self) -> Path | tuple[Tier, Sequence[Key]] | None:
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._gone or self._queue or self._closed)
            self._busy = bool(self._gone or self._queue)
            if self._gone:
                return self._gone.pop(0)
            if not self._queue:
                return None
            path = max(self._queue, key=lambda one: one.rank)
            self._queue.remove(path)
            return path

    def _wait(self) -> None:
        """Leaves the machine to requests, unless somebody waits for the writer."""
        with self._changed:
            while not (self._waiting or self._closed):
                due = self._due if self._running else self._ended + _LULL
                left = due - monotonic()
                if left <= 0:
                    return
                self._changed.wait(left)

    def _worked(self, seconds: float) -> None:
        with self._changed:
            if self._running:
                self._due = monotonic() + seconds * (_PART - 1)

    def save(self, path: Path) -> int:
        """Writes what is stored of a path to the tiers that lack it; returns the values written.

        A tier that fails gets no more of this path, and lacks only its end.
        """
        self._wait()
        saving = _Save(self, path)
        written = 0
        while saving.left:
            self._wait()
            begin = monotonic()
            written += saving.step()
            self._worked(monotonic() - begin)
        written += saving.finish()
        self._count("saved", written)
        return written

    def failed(self, error: StoreError) -> None:
        """Counts a tier that takes nothing now."""
        self._count("failed", 1)
        _log.info("a colder tier is left out: %s", error)

    # -- its end

    def flush(self, timeout: float) -> bool:
        """Waits until what was offered is written, as fast as it goes; whether it was."""
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(self._idle, timeout)
            finally:
                self._waiting -= 1

    def _idle(self) -> bool:
        return not (self._queue or self._gone or self._busy)

    def close(self) -> None:
        """Takes no more; what waits is dropped. Waits for nothing."""
        with self._changed:
            self._closed = True
            self._count("dropped", len(self._queue))
            self._queue.clear()
            self._changed.notify_all()


@dataclass
class _Share:
    """What of a path a tier admits and has room for, and what of that it lacks."""

    belongs: list[Identity]
    lacks: set[Identity]
    takes: bool = True  # until it fails, or keeps less than it is given

    @property
    def whole(self) -> list[Identity]:
        """What it has, without a gap."""
        return list(takewhile(lambda one: one not in self.lacks, self.belongs))


class _Save:
    """One path on its way."""

    def __init__(self, writer: Writer, path: Path):
        self.writer = writer
        self.path = path
        self.store = writer.store
        self.layout = writer.store.layout
        self.tokens: list[int] = unpack(path.data).tolist()
        self.chain = identities(path.namespace, path.data, self.layout.chunk_size)
        self.done = 0  # chunks
        self.states: set[Key] = set()  # that cannot be stored
        with self._hold(len(self.tokens)) as lease:
            self.chain = self.chain[: lease.tokens // self.layout.chunk_size]
            named = path.name is not None
            admitted = {tier: tier.admits(lease.match.node, named) for tier in writer.tiers}
        self.shares = {tier: self._share(tier, tokens) for tier, tokens in admitted.items()}

    def _share(self, tier: Tier, tokens: int) -> _Share:
        """A tier's part of the path.

        All is asked for at once, which is a use of each chunk, so that the end of a path leaves before
        its beginning, whatever is written meanwhile.
        """
        most = tier.room(self.layout)
        belong = self.chain[: min(most, tokens // self.layout.chunk_size)]
        try:
            there = tier.guard.exists([one.key for one in belong]) if belong else []
        except StoreError as error:
            self.writer.failed(error)
            return _Share([], set(), takes=False)
        lacks = {one for one, known in zip(belong, there, strict=True) if not known}
        return _Share(belong, lacks)

    def _hold(self, tokens: int) -> Lease:
        return self.store.hold(self.path.namespace, self.tokens, tokens)

    @property
    def left(self) -> bool:
        """Whether a tier lacks chunks that may be stored here."""
        return self.done < len(self.chain) and bool(self._lacking)

    @property
    def _lacking(self) -> set[Identity]:
        shares = self.shares.values()
        later = {one for share in shares if share.takes for one in share.lacks}
        return later.difference(self.chain[: self.done])

    def step(self) -> int:
        """Writes a batch, parents first; returns the values written."""
        self._skip()
        end = min(len(self.chain), self.done + batch_of(self.layout))
        with self._hold(end * self.layout.chunk_size) as lease:
            end = min(end, lease.tokens // self.layout.chunk_size)
            batch = self.chain[self.done : end]
            if not batch:  # evicted meanwhile
                self.chain = self.chain[: self.done]
                return 0
            _settled(self.layout.device)
            values = {one: _once(partial(self._encode, one, lease)) for one in batch}
            written = sum(self._put(tier, values) for tier in self.shares)
        self.done = end
        return written

    def _skip(self) -> None:
        """Goes on to the first chunk that a tier lacks."""
        lacking = self._lacking
        while self.chain[self.done] not in lacking:
            self.done += 1

    def _put(self, tier: Tier, values: dict[Identity, Encode]) -> int:
        """Gives a tier what it lacks of some chunks; it gets no more once it keeps less than that."""
        share = self.shares[tier]
        new = [one for one in values if one in share.lacks] if share.takes else []
        if not new:
            return 0
        encoded = [(one.key, values[one](tier.admission.compress)) for one in new]
        try:
            written = tier.guard.put(encoded)
        except StoreError as error:
            share.takes = False
            self.writer.failed(error)
            return 0
        share.lacks -= set(new[:written])
        share.takes = written == len(new)
        tier.count(saved=written)
        for one, (_, value) in zip(new[:written], encoded, strict=False):
            tier.moved("saved", one, len(value))
        return written

    def _encode(self, identity: Identity, lease: Lease, compress: bool) -> bytes:
        number = identity.start // self.layout.chunk_size
        for piece in lease.pieces:
            run = piece.run
            assert isinstance(run, PoolRun)
            if number < len(run):
                layers = range(len(self.layout.layers))
                chunk = [
                    tuple(part[number : number + 1] for part in run.layer(layer))
                    for layer in layers
                ]
                return encode_chunk(identity, chunk, self.layout, compress)
            number -= len(run)
        raise AssertionError("the lease ends before the chunk")

    # -- what lies behind chunks

    def finish(self) -> int:
        """Writes snapshots and notes, and notes a use of the whole path; returns the snapshots written."""
        written = 0
        for tier, share in self.shares.items():
            whole = share.whole
            if not whole:
                continue
            try:
                if self.writer.states is not None:
                    written += self._put_states(tier, whole)
                self._note(tier, whole[-1])
                if self.done:
                    tier.guard.exists([one.key for one in whole])
            except StoreError as error:
                self.writer.failed(error)
        return written

    def _put_states(self, tier: Tier, whole: Sequence[Identity]) -> int:
        """The snapshots behind chunks that a tier has."""
        assert self.writer.states is not None
        end, written = len(whole) * self.layout.chunk_size, 0
        with self._hold(end) as lease:
            while (resume := lease.snapshot(end)) and resume.position:
                end = resume.position - 1
                one = self.chain[resume.position // self.layout.chunk_size - 1].snapshot()
                if one.key in self.states or tier.guard.exists([one.key]) == [True]:
                    continue
                try:
                    parts = self.writer.states.take_apart(resume.snapshot)
                    value = encode_state(one, *parts, tier.admission.compress)
                except TypeError as error:
                    _log.info("a snapshot cannot be stored: %s", error)
                    self.states.add(one.key)
                    continue
                written += tier.guard.put([(one.key, value)])
        tier.count(saved=written)
        return written

    def _note(self, tier: Tier, last: Identity) -> None:
        """Says which model this is of, and which prompt."""
        notes: dict[Key, dict[str, Any]] = {model_key(self.path.namespace): self.writer.about}
        if self.path.name is not None:
            tokens = last.start + self.layout.chunk_size
            notes[prompt_key(last)] = {"name": self.path.name, "tokens": tokens}
        there = tier.guard.exists(list(notes))
        new = [key for key, known in zip(notes, there, strict=True) if not known]
        if new:
            tier.guard.put([(key, encode_note(notes[key])) for key in new])


def _settled(device: torch.device) -> None:
    """Waits until what other streams compute on a device is there."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _once(encode: Encode) -> Encode:
    """Several tiers encode a value once."""
    known: dict[bool, bytes] = {}

    def value(compress: bool) -> bytes:
        if compress not in known:
            known[compress] = encode(compress)
        return known[compress]

    return value
