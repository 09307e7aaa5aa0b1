"""The worker: one thread runs one job at a time, the others wait their turn in a bounded queue.

One at a time is what makes answers independent of load in this version. Continuous batching would
replace this class and keep its interface.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from chunkcache.engine.generation import run_job
from chunkcache.engine.jobs import Event, Failed, Finished, Job, Result
from chunkcache.errors import (
    ChunkcacheError,
    ClosedError,
    QueueFullError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from chunkcache.hf import CachedModel

_log = logging.getLogger(__name__)


class Runner:
    """Runs jobs in the order in which they came.

    Args:
        cached: the wrapped model, which nobody else may run meanwhile.
        queue_limit: most jobs that wait; the running one is not counted.
        rows_at_once: most rows of one batch; jobs with more run in several.
        on_end: called after each job with "ok", "cancelled" or "error", and the result if it ran.

    Raises:
        UnsupportedModelError: the model does not continue its prompt.
    """

    def __init__(
        self,
        cached: CachedModel,
        *,
        queue_limit: int = 64,
        rows_at_once: int = 8,
        on_end: Callable[[str, Result | None], None] = lambda outcome, result: None,
    ):
        if cached.model.config.is_encoder_decoder:
            kind = str(cached.model.config.model_type)
            raise UnsupportedModelError(
                kind,
                "an encoder-decoder does not continue its prompt, as clients of a server expect",
            )
        self._cached = cached
        self._queue_limit = queue_limit
        self._rows_at_once = rows_at_once
        self._on_end = on_end
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._running: Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="chunkcache-runner", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """1 while a job runs, else 0."""
        return int(self._running is not None)

    @property
    def alive(self) -> bool:
        """Whether jobs are still taken."""
        return self._thread.is_alive() and not self._closed

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            QueueFullError: `queue_limit` jobs wait already.
            ClosedError: after close().
        """
        with self._changed:
            if self._closed:
                raise ClosedError("the server is shutting down")
            if len(self._waiting) >= self._queue_limit:
                raise QueueFullError(f"{len(self._waiting)} requests are waiting already")
            waits = self._running is not None or bool(self._waiting)
            self._waiting.append(job)
            self._changed.notify()
        if waits:
            self._cached.prefetch(job.prompts)

    def cancel(self, job: Job) -> None:
        """Drop a waiting job, or stop a running one at its next token; its listener hears no more.

        Nothing happens to a job that has ended.
        """
        job.cancel()
        with self._changed:
            waited = job in self._waiting
            if waited:
                self._waiting.remove(job)
        if waited:
            self._on_end("cancelled", None)

    def close(self, timeout: float = 10.0) -> None:
        """Fail the waiting jobs, stop the running one, and end the thread."""
        with self._changed:
            self._closed = True
            dropped = list(self._waiting)
            self._waiting.clear()
            if self._running is not None:
                self._running.cancel()
                dropped.append(self._running)
            self._changed.notify()
        for job in dropped:
            job.listener(Failed(ClosedError("the server is shutting down")))
        self._thread.join(timeout)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            outcome, result, event = self._run(job)
            self._on_end(outcome, result)  # before the client knows, who may read the metrics next
            if event is not None:
                job.listener(event)

    def _next(self) -> Job | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._closed)
            self._running = None if self._closed else self._waiting.popleft()
            return self._running

    def _run(self, job: Job) -> tuple[str, Result | None, Event | None]:
        """Run a job and name its end; what goes wrong is told to its client only."""
        try:
            result = run_job(self._cached, job, self._rows_at_once)
        except ChunkcacheError as error:
            _log.info("request refused: %s", error)
            return "error", None, Failed(error)
        except Exception as error:
            _log.exception("request failed")
            return "error", None, Failed(error)
        if job.cancelled:
            return "cancelled", result, None
        return "ok", result, Finished(result)
