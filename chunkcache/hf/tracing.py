"""Recording requests as they end. A trace that cannot be written costs no request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from time import time

from chunkcache.config import Config
from chunkcache.errors import TraceError
from chunkcache.hf.prefill import Row
from chunkcache.kv.store import PrefixStore
from chunkcache.lab.traces.recorder import History, Log, Recorder

_log = logging.getLogger(__name__)


class Tracing:
    """Adds the prompts of one wrapper to its history, and to a trace if there is one. Thread-safe.

    Args:
        trace: a recorder, which stays open, or a file for token ids.
        settings, store, model: what answers, of which a trace tells.

    Raises:
        TraceError: the file cannot be written.
    """

    def __init__(
        self,
        trace: Recorder | Path | str | None,
        settings: Config,
        store: PrefixStore,
        model: str,
    ):
        own = None if trace is None or isinstance(trace, Recorder) else Recorder(Path(trace))
        self.history = History(store.layout.chunk_size, settings.history_budget)
        self._own = own
        self._logs: list[Log] = [self.history]
        if (found := own or trace) is not None:
            assert isinstance(found, Recorder)
            self._logs.append(found)
        self._tenant = settings.tenant
        for log in self._logs:
            log.about(
                model=model,
                mode=settings.mode,
                policy=settings.policy,
                chunk_size=store.layout.chunk_size,
                capacity_tokens=store.pool.capacity * store.layout.chunk_size,
                token_bytes=store.layout.token_bytes,
            )

    def note(
        self,
        rows: Sequence[Row],
        answers: Sequence[Sequence[int]],
        counts: Sequence[int],
        seconds: Sequence[float],
        first_token: float,
    ) -> None:
        """Adds prompts that were answered.

        Args:
            answers: what was stored behind each; counts: tokens generated for each.
            seconds: that computing each took; first_token: until all had their first tokens.
        """
        now = time()  # of the day: processes go on with each other's traces
        for row, answer, count, took in zip(rows, answers, counts, seconds, strict=True):
            for log in list(self._logs):
                try:
                    log.write(
                        row.tokens,
                        answer,
                        time=now,
                        output=count,
                        prompt=row.names[0] if row.names else "",
                        tenant=self._tenant,
                        reuse=row.reuse.to_dict(),
                        seconds=took,
                        first_token=first_token,
                    )
                except TraceError as error:
                    self._logs = [one for one in self._logs if one is not log]
                    _log.warning("nothing is recorded any more: %s", error)

    def close(self) -> None:
        """Ends the trace, if nobody else has it."""
        self._logs = []
        if self._own is not None:
            self._own.close()
