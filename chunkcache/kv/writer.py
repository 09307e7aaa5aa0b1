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
from collections.abc import Sequence
from time import monotonic
from typing import Any

from chunkcache.errors import StoreError
from chunkcache.kv.loader import Count, States
from chunkcache.kv.saving import Path, Save
from chunkcache.kv.store import PrefixStore
from chunkcache.kv.tier import Tier
from chunkcache.stores.base import Key

_log = logging.getLogger(__name__)
_QUEUE = 64  # paths that wait
_PART = 50  # while requests run, one part in so many of the time is spent here
_GRACE = 0.25  # seconds that a request runs before anything is written beside it
_LULL = 0.01  # seconds without a request before it is thought that none comes at once
_AGAIN = 60.0  # seconds after which a path that is used again and again is looked at again
_REMEMBERED = 4096  # paths


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
            self._awake()

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
        saving = Save(self.store, self.tiers, self.states, self.about, self.failed, path)
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
