"""A store that keeps nobody waiting: bounded time, and a breaker that leaves a broken one alone.

Calls run in threads of the guard, so that even a file system that hangs costs its caller no more than
the time-out. After a failure the breaker opens: calls fail at once for a while, twice as long after each
failed trial; then one call is let through, and if it works the breaker closes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from chunkcache.errors import StoreDownError, StoreFullError
from chunkcache.stores.base import Buffer, Key, Store, StoreStats

_log = logging.getLogger(__name__)
_THREADS = 4  # calls that run at once; one that hangs keeps its thread
_FIRST, _LONGEST = 1.0, 30.0  # seconds that the breaker stays open
Result = TypeVar("Result")


class Guard:
    """One store behind time-outs and a breaker. Thread-safe.

    Args:
        timeout: seconds that a call may take.
        clock: seconds that never go back.

    Attributes:
        counts: `calls`, `failures` (`timeouts` among them), `skipped` while open, `opened`.
    """

    def __init__(self, store: Store, timeout: float, clock: Callable[[], float] = time.monotonic):
        self.store = store
        self.timeout = timeout
        self.counts: Counter[str] = Counter()
        self._clock = clock
        self._lock = threading.Lock()
        self._pause = _FIRST
        self._closed_from = 0.0  # when calls may go through again
        self._failed = False
        self._trying = False
        self._free = _THREADS
        self._jobs: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None]
        self._jobs = queue.SimpleQueue()
        self._threads = 0

    @property
    def kind(self) -> str:
        """Of the store."""
        return self.store.kind

    @property
    def open(self) -> bool:
        """Whether calls are not let through now."""
        with self._lock:
            return self._failed and self._clock() < self._closed_from

    def get(self, keys: Sequence[Key]) -> list[Buffer | None]:
        """As the store's; raises StoreDownError after the time-out, or at once while open."""
        return self.begin(keys)()

    def begin(self, keys: Sequence[Key]) -> Callable[[], list[Buffer | None]]:
        """Starts to read; the result waits for the values, and must be called. Raises as `get`."""
        return self._start(lambda: self.store.get(keys))

    def put(self, values: Sequence[tuple[Key, Buffer]]) -> int:
        """As the store's; StoreFullError does not open the breaker."""
        return self._start(lambda: self.store.put(values))()

    def exists(self, keys: Sequence[Key]) -> list[bool]:
        """As the store's."""
        return self._start(lambda: self.store.exists(keys))()

    def delete(self, keys: Sequence[Key]) -> int:
        """As the store's."""
        return self._start(lambda: self.store.delete(keys))()

    def stats(self) -> StoreStats:
        """As the store's."""
        return self._start(self.store.stats)()

    def _start(self, work: Callable[[], Result]) -> Callable[[], Result]:
        self._enter()
        future: Future[Result] = Future()
        end = time.monotonic() + self.timeout
        self._jobs.put((future, work))  # type: ignore[arg-type]
        return lambda: self._finish(future, end)

    def _finish(self, future: Future[Result], end: float) -> Result:
        try:
            result = future.result(max(0.0, end - time.monotonic()))
        except FutureTimeout:
            self.counts["timeouts"] += 1
            self._leave(worked=False)
            raise StoreDownError(f"{self.kind} took longer than {self.timeout:g} s") from None
        except StoreFullError:
            self._leave(worked=True)
            raise
        except BaseException:
            self._leave(worked=False)
            raise
        self._leave(worked=True)
        return result

    def _enter(self) -> None:
        """Lets a call through.

        Raises:
            StoreDownError: the breaker is open, or all threads hang.
        """
        with self._lock:
            self.counts["calls"] += 1
            waiting = self._failed and (self._trying or self._clock() < self._closed_from)
            if waiting or not self._free:
                self.counts["skipped"] += 1
                raise StoreDownError(f"{self.kind} failed lately and is left alone for a while")
            self._trying = self._failed
            self._free -= 1
            if self._threads < _THREADS:
                self._threads += 1
                threading.Thread(target=self._work, name=f"store-{self.kind}", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, work = job
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            with self._lock:
                self._free += 1

    def _leave(self, worked: bool) -> None:
        with self._lock:
            self._trying = False
            if worked:
                if self._failed:
                    _log.warning("the %s store works again", self.kind)
                self._failed, self._pause = False, _FIRST
                return
            self.counts["failures"] += 1
            if not self._failed:
                self.counts["opened"] += 1
                _log.warning("the %s store failed and is left alone for a while", self.kind)
            else:
                self._pause = min(_LONGEST, 2 * self._pause)
            self._failed = True
            self._closed_from = self._clock() + self._pause

    def close(self) -> None:
        """Ends the threads that do not hang, and closes the store."""
        for _ in range(self._threads):
            self._jobs.put(None)
        self.store.close()
