"""Work for prompts that will run soon, one after another in the background."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

_log = logging.getLogger(__name__)
_MOST = 64  # that wait


class Ahead:
    """See the module. Thread-safe; what fails is logged, since the prompt itself will meet it again."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._waiting = 0
        self._closed = False

    def start(self, work: Callable[[], None]) -> bool:
        """Takes it, unless too much waits already; returns at once."""
        with self._lock:
            if self._closed or self._waiting >= _MOST:
                return False
            if self._threads is None:
                self._threads = ThreadPoolExecutor(1, "prefetch")
            self._waiting += 1
            future = self._threads.submit(work)
        future.add_done_callback(self._done)  # which runs here and now if it is done already
        return True

    def _done(self, future: Future[None]) -> None:
        with self._lock:
            self._waiting -= 1
        if not future.cancelled() and (error := future.exception()) is not None:
            _log.info("a prompt could not be prepared: %s", error)

    def close(self) -> None:
        """Drops what waits, and lets what runs come to its end."""
        with self._lock:
            self._closed = True
            threads = self._threads
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)
