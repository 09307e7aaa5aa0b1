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
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from chunkcache.errors import StoreDownError, StoreError, StoreFullError
from chunkcache.stores.base import Buffer, Key, Store, StoreStats

_log = logging.getLogger(__name__)
_THREADS = 4  # calls that run at once; one that hangs keeps its thread
_FIRST, _LONGEST = 1.0, 30.0  # seconds that the breaker stays open
Result = TypeVar("Result")


@dataclass(eq=False)
class _Call(Generic[Result]):
    """Work, and what became of it. It is over once, by its end or by its time-out."""

    work: Callable[[], Result]
    end: float  # when it has hung, by the machine's clock
    trial: bool = False
    future: Future[Result] = field(default_factory=Future)
    running: bool = False
    over: bool = False


class Guard:
    """One store behind time-outs and a breaker. Thread-safe.

    Args:
        timeout: seconds that a call may take, waiting for a thread included.
        clock: seconds that never go back.

    Attributes:
        counts: `calls`, `failures` (`timeouts` among them), `skipped` while open, `opened`.

    Raises:
        StoreError: by every call, whatever the store raises; StoreDownError after the time-out, at once
            while it is open, and after `close`.
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
        self._calls: set[_Call[Any]] = set()  # that are not over
        self._trial: _Call[Any] | None = None
        self._hung = 0  # threads whose calls are over by time-out
        self._closed = False
        self._jobs: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
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
        """As the store's."""
        return self._start(lambda: self.store.get(keys))()

    def begin(
        self,
        keys: Sequence[Key],
        then: Callable[[list[Buffer | None]], Result],
        within: float | None = None,
    ) -> Callable[[], Result]:
        """Starts to read, and to do something with the values in the same thread.

        The result waits for that; who does not want it need not call it.

        Args:
            within: seconds, if less than the time-out.
        """
        return self._start(lambda: then(self.store.get(keys)), within)

    def put(self, values: Sequence[tuple[Key, Buffer]]) -> int:
        """As the store's; StoreFullError does not open the breaker."""
        return self._start(lambda: self.store.put(values))()

    def exists(self, keys: Sequence[Key], within: float | None = None) -> list[bool]:
        """As the store's; `within` as in `begin`."""
        return self._start(lambda: self.store.exists(keys), within)()

    def delete(self, keys: Sequence[Key]) -> int:
        """As the store's."""
        return self._start(lambda: self.store.delete(keys))()

    def stats(self) -> StoreStats:
        """As the store's."""
        return self._start(self.store.stats)()

    # -- calls

    def _start(
        self, work: Callable[[], Result], within: float | None = None
    ) -> Callable[[], Result]:
        now = time.monotonic()
        call = _Call(work, now + self.timeout)
        until = call.end if within is None else min(now + within, call.end)
        self._enter(call)
        self._jobs.put(call)
        return lambda: self._result(call, until)

    def _result(self, call: _Call[Result], until: float) -> Result:
        try:
            return call.future.result(max(0.0, until - time.monotonic()))
        except FutureTimeout:
            if not call.future.done():
                with self._lock:
                    self._give_up()
                raise StoreDownError(f"{self.kind} took longer than it may") from None
            return call.future.result()  # done just now

    def _enter(self, call: _Call[Any]) -> None:
        """Lets a call through.

        Raises:
            StoreDownError: the breaker is open, all threads hang, or it is closed for good.
        """
        with self._lock:
            self.counts["calls"] += 1
            self._give_up()
            trying = self._trial is not None and time.monotonic() < self._trial.end
            if self._closed or (self._failed and (trying or self._clock() < self._closed_from)):
                self.counts["skipped"] += 1
                raise StoreDownError(f"{self.kind} failed lately and is left alone for a while")
            if self._hung >= _THREADS:
                self.counts["skipped"] += 1
                raise StoreDownError(f"{self.kind} hangs: no call comes back")
            if self._threads < _THREADS:
                threading.Thread(target=self._work, name=f"store-{self.kind}", daemon=True).start()
                self._threads += 1
            if self._failed:
                call.trial = True
                self._trial = call
            self._calls.add(call)

    def _work(self) -> None:
        while (call := self._jobs.get()) is not None:
            with self._lock:
                call.running = not call.over
            if not call.running:  # nobody waits for it any more
                continue
            try:
                result = call.work()
            except StoreError as error:
                self._end(call, worked=isinstance(error, StoreFullError))
                call.future.set_exception(error)
            except Exception as error:
                self._end(call, worked=False)
                down = StoreDownError(f"{self.kind} failed: {type(error).__name__}: {error}")
                down.__cause__ = error
                call.future.set_exception(down)
            else:
                self._end(call, worked=True)
                call.future.set_result(result)

    def _end(self, call: _Call[Any], worked: bool) -> None:
        """A call came back, perhaps after it was given up."""
        with self._lock:
            if call.over:
                self._hung -= 1
            else:
                self._over(call, worked)

    def _give_up(self) -> None:
        """Calls that take longer than the time-out have failed, whoever waits for them or does not."""
        now = time.monotonic()
        for call in [call for call in self._calls if call.end <= now]:
            self._hung += call.running
            self.counts["timeouts"] += 1
            self._over(call, worked=False, ago=now - call.end)

    def _over(self, call: _Call[Any], worked: bool, ago: float = 0.0) -> None:
        call.over = True
        self._calls.discard(call)
        self._judge(call, worked, self._clock() - ago)

    def _judge(self, call: _Call[Any], worked: bool, when: float) -> None:
        """Opens or closes the breaker. While it is open, only the trial counts."""
        if not worked:
            self.counts["failures"] += 1
        if self._failed and not call.trial:
            return
        if call is self._trial:
            self._trial = None
        if worked:
            if self._failed:
                _log.warning("the %s store works again", self.kind)
            self._failed, self._pause = False, _FIRST
            return
        if self._failed:
            self._pause = min(_LONGEST, 2 * self._pause)
        else:
            self.counts["opened"] += 1
            _log.warning("the %s store failed and is left alone for a while", self.kind)
        self._failed = True
        self._closed_from = when + self._pause

    def close(self) -> None:
        """Closes the store, if that does not hang, and ends the threads that do not."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            threads = self._threads
        closer = threading.Thread(target=self.store.close, name=f"close-{self.kind}", daemon=True)
        for _ in range(threads):
            self._jobs.put(None)
        closer.start()
        closer.join(self.timeout)
